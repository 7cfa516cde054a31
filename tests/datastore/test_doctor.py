"""``knnlm doctor``: finds settings that search too little, says what to change, and changes it when told to."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm import doctor
from knnlm.datastore.files import file_facts
from knnlm.datastore.manifest import Manifest, RemovedFacts
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import replace_search
from knnlm.doctor import Options
from knnlm.entry_mask import EntryMask
from knnlm.errors import IndexingError, InvalidInput, StoreError
from knnlm.index import FaissIndex, open_index
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchPoint, SearchSetting, SearchSettings, SearchTuning
from knnlm.thread_pools import Threads, thread_changes
from tests import reference
from tests.stores import build, command, contents, knnlm, text_folder
from tests.tiny import tiny_corpus

FACTORIES = ["IVF8,SQ8", "IVF8,PQ8x6np", "Flat", "exact", "SQ8"]
DOCUMENTS = 8
Say = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def built(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The store of a factory, built once; not to be changed."""
    folder = tmp_path_factory.mktemp("doctor")
    corpus = text_folder(folder / "corpus", tiny_corpus(DOCUMENTS))
    (folder / "held.txt").write_text("".join(tiny_corpus(4, seed=9)))

    def store(factory: str) -> Path:
        path = folder / factory.replace(",", "-")
        if not path.exists():
            build(corpus, path, gpt2, index=factory, max_length=16)
            forget_settings(path)
        return path

    return store


@pytest.fixture
def ivf(built: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("IVF8,SQ8"), tmp_path / "store"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What the command says as JSON, and that its exit status is as expected."""

    def run(store: Path, *options: str | Path, queries: int = 40, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert knnlm("doctor", store, *options, "--queries", str(queries), "--json") == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def forget_settings(store: Path) -> None:
    """Make of a store what a build without measurement, as that of format version 1, left: searches go by rule."""
    manifest = Manifest.read(store)
    assert manifest.search is not None
    replace(manifest, search=None, files={name: facts for name, facts in manifest.files.items() if name != manifest.search}).write(store)
    (store / manifest.search).unlink()


def spoil(store: Path, probes: int = 1) -> None:
    """Settings that look into one cell only, and claim to be good."""
    manifest = Manifest.read(store)
    point = SearchPoint(1024, probes, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1)
    tuning = SearchTuning("exact", "by hand", 1, 0.005, 10.0, manifest.counts.entries, 8, True, [SearchSetting(1024, probes, 1.0)], [point])
    replace_search(store, manifest, tuning)


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_kind_of_index_is_measured(factory: str, built: Callable[[str], Path], say: Say) -> None:
    found = say(built(factory), status=int(factory == "IVF8,PQ8x6np"))
    assert [finding["point"]["k"] for finding in found["findings"]][:3] == [16, 64, 256]
    assert found["settings_from"] == "rule"
    assert found["healthy"] == (factory != "IVF8,PQ8x6np")
    assert found["queries"] == 40
    assert "own document left out" in found["source"]
    assert found["open_seconds"] > 0
    assert all(finding["milliseconds_alone"] > 0 < finding["milliseconds_in_batch"] for finding in found["findings"])
    if factory in ("Flat", "exact"):
        assert all(finding["point"]["total_variation"] == 0 for finding in found["findings"])
        assert not any("knnlm doctor" in change for change in found["changes"])
    else:
        assert any("come from a rule" in change or "is missed" in change for change in found["changes"])
    assert (found["imbalance"] is None) == (not factory.startswith("IVF"))


@pytest.mark.parametrize("k", [1, 16, 64])
def test_what_it_says_of_the_settings_is_so_by_brute_force(k: int, ivf: Path, say: Say) -> None:
    spoil(ivf)
    (finding,) = say(ivf, "--k", str(k), queries=25, status=1)["findings"]
    store = Datastore.open(ivf)
    assert store.keys is not None
    index = open_index(ivf / store.manifest.index, store.keys, len(store))
    keys, values = store.keys.slice(0, len(store)).double().numpy(), store.values.slice(0, len(store)).numpy()
    entries = doctor.sample_entries(len(store), None, 25, doctor.DOCTOR_SEED)
    variations, recalls = [], []
    for entry in entries.tolist():
        mask = EntryMask.without(len(store), [store.documents.entry_range(store.documents.of_entry(entry))])
        kept = mask.allows(torch.arange(len(store))).nonzero()[:, 0].numpy()
        overfetch = finding["point"]["overfetch"]
        retriever = Retriever(index, store.keys, store.values, SearchSettings.fixed(8, mask.allowed, 1, overfetch), lambda: mask)  # noqa: B023
        got = retriever.retrieve(torch.from_numpy(keys[entry : entry + 1]), k).row(0)
        distances, order = reference.neighbors(keys[entry], keys[kept], k)
        exact = reference.knn_probabilities(distances, values[kept[order]], 10.0, 300)
        mine = reference.knn_probabilities(got.distances[0].double().numpy(), got.tokens[0].numpy(), 10.0, 300)
        variations.append(np.abs(exact - mine).sum() / 2)
        recalls.append(len(set(kept[order].tolist()) & set(got.ids[0].tolist())) / k)
    assert finding["point"]["total_variation"] == pytest.approx(np.mean(variations), abs=2e-5)
    assert finding["point"]["total_variation_max"] == pytest.approx(np.max(variations), abs=2e-5)
    assert finding["point"]["recall"] == pytest.approx(np.mean(recalls), abs=2e-5)


def test_bad_settings_are_found_and_the_command_it_names_mends_them(ivf: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(ivf)
    found = say(ivf, status=1)
    assert (found["healthy"], found["settings_from"]) == (False, "measured")
    (change,) = [change for change in found["changes"] if "knnlm doctor" in change]
    assert "the target is missed for k of 16" in change
    words = shlex.split(change.partition("set by: ")[2])
    assert words == ["knnlm", "doctor", str(ivf), "--queries", "40", "--apply"]
    assert knnlm(*words[1:]) == 0
    assert "new settings are in search/00001.json" in capsys.readouterr().out
    mended = say(ivf)
    assert mended["healthy"]
    assert not [change for change in mended["changes"] if "knnlm doctor" in change]
    assert [path.name for path in (ivf / "search").iterdir()] == ["00001.json"]
    assert knnlm("verify", ivf) == 0
    tuning = Datastore.open(ivf).search
    assert tuning is not None
    assert tuning.met
    for finding in mended["findings"]:
        assert finding["point"] == vars(tuning.point(SearchSettings.tuned(tuning).for_k(finding["point"]["k"])))


def test_applied_twice_gives_the_same_bytes(built: Callable[[str], Path], tmp_path: Path, say: Say) -> None:
    files = []
    for name in ("one", "other"):
        store = Path(shutil.copytree(built("IVF8,PQ8x6np"), tmp_path / name))
        assert say(store, "--apply")["applied"] == "search/00000.json"
        files.append(contents(store))
    assert files[0] == files[1]


def test_settings_that_search_more_than_they_need_are_named(ivf: Path, say: Say) -> None:
    spoil(ivf, probes=8)
    (change,) = [change for change in say(ivf)["changes"] if "knnlm doctor" in change]
    assert "cheaper settings would do" in change


@pytest.mark.parametrize("factory", ["Flat", "exact"])
def test_apply_changes_nothing_where_there_is_nothing_to_choose(
    factory: str, built: Callable[[str], Path], tmp_path: Path, say: Say
) -> None:
    store = Path(shutil.copytree(built(factory), tmp_path / "store"))
    before = contents(store)
    assert say(store, "--apply")["applied"] is None
    assert contents(store) == before


def test_an_index_too_coarse_for_the_target_is_said_with_another_one(gpt2: HFLanguageModel, tmp_path: Path, say: Say) -> None:
    store = tmp_path / "store"
    build(text_folder(tmp_path / "corpus", tiny_corpus(DOCUMENTS)), store, gpt2, index="IVF8,PQ1x1np", max_length=16)
    say(store, "--k", "4", "--apply", status=1)
    tuning = Datastore.open(store).search
    assert tuning is not None
    assert not tuning.met
    found = say(store, "--k", "4", status=1)
    (change,) = [change for change in found["changes"] if "knnlm compact" in change]
    assert "no setting of this index meets it" in change
    assert change.endswith(f"knnlm compact {store} --index IVF8,SQ8")
    assert knnlm("compact", store, "--index", "IVF8,SQ8") == 0
    assert say(store, "--k", "4")["healthy"]


def test_held_out_text_is_read_by_the_stores_model(ivf: Path, built: Callable[[str], Path], say: Say) -> None:
    held = built("Flat").parent / "held.txt"
    found = say(ivf, "--text", held, queries=50)
    assert found["source"].startswith("positions of held-out text;")
    assert found["queries"] == 50
    spoil(ivf)
    (change,) = [change for change in say(ivf, "--text", held, "--k", "7", status=1)["changes"] if "--apply" in change]
    assert f"knnlm doctor {ivf} --text {held} --queries 40 --k 7 --apply" in change


def without_keys(store: Path) -> None:
    """What a build that keeps no keys leaves: the same store without them."""
    manifest = Manifest.read(store)
    for name in [name for name in manifest.files if name.endswith("keys.npy")]:
        (store / name).unlink()
    files = {name: facts for name, facts in manifest.files.items() if not name.endswith("keys.npy")}
    replace(manifest, key=replace(manifest.key, dtype="none"), files=files).write(store)


def test_without_stored_keys_text_is_needed_and_the_index_is_its_own_reference(
    ivf: Path, built: Callable[[str], Path], say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    without_keys(ivf)
    assert knnlm("doctor", ivf) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --text is needed")
    assert said.count("\n") == 1
    held = built("Flat").parent / "held.txt"
    found = say(ivf, "--text", held, "--apply")
    assert "against the index's own search of all its cells" in found["source"]
    tuning = Datastore.open(ivf).search
    assert tuning is not None
    assert tuning.distance == "index"
    assert all(setting.overfetch == 1 for setting in tuning.settings)


def remove(store: Path, documents: int) -> None:
    """Tombstones for the first documents."""
    opened = Datastore.open(store)
    entries = sum(stop - start for start, stop in opened.documents.entry_ranges(np.arange(documents)))
    (store / "removed").mkdir()
    np.save(store / "removed" / "00000.npy", opened.documents.serials[:documents])
    manifest = opened.manifest
    files = {**manifest.files, "removed/00000.npy": file_facts(store / "removed" / "00000.npy")}
    replace(manifest, removed=RemovedFacts("removed/00000.npy", documents, entries), files=files).write(store)


def test_removed_documents_are_neither_asked_nor_found(ivf: Path, say: Say) -> None:
    remove(ivf, DOCUMENTS // 2)
    live = Manifest.read(ivf).live_entries
    found = say(ivf, "--apply")
    assert (found["entries"], found["healthy"]) == (live, True)
    tuning = Datastore.open(ivf).search
    assert tuning is not None
    assert tuning.entries == live
    assert max(setting.k for setting in tuning.settings) < live
    assert say(ivf)["findings"][0]["point"] == vars(tuning.point(tuning.settings[0]))


def test_a_store_without_live_entries_is_refused_in_a_sentence(ivf: Path) -> None:
    remove(ivf, DOCUMENTS)
    with pytest.raises(StoreError, match="too few entries to measure at: 0"):
        doctor.examine(ivf, Options())


def test_the_temperature_is_that_of_the_profile(ivf: Path, say: Say) -> None:
    assert say(ivf)["temperature"] == 10
    Profile(Mixture(8, 0.125, 0.3), "exact", "by hand").write(ivf)
    assert say(ivf)["temperature"] == 0.125


@pytest.mark.parametrize(("options", "field"), [({"queries": 0}, "queries"), ({"ks": (0,)}, "k"), ({"ks": (5000,)}, "k")])
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Options(**options).validate()
    assert refused.value.field == field


def test_the_command_in_a_process_of_its_own(ivf: Path) -> None:
    spoil(ivf)
    said = command("doctor", ivf, "--queries", "40")
    assert said.returncode == 1
    assert said.stderr == ""
    assert "missed" in said.stdout
    assert f"knnlm doctor {ivf} --queries 40 --apply" in said.stdout.replace("\n", "")
    assert "no GPU was found here" in said.stdout or torch.cuda.is_available()


def test_a_gpu_is_compared_with_the_cpu(built: Callable[[str], Path], say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in its place, and then with one that finds other neighbours."""
    store = built("IVF8,SQ8")

    def opened(folder: Path, keys: Any, entries: int, device: str = "cpu") -> Any:
        index = open_index(folder, keys, entries)
        return index if device == "cpu" else other(index)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "open_index", opened)
    other: Callable[[Any], Any] = lambda index: index  # noqa: E731
    found = say(store)
    assert found["gpu_note"] is None
    assert [gpu["same"] for gpu in found["gpu"]] == [1.0] * len(found["findings"])
    assert [gpu["total_variation"] for gpu in found["gpu"]] == pytest.approx([0.0] * len(found["findings"]), abs=1e-9)

    class OneCell(FaissIndex):
        def search(self, queries: Any, k: int, count: int, *, probes: int, allowed: Any = None) -> Any:
            return super().search(queries, k, count, probes=1, allowed=allowed)

    other = lambda index: OneCell(index._index, index.facts)  # noqa: E731
    found = say(store, status=1)
    assert not found["healthy"]
    assert found["gpu"][0]["same"] < 1
    assert found["gpu"][0]["total_variation"] > 0.005


def test_an_index_that_no_gpu_takes_is_said(built: Callable[[str], Path], say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(folder: Path, keys: Any, entries: int, device: str = "cpu") -> Any:
        if device != "cpu":
            raise IndexingError("FAISS can't move this index to cuda.")
        return open_index(folder, keys, entries)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "open_index", opened)
    assert "can't move this index to cuda" in say(built("IVF8,SQ8"))["gpu_note"]


@pytest.mark.gpu
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_real_gpu_finds_what_the_cpu_finds(factory: str, built: Callable[[str], Path], say: Say) -> None:
    found = say(built(factory))
    assert found["gpu_note"] is not None or all(gpu["total_variation"] <= 0.005 for gpu in found["gpu"])


@pytest.mark.parametrize(
    ("threads", "said"),
    [
        (Threads(2, 2, 2, "PASSIVE"), []),
        (Threads(2, 2, 2, "passive"), []),
        (Threads(1, 1, 1, None), []),
        (Threads(2, 2, None, None), []),
        (Threads(2, 2, 2, None), ["OMP_WAIT_POLICY=PASSIVE"]),
        (Threads(2, 2, 8, "ACTIVE"), ["OMP_NUM_THREADS=2", "OMP_WAIT_POLICY=PASSIVE"]),
        (Threads(4, 8, None, "PASSIVE"), ["OMP_NUM_THREADS=4"]),
    ],
)
def test_threads_that_get_in_each_others_way_are_said(threads: Threads, said: list[str]) -> None:
    changes = thread_changes(threads)
    assert len(changes) == len(said)
    assert all(f"export {words}" in change for change, words in zip(changes, said, strict=True))

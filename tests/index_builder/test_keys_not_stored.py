"""``--keys none``: keys are in the index's codes alone, everything else is as with keys, and what needs keys is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm import index
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import InvalidInput, StoreMismatch
from knnlm.inverted_lists import InvertedLists
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from knnlm_index_builder import train_index
from knnlm_index_builder.executors import ProcessExecutor
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.plan_index import WORKING_BYTES, plan_index
from knnlm_index_builder.settings import BuildSettings, Resources
from tests.changing import (
    Array,
    Held,
    append,
    built,
    compacted,
    documents_file,
    fake,
    files_with,
    looking_everywhere,
    problems,
    require_provenance,
    table_of,
)
from tests.fake_model import load_fake_model
from tests.stores import Silent, build, contents, knnlm
from tests.tiny import tiny_corpus

OLD = {f"old-{number}": text for number, text in enumerate(tiny_corpus(6))}
NEW = {f"new-{number}": text for number, text in enumerate(tiny_corpus(2, seed=7))}
SETTINGS: dict[str, Any] = {"max_length": 16, "shard_tokens": 200}
FACTORIES = ["auto", "IVF4,SQ8", "IVF4,RaBitQ", "IVF4,PQ4x4np"]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    documents_file(folder / "old.jsonl", OLD)
    documents_file(folder / "new.jsonl", NEW)
    return folder


@pytest.fixture(scope="module")
def stored(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents with their keys, in full precision."""
    store = tmp_path_factory.mktemp("stored") / "store"
    built(inputs / "old.jsonl", store, keys="float32", index="exact", **SETTINGS)
    return store


@pytest.fixture(scope="module")
def base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    store = tmp_path_factory.mktemp("base") / "store"
    built(inputs / "old.jsonl", store, keys="none", index="IVF4,SQ8", **SETTINGS)
    return store


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "store"))


def lists_of(store: Path) -> tuple[Array, Array]:
    """Cell and code of each entry."""
    lists = InvertedLists.of_index(store / Manifest.read(store).index)
    entries = int(lists.sizes.sum())
    cells, codes = np.full(entries, -1), np.zeros((entries, lists.code_size), np.uint8)
    for number in range(len(lists.sizes)):
        for code, ids in zip(lists.codes(number), lists.ids(number), strict=True):
            assert (cells[ids] == -1).all()
            cells[ids], codes[ids] = number, code
    assert (cells >= 0).all()
    return cells, codes


@pytest.mark.parametrize("factory", FACTORIES)
def test_keys_are_in_the_codes_and_nowhere_else(factory: str, inputs: Path, stored: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    manifest = built(inputs / "old.jsonl", store, keys="none", index=factory, **SETTINGS).manifest
    held, keys = Held.of(store), Held.of(stored).keys
    assert keys is not None
    assert held.keys is None
    np.testing.assert_array_equal(held.values, Held.of(stored).values)
    assert manifest.key.dtype == "none"
    assert not list(store.rglob("keys.npy"))
    everything = b"".join(path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file())
    for kind in (np.float32, np.float16):
        assert not any(row.tobytes() in everything for row in keys.astype(kind))
    assert problems(store) == []
    require_provenance(store, OLD)
    # Codes are those that the trained index gives to the keys.
    trained = index.read_index_file(store / manifest.index / "index.faiss", mapped=False)
    trained.reset()
    trained.add_with_ids(keys, np.arange(len(keys)))
    filled = index.read_index_file(store / manifest.index / "index.faiss", mapped=False)
    for each in (trained, filled):
        each.nprobe = index.read_index_facts(store / manifest.index).nlist
    np.testing.assert_array_equal(*(each.search(keys[::7], 9)[0] for each in (trained, filled)))


@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
def test_batch_size_changes_no_byte(batch_tokens: int, base: Path, inputs: Path, tmp_path: Path) -> None:
    built(inputs / "old.jsonl", tmp_path / "store", keys="none", index="IVF4,SQ8", batch_tokens=batch_tokens, **SETTINGS)
    assert contents(tmp_path / "store", receipts=False) == contents(base, receipts=False)


def test_workers_change_no_byte(base: Path, inputs: Path, tmp_path: Path) -> None:
    settings = BuildSettings(keys="none", index="IVF4,SQ8", **SETTINGS)
    resources = Resources(executor=ProcessExecutor(load_fake_model, 2))
    build_datastore([inputs / "old.jsonl"], tmp_path / "store", fake(), settings, Silent(), resources)  # type: ignore[arg-type]
    assert contents(tmp_path / "store") == contents(base)


@pytest.mark.parametrize("factory", ["Flat", "exact", "HNSW8,Flat", "IVF4,Flat", "IVF4,PQ4x4fs"])
def test_an_index_that_keeps_keys_or_is_not_made_on_disk_is_refused(factory: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no keys are kept|none are kept") as refused:
        built(inputs / "old.jsonl", tmp_path / "store", keys="none", index=factory, **SETTINGS)
    assert refused.value.field == "index"
    assert "choose" in str(refused.value)
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def of_gpt2(gpt2: HFLanguageModel, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("gpt2") / "store"
    build(inputs / "old.jsonl", store, gpt2, keys="none", index="IVF4,SQ8", **SETTINGS)
    return store


def test_distances_are_those_of_the_index(of_gpt2: Path, gpt2: HFLanguageModel) -> None:
    opened = open_store(of_gpt2, k=5, weight=0.5)
    retriever = opened.knn_lm.retriever
    assert (retriever.distance, opened.store.keys) == ("index", None)
    assert opened.store.search is not None
    assert opened.store.search.distance == "index"
    tokens = torch.tensor([opened.knn_lm.tokenizer.encode("The farmer sold")])
    query = gpt2.forward(tokens, logits=False).keys[0, -1:].float()
    mixed = opened.next_token("The farmer sold")
    found = index.read_index_file(of_gpt2 / "index" / "00000" / "index.faiss")
    found.nprobe = retriever.settings.for_k(5).probes
    distances, ids = found.search(query.numpy(), 5)
    assert mixed.neighbors.distances[0].numpy() == pytest.approx(distances[0], rel=1e-4)
    assert set(mixed.neighbors.ids[0].tolist()) == set(ids[0].tolist())
    assert float(mixed.log_probs.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert opened.generate("The farmer sold", max_new_tokens=4)


def test_commands(of_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held.txt").write_text(tiny_corpus(1, seed=3)[0])
    assert knnlm("inspect", of_gpt2) == 0
    assert "not stored, so distances come from the index" in " ".join(capsys.readouterr().out.split())
    assert knnlm("verify", of_gpt2) == 0
    capsys.readouterr()
    assert knnlm("compare", of_gpt2, "--text", tmp_path / "held.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stores"][0]["change"] != 0


@pytest.mark.parametrize("distance", ["exact", "index"])
def test_a_profile_of_the_other_kind_of_distance_is_refused(
    distance: str, of_gpt2: Path, gpt2: HFLanguageModel, inputs: Path, tmp_path: Path
) -> None:
    if distance == "exact":
        store = Path(shutil.copytree(of_gpt2, tmp_path / "store"))
    else:
        store = tmp_path / "store"
        build(inputs / "old.jsonl", store, gpt2, index="exact", **SETTINGS)
    Profile(Mixture(k=3), distance, "held-out text").write(store)
    with pytest.raises(StoreMismatch, match=rf"profile\.json was calibrated with the distance '{distance}', .*delete the file"):
        open_store(store)
    Profile(Mixture(k=3), {"exact": "index", "index": "exact"}[distance], "held-out text").write(store)
    assert open_store(store).knn_lm.mixture.k == 3


def test_append_keeps_the_codes_and_adds_those_of_new_entries(store: Path, base: Path, inputs: Path, tmp_path: Path) -> None:
    result = append(inputs / "new.jsonl", store)
    assert problems(store) == []
    require_provenance(store, OLD | NEW)
    before, after = lists_of(base), lists_of(store)
    count = len(before[0])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[:count], old)
    assert len(after[0]) == result.manifest.counts.entries > count
    # A new entry is found by its own key, which another store of these documents holds.
    built([inputs / "old.jsonl", inputs / "new.jsonl"], tmp_path / "stored", keys="float32", index="exact", **SETTINGS)
    keys = Held.of(tmp_path / "stored").keys
    assert keys is not None
    names = [row["id"] for row in table_of(tmp_path / "stored")]
    opened = Datastore.open(store)
    other = Datastore.open(tmp_path / "stored")
    first, last = other.documents.entry_range(names.index("new-1"))
    start, _ = opened.documents.entry_range(7)
    assert opened.documents[7].id == "new-1"
    found = looking_everywhere(opened).retrieve(torch.from_numpy(keys[first:last]), 8)
    assert (found.ids == torch.arange(start, start + last - first)[:, None]).any(1).float().mean() > 0.9


def test_compaction_takes_codes_out(store: Path, base: Path) -> None:
    gone = ["old-1", "old-4"]
    opened = Datastore.open(store)
    kept = np.ones(len(opened), dtype=bool)
    for first, last in opened.documents.entry_ranges(opened.documents.rows_of("id", gone)):
        kept[first:last] = False
    cells, codes = lists_of(store)
    only_theirs = {code.tobytes() for code in codes[~kept]} - {code.tobytes() for code in codes[kept]}
    assert len(only_theirs) > 50
    assert all(files_with(store, code) for code in only_theirs)
    remove_documents(store, gone)
    compacted(store)
    assert [code for code in only_theirs if files_with(store, code)] == []
    for found, before in zip(lists_of(store), (cells, codes), strict=True):
        np.testing.assert_array_equal(found, before[kept])
    assert problems(store) == []
    require_provenance(store, {name: text for name, text in OLD.items() if name not in gone})
    held, was = Held.of(store), Held.of(base)
    np.testing.assert_array_equal(held.values, was.values[kept])


def test_an_index_cannot_be_trained_anew(store: Path) -> None:
    remove_documents(store, ["old-1"])
    for other in ("IVF4,SQ8", "Flat", "auto"):
        with pytest.raises(InvalidInput, match="can't be trained anew, since the datastore keeps no keys"):
            compacted(store, other)
    assert not (store / ".build").exists()
    compacted(store)
    assert problems(store) == []


def test_fewer_entries_than_cells_are_compacted_all_the_same(tmp_path: Path) -> None:
    """Nothing has to be trained, and what was removed must go."""
    store = tmp_path / "store"
    built(
        documents_file(tmp_path / "c.jsonl", {"long": OLD["old-0"], "short": "a mill"}), store, keys="none", index="IVF16,SQ8", **SETTINGS
    )
    remove_documents(store, ["long"])
    assert compacted(store).manifest.counts.entries < 16
    assert problems(store) == []


def test_the_index_outgrown_by_appends_is_not_advised_against(tmp_path: Path, inputs: Path) -> None:
    """The cells no longer fit, but only a build of all text could train them anew."""
    chance = np.random.default_rng(0)
    for name, tokens in (("old", chance.integers(1, 300, 600)), ("new", np.full(1500, 7))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / f"{name}.npy", tokens)
    built(tmp_path / "old", tmp_path / "store", keys="none", index="IVF8,SQ8", max_length=64)
    (warning,) = append(tmp_path / "new", tmp_path / "store").warnings
    assert "imbalance grew from" in warning
    assert warning.endswith("no keys are kept, so only a build of all text trains it anew")


def test_a_build_that_was_killed_goes_on_with_less_memory(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of finished shards are those of an index that was trained on more keys than would be taken now."""
    monkeypatch.setattr(train_index, "FEWEST_POINTS", 100)
    monkeypatch.setattr(train_index, "POINTS_PER_LIST", 150)
    settings = BuildSettings(keys="none", index="IVF4,SQ8", **SETTINGS)
    much, little = WORKING_BYTES + 10_000_000, WORKING_BYTES + 40_000
    plans = [plan_index("IVF4,SQ8", 8, 900, memory=memory, keys_stored=False, part_entries=200) for memory in (much, little)]
    assert plans[0].training_points > plans[1].training_points

    def run(name: str, memory: int) -> None:
        build_datastore([inputs / "old.jsonl"], tmp_path / name, fake(), settings, Silent(), Resources(memory=memory))  # type: ignore[arg-type]

    run("expected", much)
    forward = fake().forward

    def dying(*arguments: Any, **options: Any) -> Any:
        if len(list((tmp_path / "store").glob("shards/*/receipt.json"))) == 2:
            raise Killed
        return forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake(), "forward", dying)
        with pytest.raises(Killed):
            run("store", much)
    run("store", little)
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")

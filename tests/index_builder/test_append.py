"""Appending: what is there afterwards, what readers see meanwhile, what is refused, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm import index
from knnlm.datastore.manifest import FORMAT_VERSION, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import CorpusError, StoreError, StoreMismatch, StoreNotFound
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm_index_builder import pipeline
from tests import reference
from tests.changing import (
    Held,
    append,
    built,
    compacted,
    documents_file,
    fake,
    looking_everywhere,
    problems,
    require_provenance,
    search_all,
    table_of,
)
from tests.fake_model import FakeModel
from tests.stores import build, contents, knnlm, text_folder, token_folder
from tests.tiny import tiny_corpus

OLD = {f"old-{number}": text for number, text in enumerate(tiny_corpus(5))}
NEW = {f"new-{number}": text for number, text in enumerate(tiny_corpus(3, seed=7))}
SETTINGS: dict[str, Any] = {"max_length": 16, "shard_tokens": 200}
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a-old.jsonl`` and ``b-new.jsonl``."""
    folder = tmp_path_factory.mktemp("inputs")
    documents_file(folder / "a-old.jsonl", OLD, license="MIT")
    documents_file(folder / "b-new.jsonl", NEW, license="CC0")
    return folder


@pytest.fixture(scope="module")
def bases(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of the old documents, by index; not to be changed."""
    folder = tmp_path_factory.mktemp("bases")
    factories = ("Flat", "exact", "IVF4,SQ8")
    for number, factory in enumerate(factories):
        built(inputs / "a-old.jsonl", folder / str(number), index=factory, **SETTINGS)
    return {factory: folder / str(number) for number, factory in enumerate(factories)}


@pytest.fixture
def store(bases: dict[str, Path], tmp_path: Path) -> Path:
    """Of the old documents, with a Flat index."""
    return Path(shutil.copytree(bases["Flat"], tmp_path / "store"))


@pytest.mark.parametrize("factory", ["Flat", "exact", "IVF4,SQ8"])
def test_old_and_new_are_what_one_build_of_both_gives(factory: str, bases: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(bases[factory], tmp_path / "store"))
    before = Manifest.read(store)
    result = append(inputs / "b-new.jsonl", store)
    whole = built(inputs, tmp_path / "whole", index=factory, **SETTINGS).manifest
    assert not result.already_complete
    assert result.warnings == ()
    Held.of(store).require_equal(Held.of(tmp_path / "whole"))
    assert table_of(store) == table_of(tmp_path / "whole")
    require_provenance(store, OLD | NEW)
    assert problems(store) == []
    assert result.manifest == Manifest.read(store)
    require_next(result.manifest, before, whole)
    opened = Datastore.open(store, verify=True)
    assert opened.documents.serials.tolist() == list(range(8))
    require_exact_neighbors(opened, len(opened) if factory == "IVF4,SQ8" else 12)


def require_next(found: Manifest, before: Manifest, whole: Manifest) -> None:
    """The facts of a manifest after an append to ``before``, where one build of all gives ``whole``."""
    assert found.counts == whole.counts
    assert (found.key, found.text, found.windowing, found.model) == (before.key, before.text, before.windowing, before.model)
    assert found.shards[: len(before.shards)] == before.shards
    assert found.documents == [*before.documents, "documents/00001.arrow"]
    assert (found.index, found.corpus_xxh3, found.next_serial) == ("index/00001", before.corpus_xxh3, 8)
    assert len(found.appended) == 1
    assert {shard.name for shard in found.shards} == {f"{number:05}" for number in range(len(found.shards))}


def require_exact_neighbors(opened: Datastore, k: int) -> None:
    """Every ninth key finds the k nearest of all, old and new, as brute force does."""
    keys = Held.of(opened.path).keys
    assert keys is not None
    queries = keys[::9]
    found = search_all(opened, queries, k)
    for row, query in enumerate(queries):
        distances, ids = reference.neighbors(query.astype(np.float64), keys.astype(np.float64), k)
        assert found.distances[row].numpy() == pytest.approx(distances, rel=1e-4, abs=1e-4)
        if opened.manifest.index and float(np.diff(distances).min()) > 1e-3:
            assert found.ids[row].tolist() == ids.tolist()
        assert found.tokens[row].tolist() == opened.values.gather(found.ids[row]).tolist()


def test_codes_are_what_the_trained_index_gives_to_all_keys(bases: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    """An append trains nothing: the same index filled by FAISS itself with all keys gives the same distances."""
    store = Path(shutil.copytree(bases["IVF4,SQ8"], tmp_path / "store"))
    append(inputs / "b-new.jsonl", store)
    keys = Held.of(store).keys
    assert keys is not None
    trained = index.read_index_file(bases["IVF4,SQ8"] / "index" / "00000" / "index.faiss", mapped=False)
    trained.reset()
    trained.add_with_ids(keys.astype(np.float32), np.arange(len(keys)))
    appended = index.read_index_file(store / "index" / "00001" / "index.faiss", mapped=False)
    for each in (trained, appended):
        each.nprobe = 4
    expected, found = (each.search(keys[::5].astype(np.float32), 20) for each in (trained, appended))
    np.testing.assert_array_equal(found[0], expected[0])


def test_several_in_a_row_and_the_same_one_again(store: Path, inputs: Path, tmp_path: Path) -> None:
    parts = {"c": dict(list(NEW.items())[:1]), "d": dict(list(NEW.items())[1:])}
    for name, documents in parts.items():
        documents_file(tmp_path / f"{name}.jsonl", documents, license="CC0")
        append(tmp_path / f"{name}.jsonl", store)
    manifest = Manifest.read(store)
    assert (len(manifest.documents), len(manifest.appended), manifest.index) == (3, 2, "index/00002")
    assert Datastore.open(store).documents.serials.tolist() == list(range(8))
    built(inputs, tmp_path / "whole", index="Flat", **SETTINGS)
    Held.of(store).require_equal(Held.of(tmp_path / "whole"))
    require_provenance(store, OLD | NEW)
    before = times(store)
    for name in parts:
        assert append(tmp_path / f"{name}.jsonl", store).already_complete
    assert times(store) == before
    assert problems(store) == []
    assert [path.name for path in (store / "index").iterdir()] == ["00002"]


def times(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*")}


def test_the_log_says_what_came_in(store: Path, inputs: Path) -> None:
    result = append(inputs / "b-new.jsonl", store)
    (line,) = map(json.loads, (store / "audit.log").read_text().splitlines())
    entries = sum(len(fake().tokenizer().encode(text)) - 1 for text in NEW.values())
    assert (line["operation"], line["documents"], line["entries"]) == ("append", 3, entries)
    assert line["corpus_xxh3"] == result.manifest.appended[0]


@pytest.mark.parametrize("compaction", [False, True])
def test_an_id_comes_again_after_its_document_was_removed(compaction: bool, store: Path, tmp_path: Path) -> None:
    again = documents_file(tmp_path / "again.jsonl", {"old-1": "The miller wrote another story."})
    with pytest.raises(CorpusError, match=r"document id 'old-1' is in .*store already"):
        append(again, store)
    assert not (store / ".build").exists()
    remove_documents(store, ["old-1"])
    if compaction:
        compacted(store)
    append(again, store)
    opened = Datastore.open(store, verify=True)
    live = [number for number in range(len(opened.documents)) if number not in opened.tombstones.documents]
    assert [opened.documents[number].id for number in live] == ["old-0", "old-2", "old-3", "old-4", "old-1"]
    assert opened.documents[live[-1]].serial == 5
    require_provenance(store, {**OLD, "old-1": "The miller wrote another story."})
    assert problems(store) == []
    # Once more it is there.
    with pytest.raises(CorpusError, match="'old-1'"):
        append(documents_file(tmp_path / "third.jsonl", {"old-1": "A third one."}), store)


def test_what_was_appended_and_removed_can_be_appended_again(store: Path, inputs: Path) -> None:
    append(inputs / "b-new.jsonl", store)
    remove_documents(store, list(NEW))
    assert not append(inputs / "b-new.jsonl", store).already_complete
    assert Manifest.read(store).live_documents == 8
    require_provenance(store, OLD | NEW)


def die_in_the_second_shard(store: Path, inputs: Path) -> None:
    """Append ``inputs`` with a model that ends the process at its first batch after a new shard is done."""
    model, shards = fake(), len(Manifest.read(store).shards)
    forward = model.forward

    def one(*arguments: Any, **options: Any) -> Any:
        if len(list(store.glob("shards/*/receipt.json"))) > shards:
            raise Killed
        return forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", one)
        with pytest.raises(Killed):
            append(inputs, store)


@pytest.fixture
def unfinished(store: Path, inputs: Path) -> Path:
    """A store with an append of ``b-new.jsonl`` that was killed with one shard done."""
    die_in_the_second_shard(store, inputs / "b-new.jsonl")
    return store


def test_another_operation_meanwhile_is_refused_and_the_first_goes_on(unfinished: Path, inputs: Path, tmp_path: Path) -> None:
    other = documents_file(tmp_path / "other.jsonl", {"other": "Another story."})
    with pytest.raises(StoreMismatch, match=r"unfinished append.*the text \(xxh3"):
        append(other, unfinished)
    with pytest.raises(StoreError, match=r"unfinished append; finish it .* or give it up by deleting the folder .*\.build"):
        compacted(unfinished, "exact")
    assert built(inputs / "a-old.jsonl", unfinished, index="Flat", **SETTINGS).already_complete
    # Nothing of it was lost: only what was not done is done.
    finished = {path: path.stat().st_mtime_ns for path in unfinished.glob("shards/*/receipt.json")}
    append(inputs / "b-new.jsonl", unfinished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert problems(unfinished) == []
    require_provenance(unfinished, OLD | NEW)


def test_a_repeated_append_leaves_an_unfinished_one_alone(store: Path, inputs: Path, tmp_path: Path) -> None:
    first = documents_file(tmp_path / "first.jsonl", {"first": "The first story."})
    append(first, store)
    die_in_the_second_shard(store, inputs / "b-new.jsonl")
    kept = {path for path in store.rglob("*") if path.is_file()}
    assert append(first, store).already_complete
    assert {path for path in store.rglob("*") if path.is_file()} == kept


def test_shards_of_an_append_that_was_given_up_are_not_taken_over(unfinished: Path, tmp_path: Path) -> None:
    """Its folder .build was deleted, as messages say; the shards of it that are done are those of other documents."""
    shutil.rmtree(unfinished / ".build")
    # As many tokens, so that a shard of the same name would cover the same range.
    others = {name.replace("new", "other"): text.swapcase() for name, text in NEW.items()}
    append(documents_file(tmp_path / "other.jsonl", others), unfinished)
    require_provenance(unfinished, OLD | others)
    assert problems(unfinished) == []


def test_documents_removed_meanwhile_stay_removed(unfinished: Path, inputs: Path) -> None:
    remove_documents(unfinished, ["old-2"])
    append(inputs / "b-new.jsonl", unfinished)
    manifest = Manifest.read(unfinished)
    assert (manifest.live_documents, manifest.counts.documents) == (7, 8)
    assert problems(unfinished) == []


@pytest.mark.parametrize("following", ["append", "compact"])
def test_a_process_that_ends_right_after_the_commit_hinders_nobody(
    following: str, store: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Site, "commit", lambda site, manifest: (manifest.write(site.store), end()))
        with pytest.raises(Killed):
            append(inputs / "b-new.jsonl", store)
    assert Manifest.read(store).counts.documents == 8
    assert (store / ".build").exists()
    if following == "append":
        append(documents_file(tmp_path / "more.jsonl", {"more": "One more story."}), store)
    else:
        remove_documents(store, ["new-1"])
        compacted(store)
    assert not (store / ".build").exists()
    assert problems(store) == []


class Other(FakeModel):
    """Computes in less."""

    dtype = "bfloat16"


def test_what_does_not_belong_to_the_store_is_refused(store: Path, inputs: Path, tmp_path: Path, gpt2: HFLanguageModel) -> None:
    before = contents(store)
    arrays = token_folder(tmp_path / "arrays", [[1, 2, 3]])
    with pytest.raises(StoreMismatch, match="holds text, but the input is token arrays"):
        append(arrays, store)
    with pytest.raises(StoreMismatch, match=r"built with fake \(configuration"):
        append(inputs / "b-new.jsonl", store, gpt2)
    with pytest.raises(StoreMismatch, match="computed in float32, but the model computes in bfloat16"):
        append(inputs / "b-new.jsonl", store, Other())
    with pytest.raises(CorpusError, match="yields no entry"):
        append(text_folder(tmp_path / "short", ["a"]), store)
    with pytest.raises(StoreNotFound):
        append(inputs / "b-new.jsonl", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert contents(store) == before
    built(arrays, tmp_path / "of-arrays", index="Flat")
    with pytest.raises(StoreMismatch, match="holds token arrays, but the input is text"):
        append(inputs / "b-new.jsonl", tmp_path / "of-arrays")


def test_token_arrays_are_appended_to_token_arrays(tmp_path: Path) -> None:
    built(token_folder(tmp_path / "old", [range(1, 30), [5]]), tmp_path / "store", index="Flat", max_length=8, shard_tokens=10)
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / "more.npy", np.arange(40, 60))
    append(tmp_path / "new", tmp_path / "store")
    assert Held.of(tmp_path / "store").tokens.tolist() == [*range(1, 30), 5, *range(40, 60)]
    assert Held.of(tmp_path / "store").spans is None
    assert problems(tmp_path / "store") == []


@pytest.fixture
def opened(gpt2: HFLanguageModel, inputs: Path, tmp_path: Path) -> OpenedKNNLM:
    build(inputs / "a-old.jsonl", tmp_path / "store", gpt2, index="IVF4,SQ8", **SETTINGS)
    return open_store(tmp_path / "store")


def test_a_reader_that_was_open_keeps_what_it_opened(opened: OpenedKNNLM, inputs: Path, gpt2: HFLanguageModel) -> None:
    prompt, store = "The farmer sold", opened.store.path
    before = opened.next_token(prompt)
    seen: list[Any] = []

    forward = gpt2.forward

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append((opened if seen else open_store(store)).next_token(prompt).log_probs)
        return forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "forward", watched)
        append(inputs / "b-new.jsonl", store, gpt2)
    after = opened.next_token(prompt)
    assert len(seen) >= 2
    assert all(np.array_equal(found, before.log_probs) for found in (*seen, after.log_probs))
    assert not opened.store.refresh()
    # It still loses what is removed.
    remove_documents(store, ["old-1"])
    assert opened.store.refresh()
    assert "old-1" not in {opened.store.evidence(entry).document.id for entry in opened.next_token(prompt).neighbors.ids[0].tolist()}
    # One who comes later has the new ones as well.
    later = open_store(store)
    number = [later.store.documents[row].id for row in range(len(later.store.documents))].index("new-0")
    first, last = later.store.documents.entry_range(number)
    assert later.store.keys is not None
    found = looking_everywhere(later.store).retrieve(later.store.keys.slice(first, last), 1)
    assert float(found.distances.max()) == 0


def test_a_store_that_is_replaced_while_its_model_is_loaded_is_opened_again(
    opened: OpenedKNNLM, inputs: Path, gpt2: HFLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm import opening

    def slow(*_: object) -> HFLanguageModel:
        if not Manifest.read(opened.store.path).appended:
            append(inputs / "b-new.jsonl", opened.store.path, gpt2)
        return gpt2

    monkeypatch.setattr(opening.ModelSource, "load", slow)
    found = open_store(opened.store.path)
    assert found.store.manifest.counts.documents == 8
    assert found.knn_lm.retriever.index.entries == len(found.store)


@pytest.mark.parametrize("name", ["store-exact", "store-sq8", "store-flat-tokens"])
def test_a_store_of_version_1_becomes_one_of_version_2(name: str, tmp_path: Path) -> None:
    store = Path(shutil.copytree(GOLDEN / name, tmp_path / "store"))
    model, before = HFLanguageModel.load(GOLDEN / "model"), Held.of(store)
    table, receipts = table_of(store), {path: path.read_bytes() for path in store.glob("shards/*/receipt.json")}
    if name == "store-flat-tokens":
        new = token_folder(tmp_path / "new" / "more", [[3, 1, 4, 1, 5]]).parent
    else:
        new = documents_file(tmp_path / "new.jsonl", NEW, license="CC0")
    append(new, store, model)
    after = Held.of(store)
    assert json.loads((store / "manifest.json").read_text())["format_version"] == FORMAT_VERSION
    np.testing.assert_array_equal(after.tokens[: len(before.tokens)], before.tokens)
    assert before.keys is not None
    assert after.keys is not None
    np.testing.assert_array_equal(after.keys[: len(before.keys)], before.keys)
    assert table_of(store)[: len(table)] == table
    assert {path: path.read_bytes() for path in receipts} == receipts
    assert problems(store) == []
    opened = open_store(store, model=str(GOLDEN / "model"), verify=True)
    assert opened.store.documents.serials.tolist() == list(range(len(table_of(store))))
    found = search_all(opened.store, after.keys[-1:], 1)
    assert float(found.distances[0, 0]) == pytest.approx(0, abs=1e-3)
    assert not (store / "index" / "index.json").exists()
    assert append(new, store, model).already_complete


def test_an_index_that_auto_chose_for_fewer_entries_is_named(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    built(token_folder(tmp_path / "old", [chance.integers(1, 300, 200)]), tmp_path / "store", keys="float16", max_length=64)
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / "more.npy", chance.integers(1, 300, 50_000))
    (warning,) = append(tmp_path / "new", tmp_path / "store").warnings
    assert "Flat was chosen for fewer entries than the 50,198" in warning
    assert warning.endswith(f"knnlm compact {tmp_path / 'store'} --index auto")


def test_text_that_the_cells_were_not_trained_on_is_named(tmp_path: Path) -> None:
    """All of it falls into one cell."""
    chance = np.random.default_rng(0)
    built(token_folder(tmp_path / "old", [chance.integers(1, 300, 600)]), tmp_path / "store", index="IVF8,Flat", max_length=64)
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / "more.npy", np.full(1500, 7))
    (warning,) = append(tmp_path / "new", tmp_path / "store").warnings
    assert "imbalance grew from" in warning
    assert warning.endswith(f"knnlm compact {tmp_path / 'store'} --index IVF8,Flat")
    assert compacted(tmp_path / "store", "IVF8,Flat").manifest.index == "index/00002"
    assert problems(tmp_path / "store") == []


@pytest.fixture
def of_gpt2(gpt2: HFLanguageModel, inputs: Path, tmp_path: Path) -> Iterator[Path]:
    build(inputs / "a-old.jsonl", tmp_path / "store", gpt2, index="Flat", **SETTINGS)
    return tmp_path / "store"


def test_the_command(of_gpt2: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("build", inputs / "b-new.jsonl", "--store", of_gpt2, "--append", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["counts"]["documents"], said["windowing"]["max_length"]) == (8, 16)
    before = times(of_gpt2)
    assert knnlm("build", inputs / "b-new.jsonl", "--store", of_gpt2, "--append") == 0
    assert "holds these documents already; nothing was changed" in " ".join(capsys.readouterr().err.split())
    assert times(of_gpt2) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--index", "Flat"), ("--keys", "float32"), ("--on-overflow", "float32"), ("--max-length", "8"), ("--stride", "4"), ("--bos", "no"),
     ("--eos", None), ("--split-documents", "x"), ("--key-layer", "last_hidden"), ("--key-module", "lm_head"), ("--shard-tokens", "10"),
     ("--dtype", "float32"), ("--revision", "main")],
)  # fmt: skip
def test_the_command_takes_no_setting_that_the_store_has(
    flag: str, value: str | None, store: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(store)
    words = [flag] if value is None else [flag, value]
    assert knnlm("build", inputs / "b-new.jsonl", "--store", store, "--append", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{flag} can't be given with --append" in said
    assert contents(store) == before


def test_the_command_without_append_wants_a_model(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("build", inputs / "b-new.jsonl", "--store", tmp_path / "store") == 2
    assert "model" in capsys.readouterr().err

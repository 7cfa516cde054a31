"""Building: the same bytes for any batch size, thread count and interruption; what is refused, and how it is named."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import CorpusError, InvalidInput, KNNLMError, NonFiniteKey, StoreError, StoreIncomplete, StoreMismatch
from knnlm.model import HFLanguageModel, ModelOutput
from knnlm_index_builder import build_index, index_stage, ingest, pipeline, search_stage, site
from tests.stores import build, contents, text_folder, token_folder
from tests.tiny import tiny_corpus

SETTINGS: dict[str, Any] = {"index": "IVF4,SQ8", "shard_tokens": 250, "max_length": 16}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("corpus") / "stories", [*tiny_corpus(8), "", "a", *tiny_corpus(4, seed=9)])


@pytest.fixture(scope="module")
def expected(corpus: Path, gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a build that nothing disturbed."""
    store = tmp_path_factory.mktemp("expected") / "store"
    assert len(build(corpus, store, gpt2, **SETTINGS).manifest.shards) >= 4
    return contents(store)


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    import faiss

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    import faiss

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="module")
def eager(tiny_gpt2_path: Path) -> HFLanguageModel:
    """The fused attention of torch gives odd lengths other last bits with other threads where a head has 8 dimensions,
    as here; heads of real models are wider."""
    return HFLanguageModel.load(tiny_gpt2_path, attention="eager")


@pytest.fixture(scope="module")
def expected_exactly(corpus: Path, eager: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files with keys in full precision, so that no last bit is lost, and with keys in the index alone."""
    found = {}
    for keys in ("float32", "none"):
        store = tmp_path_factory.mktemp("expected") / "store"
        build(corpus, store, eager, **{**SETTINGS, "keys": keys})
        found[keys] = contents(store, receipts=False)
    return found


@pytest.mark.parametrize("threads", ["one_thread", "two_threads"])
@pytest.mark.parametrize(
    ("keys", "batch_tokens"), [("float32", 1), ("float32", 20), ("float32", 100), ("float32", 100_000), ("none", 1), ("none", 100_000)]
)
def test_neither_batch_size_nor_threads_change_a_byte(
    keys: str,
    batch_tokens: int,
    threads: str,
    corpus: Path,
    eager: HFLanguageModel,
    expected_exactly: dict[str, dict[str, bytes]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(threads)
    build(corpus, tmp_path / "store", eager, batch_tokens=batch_tokens, **{**SETTINGS, "keys": keys})
    assert expected_exactly[keys].keys() >= {"index/00000/index.faiss", "search/00000.json", "manifest.json"}
    # Receipts say how a shard was made; no fact of the store rests on them.
    assert differing(contents(tmp_path / "store", receipts=False), expected_exactly[keys]) == []


def test_a_receipt_says_how_a_shard_was_made(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    build(corpus, tmp_path / "store", gpt2, batch_tokens=100, **SETTINGS)
    said = json.loads((tmp_path / "store" / "shards" / "00001" / "receipt.json").read_bytes())
    assert (said["batch_tokens"], said["dtype"], said["device"]) == (100, "float32", "cpu")


def test_another_build_of_the_same_is_the_same_but_for_its_time(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    first, second = (build(corpus, tmp_path / name, gpt2, **SETTINGS).manifest for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    other = build(corpus, tmp_path / "third", gpt2, **{**SETTINGS, "keys": "float32"}).manifest
    assert other.fingerprint != first.fingerprint


def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """``call``, which ends the process at its ``at``-th use."""
    uses = itertools.count(1)

    def one(*arguments: Any, **options: Any) -> Any:
        if next(uses) == at:
            raise Killed
        return call(*arguments, **options)

    return one


def interrupt(corpus: Path, store: Path, gpt2: HFLanguageModel) -> None:
    with pytest.raises(Killed):
        build(corpus, store, gpt2, **SETTINGS)


@pytest.mark.parametrize("batches", [1, 2, 7, 15])
def test_killed_in_a_forward_pass(
    batches: int, corpus: Path, gpt2: HFLanguageModel, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "forward", dying(gpt2.forward, batches))
        interrupt(corpus, tmp_path / "store", gpt2)
    with pytest.raises(StoreIncomplete, match=r"incomplete.*again"):
        Datastore.open(tmp_path / "store")
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)
    assert differing(contents(tmp_path / "store"), expected) == []


def test_finished_shards_are_not_made_again(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a build that was killed within the last shard is that shard alone."""
    batches = 0

    def counting(*arguments: Any, **options: Any) -> ModelOutput:
        nonlocal batches
        batches += 1
        return HFLanguageModel.forward(gpt2, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "forward", counting)
        build(corpus, tmp_path / "whole", gpt2, **SETTINGS)
        whole, batches = batches, 0
        patch.setattr(gpt2, "forward", dying(gpt2.forward, whole))
        interrupt(corpus, tmp_path / "store", gpt2)
        shards = len(list((tmp_path / "store" / "shards").glob("*/receipt.json")))
        patch.setattr(gpt2, "forward", counting)
        batches = 0
        manifest = build(corpus, tmp_path / "store", gpt2, **SETTINGS).manifest
    assert shards == len(manifest.shards) - 1
    assert 0 < batches < whole / 2


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        pytest.param(ingest, "_record", 3, id="reading"),
        pytest.param(ingest, "write_atomically", 1, id="before the corpus receipt"),
        pytest.param(pipeline, "plan_shards", 1, id="before the first shard"),
        pytest.param(index_stage, "build_index", 1, id="before the index"),
        pytest.param(build_index, "train", 1, id="before training"),
        pytest.param(build_index, "fill_part", 3, id="before the third part of the index"),
        pytest.param(build_index, "merge_parts", 1, id="before the index is put together"),
        pytest.param(site.shutil, "copyfile", 1, id="before the document table"),
        pytest.param(search_stage, "write_search", 1, id="before search settings"),
        pytest.param(pipeline, "check_files", 1, id="before the manifest"),
    ],
)
def test_killed_between_stages(
    module: Any,
    name: str,
    at: int,
    corpus: Path,
    gpt2: HFLanguageModel,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(getattr(module, name), at))
        interrupt(corpus, tmp_path / "store", gpt2)
    assert not (tmp_path / "store" / "manifest.json").exists()
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)
    assert differing(contents(tmp_path / "store"), expected) == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_killed_while_the_index_is_trained_and_filled(
    steps: int, corpus: Path, gpt2: HFLanguageModel, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = index_stage.build_index

    def stopping(*arguments: Any, **options: Any) -> Iterator[tuple[str, int, int]]:
        yield from itertools.islice(real(*arguments, **options), steps)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(index_stage, "build_index", stopping)
        interrupt(corpus, tmp_path / "store", gpt2)
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)
    assert differing(contents(tmp_path / "store"), expected) == []


def test_killed_at_each_write_to_disk(
    corpus: Path, gpt2: HFLanguageModel, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build, ended at every flush to disk in turn (first the first, then the first two, …), ends in the same bytes."""
    store, real, done = tmp_path / "store", os.fsync, False
    for allowed in itertools.count():
        assert allowed < 200
        left = itertools.count(allowed, -1)

        def fsync(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Killed
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                build(corpus, store, gpt2, **SETTINGS)
                done = True
            except Killed:
                continue
        break
    assert done
    assert allowed > 5
    assert differing(contents(store), expected) == []


def test_a_complete_store_is_left_as_it_is(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert not build(corpus, store, gpt2, **SETTINGS).already_complete
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again = build(corpus, store, gpt2, **SETTINGS)
    assert again.already_complete
    assert again.manifest == Manifest.read(store)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "interrupted"])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"keys": "float32"}, "keys is 'float16' there and 'float32' now"),
        ({"index": "Flat"}, "index is 'IVF4,SQ8' there and 'Flat' now"),
        ({"max_length": 32}, "max_length is 16 there and 32 now"),
        ({"stride": 4}, "stride is 8 there and 4 now"),
        ({"eos": True}, "eos is False there and True now"),
        ({"bos": "yes"}, "bos is 'auto' there and 'yes' now"),
        ({"shard_tokens": 300}, "shard_tokens is 250 there and 300 now"),
        ({"split_documents": "^Story"}, "split_documents is None there and '^Story' now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(
    changed: dict[str, Any], named: str, complete: bool, corpus: Path, gpt2: HFLanguageModel, half_and_whole: dict[bool, Path]
) -> None:
    store = half_and_whole[complete]
    before = contents(store)
    with pytest.raises(StoreMismatch) as refused:
        build(corpus, store, gpt2, **{**SETTINGS, **changed})
    assert named in str(refused.value)
    assert str(store) in str(refused.value)
    assert contents(store) == before


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "interrupted"])
def test_other_input_or_model_is_refused(
    complete: bool, gpt2: HFLanguageModel, llama: HFLanguageModel, corpus: Path, half_and_whole: dict[bool, Path], tmp_path: Path
) -> None:
    other = text_folder(tmp_path / "stories", [*tiny_corpus(8), "", "b", *tiny_corpus(4, seed=9)])
    with pytest.raises(StoreMismatch, match=r"the text \(xxh3 of its content\) is '[0-9a-f]{32}' there and '[0-9a-f]{32}' now"):
        build(other, half_and_whole[complete], gpt2, **SETTINGS)
    with pytest.raises(StoreMismatch, match=r"model weights is '[0-9a-f]{32}' there and '[0-9a-f]{32}' now"):
        build(corpus, half_and_whole[complete], llama, **SETTINGS)


@pytest.fixture(scope="module")
def half_and_whole(corpus: Path, gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    stores = {complete: tmp_path_factory.mktemp("stores") / str(complete) for complete in (True, False)}
    build(corpus, stores[True], gpt2, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "forward", dying(gpt2.forward, 4))
        interrupt(corpus, stores[False], gpt2)
    return stores


def test_moved_input_with_the_same_content_is_the_same_corpus(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)
    moved = tmp_path / "elsewhere"
    moved.symlink_to(corpus, target_is_directory=True)
    assert build(moved, tmp_path / "store", gpt2, **SETTINGS).already_complete


def overflowing(gpt2: HFLanguageModel, value: float, at: int) -> Callable[..., ModelOutput]:
    """A forward pass in which the key of one token of the third batch is ``value``."""
    batches = itertools.count(1)

    def forward(*arguments: Any, **options: Any) -> ModelOutput:
        keys = HFLanguageModel.forward(gpt2, *arguments, **options).keys.clone()
        if next(batches) == 3:
            keys[0, at, 5] = value
        return ModelOutput(None, keys)

    return forward


@pytest.mark.parametrize(
    ("value", "keys", "problem"),
    [
        (70_000.0, "float16", "has a component of size 70000, which float16 can't hold; build with --keys float32"),
        (-65_504.5, "float16", "which float16 can't hold"),
        (float("nan"), "float16", "is not finite"),
        (float("inf"), "float32", "is not finite"),
        (float("nan"), "float32", "is not finite"),
    ],
)
def test_keys_that_cannot_be_stored_are_refused_with_document_and_position(
    value: float, keys: str, problem: str, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows of 8 tokens, stride 4, batches of one window; document 0 has two windows (blocks 0 and 1), so the third
    # batch is block 0 or 1 of another document: of all windows, those of 3 tokens come first, then those of 7.
    corpus = token_folder(tmp_path / "corpus", [list(range(1, 9)), list(range(11, 19)), list(range(21, 29))])
    monkeypatch.setattr(gpt2, "forward", overflowing(gpt2, value, at=1))
    with pytest.raises(NonFiniteKey) as refused:
        build(corpus, tmp_path / "store", gpt2, batch_tokens=1, keys=keys, index="exact", max_length=8, stride=4)
    assert "at token 1 of document '0002.npy'" in str(refused.value)
    assert problem in str(refused.value)


def test_the_largest_float16_is_stored(gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = token_folder(tmp_path / "corpus", [list(range(1, 9))] * 3)
    monkeypatch.setattr(gpt2, "forward", overflowing(gpt2, -65_504.0, at=1))
    build(corpus, tmp_path / "store", gpt2, batch_tokens=1, index="exact", max_length=8, stride=4)
    store = Datastore.open(tmp_path / "store")
    assert float(store.keys.slice(0, len(store)).min()) == -65_504.0


def test_after_a_float16_overflow_the_advice_can_be_followed(
    gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says --keys float32: with the same --store, a sentence says what to do about what lies there."""
    corpus = token_folder(tmp_path / "corpus", [list(range(1, 9))] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "forward", overflowing(gpt2, 1e6, at=1))
        with pytest.raises(NonFiniteKey):
            build(corpus, tmp_path / "store", gpt2, batch_tokens=1, index="exact", max_length=8, stride=4)
    with pytest.raises(StoreMismatch, match=r"unfinished.*remove"):
        build(corpus, tmp_path / "store", gpt2, batch_tokens=1, index="exact", max_length=8, stride=4, keys="float32")


@pytest.mark.parametrize("texts", [[], ["", ""], ["a"], ["", "a", ""]], ids=["no files", "empty files", "one token", "both"])
def test_a_corpus_without_entries_is_refused_and_leaves_the_store_usable(texts: list[str], gpt2: HFLanguageModel, tmp_path: Path) -> None:
    corpus = text_folder(tmp_path / "corpus", texts)
    with pytest.raises(CorpusError):
        build(corpus, tmp_path / "store", gpt2)
    (corpus / "more.txt").write_text("The farmer sold seven apples.")
    assert build(corpus, tmp_path / "store", gpt2).manifest.counts.entries > 0


def test_only_binary_files_are_named(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "picture.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(CorpusError, match="1 binary files were left out"):
        build(tmp_path / "corpus", tmp_path / "store", gpt2)


def test_empty_documents_are_counted(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    result = build(text_folder(tmp_path / "corpus", ["", "The farmer sold it.", "", "a"]), tmp_path / "store", gpt2)
    assert (result.empty, result.manifest.counts.documents) == (2, 2)


@pytest.mark.parametrize("name", ["notes.txt", "shards", ".hidden"])
def test_a_folder_with_other_things_in_it_is_refused(name: str, corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / name).write_text("mine")
    with pytest.raises(StoreError, match=f"not empty and no datastore.*{name}"):
        build(corpus, store, gpt2, **SETTINGS)
    assert contents(store) == {name: b"mine"}


def test_a_file_as_store_is_refused(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        build(corpus, tmp_path / "store", gpt2, **SETTINGS)


def test_an_empty_folder_as_store_is_taken(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert not build(corpus, tmp_path / "store", gpt2, **SETTINGS).already_complete


def test_an_impossible_index_is_refused_before_the_model_runs(
    corpus: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of encoding must not end in a typing error; and the store must then take the right one."""
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "forward", dying(gpt2.forward, 1))
        for wrong in ("IVFx,Flat", "PQ7x8", "IVF50000,Flat"):
            with pytest.raises(InvalidInput) as refused:
                build(corpus, tmp_path / "store", gpt2, **{**SETTINGS, "index": wrong})
            assert refused.value.field == "index"
            assert wrong in str(refused.value)
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"keys": "int8"}, "keys"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"max_length": 65}, "max_length"),
        ({"stride": 0}, "stride"),
        ({"split_documents": "("}, "split_documents"),
    ],
)
def test_settings_out_of_range_are_refused_by_field(
    settings: dict[str, Any], field: str, corpus: Path, gpt2: HFLanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput) as refused:
        build(corpus, tmp_path / "store", gpt2, **settings)
    assert refused.value.field == field
    assert not (tmp_path / "store" / ".build").exists()


@pytest.mark.parametrize("factory", ["Flat", "exact", "auto", "IVF4,Flat", "PCA8,IVF4,SQ8", "HNSW8,Flat"])
def test_any_index_finds_what_was_stored(factory: str, corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    from knnlm.index import open_index
    from knnlm.retrieval import Retriever

    build(corpus, tmp_path / "store", gpt2, index=factory, shard_tokens=250)
    store = Datastore.open(tmp_path / "store")
    entries = torch.arange(0, len(store), 7)
    assert store.keys is not None
    index = open_index(store.path / store.manifest.index, store.keys, len(store))
    found = Retriever(index, store.keys, store.values).retrieve(store.keys.gather(entries), 1)
    assert float(found.distances.max()) == 0
    # Equal contexts have equal keys, so the entry found may be an earlier one.
    assert torch.equal(store.keys.gather(found.ids[:, 0]), store.keys.gather(entries))
    assert torch.equal(found.tokens[:, 0], store.values.gather(found.ids[:, 0]).long())


def test_an_error_of_another_kind_is_not_taken_for_a_lock(
    corpus: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(*_arguments: Any, **_options: Any) -> ModelOutput:
        raise BlockingIOError("the disk")

    monkeypatch.setattr(gpt2, "forward", blocked)
    with pytest.raises(BlockingIOError, match="the disk"):
        build(corpus, tmp_path / "store", gpt2, **SETTINGS)


def test_a_damaged_settings_file_of_a_complete_store_is_named(corpus: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    build(corpus, tmp_path / "store", gpt2, **SETTINGS)
    path = tmp_path / "store" / "settings.json"
    path.write_bytes(path.read_bytes().replace(b'"stride"', b'"strode"'))
    with pytest.raises(KNNLMError, match=r"settings\.json is damaged"):
        build(corpus, tmp_path / "store", gpt2, **SETTINGS)

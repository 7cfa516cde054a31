"""Compaction: what is left is what a build of it gives, and of what was removed nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.datastore.manifest import FORMAT_VERSION, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import InvalidInput, StoreError
from knnlm.index import IndexFacts
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.retrieval import Retriever
from knnlm_index_builder import compaction
from knnlm_index_builder.index_stage import auto_again
from tests.changing import (
    Array,
    Held,
    append,
    built,
    compacted,
    documents_file,
    files_with,
    looking_everywhere,
    problems,
    require_provenance,
    search_all,
    table_of,
)
from tests.stores import build, contents, knnlm
from tests.tiny import tiny_corpus

TEXTS = {f"doc-{number}": text for number, text in enumerate(tiny_corpus(7))}
SETTINGS: dict[str, Any] = {"max_length": 16, "shard_tokens": 200}
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
GONE = ["doc-1", "doc-4", "doc-5"]


class Killed(Exception):
    """Stands for the end of the process."""


def less(texts: dict[str, str], gone: list[str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name not in gone}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of all documents, by index; not to be changed."""
    folder = tmp_path_factory.mktemp("bases")
    corpus = documents_file(folder / "corpus.jsonl", TEXTS, note="secret of {}")
    factories = ("Flat", "exact", "IVF4,SQ8")
    for number, factory in enumerate(factories):
        built(corpus, folder / str(number), index=factory, **SETTINGS)
    return {factory: folder / str(number) for number, factory in enumerate(factories)}


@pytest.fixture
def store(bases: dict[str, Path], tmp_path: Path) -> Path:
    """Of all documents, with a Flat index."""
    return Path(shutil.copytree(bases["Flat"], tmp_path / "store"))


def index_bytes(store: Path) -> bytes | None:
    path = store / Manifest.read(store).index / "index.faiss"
    return path.read_bytes() if path.exists() else None


def require_build_of(store: Path, expected: Path) -> None:
    """All that ``store`` holds is what ``expected`` holds, a build of the documents that are left."""
    Held.of(store).require_equal(Held.of(expected))
    assert index_bytes(store) == index_bytes(expected)
    assert table_of(store) == table_of(expected)
    found, wanted = Manifest.read(store), Manifest.read(expected)
    assert found.counts == wanted.counts
    ranges = [[(shard.token_start, shard.tokens, shard.entry_start, shard.entries) for shard in each.shards] for each in (found, wanted)]
    assert ranges[0] == ranges[1]
    assert (found.removed, found.key, found.windowing, found.text) == (None, wanted.key, wanted.windowing, wanted.text)


@pytest.mark.parametrize("factory", ["Flat", "exact", "IVF4,SQ8"])
def test_what_is_left_is_what_a_build_of_it_gives(factory: str, bases: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(bases[factory], tmp_path / "store"))
    remove_documents(store, GONE)
    removed = Manifest.read(store).removed
    assert removed is not None
    result = compacted(store)
    left = less(TEXTS, GONE)
    corpus = documents_file(tmp_path / "corpus.jsonl", left, note="secret of {}")
    built(corpus, tmp_path / "expected", index=factory, **SETTINGS)
    require_build_of(store, tmp_path / "expected")
    require_provenance(store, left)
    assert (result.documents, result.entries) == (3, removed.entries)
    assert result.bytes_freed > 0
    assert problems(store) == []
    assert Datastore.open(store).documents.serials.tolist() == [0, 2, 3, 6]
    assert Manifest.read(store).next_serial == 7


WORDS = st.sampled_from(["river", "mill", "König", "a", "boat", "昔々", "\n", "storm", "two", "horses"])
DOCUMENTS = st.lists(st.lists(WORDS, min_size=1, max_size=12).map(" ".join), min_size=3, max_size=6)


@settings(max_examples=8)
@given(
    texts=DOCUMENTS,
    later=st.lists(st.lists(WORDS, min_size=2, max_size=8).map(" ".join), min_size=1, max_size=2),
    gone=st.sets(st.integers(0, 7), min_size=1),
    shard_tokens=st.integers(1, 60),
    max_length=st.integers(4, 16),
)
def test_any_documents_shards_and_removals(
    texts: list[str], later: list[str], gone: set[int], shard_tokens: int, max_length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Build, append, remove, compact: the spans fit at each step, and the end is a build of what is left."""
    folder = tmp_path_factory.mktemp("any")
    old = {f"a-{number}": f"The {text} end" for number, text in enumerate(texts)}
    new = {f"b-{number}": f"New {text}" for number, text in enumerate(later)}
    options = {"index": "exact", "shard_tokens": shard_tokens, "max_length": max_length}
    store = folder / "store"
    built(documents_file(folder / "corpus.jsonl", old), store, **options)
    require_provenance(store, old)
    append(documents_file(folder / "later" / "corpus.jsonl", new), store)
    require_provenance(store, old | new)
    names = [name for number, name in enumerate(old | new) if number in gone] or ["a-0"]
    remove_documents(store, names[: len(old | new) - 1])
    left = less(old | new, names[: len(old | new) - 1])
    require_provenance(store, left)
    compacted(store)
    require_provenance(store, left)
    built(documents_file(folder / "left" / "corpus.jsonl", left), folder / "expected", **options)
    require_build_of(store, folder / "expected")
    assert problems(store) == []


def keys_of(store: Path, name: str) -> Array:
    """Stored keys of a document."""
    opened, keys = Datastore.open(store), Held.of(store).keys
    assert keys is not None
    (number,) = opened.documents.rows_of("id", [name])
    first, last = opened.documents.entry_range(int(number))
    return keys[first:last]


@pytest.mark.parametrize("factory", ["Flat", "exact", "IVF4,SQ8"])
def test_no_query_brings_a_removed_document_back(factory: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Asked with its own keys for all entries that there are."""
    store = Path(shutil.copytree(bases[factory], tmp_path / "store"))
    reader = Datastore.open(store)
    queries = np.concatenate([keys_of(store, name) for name in GONE])
    remove_documents(store, GONE)
    left = sum(len(keys_of(store, name)) for name in less(TEXTS, GONE))
    reader.refresh()
    readers = [(opened, looking_everywhere(opened)) for opened in (reader, Datastore.open(store))]
    for opened, retriever in readers:
        require_none_of(GONE, opened, retriever, queries, left)
    compacted(store)
    assert not reader.refresh()
    later = Datastore.open(store)
    for opened, retriever in (*readers, (later, looking_everywhere(later))):
        require_none_of(GONE, opened, retriever, queries, left)


def require_none_of(gone: list[str], opened: Datastore, retriever: Retriever, queries: Array, left: int) -> None:
    """Every entry of the other documents is found by each query, and none of ``gone``."""
    found = retriever.retrieve(torch.from_numpy(queries.astype(np.float32)), len(opened))
    assert found.found.sum(1).tolist() == [left] * len(queries)
    named = np.array([opened.documents[number].id for number in range(len(opened.documents))])
    of_entry = np.repeat(named, opened.documents.token_counts - 1)
    assert not set(of_entry[found.ids[found.found].numpy()].tolist()) & set(gone)


TWINS = {
    "kept": "The farmer sold seven apples near the river. A sailor described the long letter.\n",
    "gone": "The farmer sold seven apples near the river. Xylophone quizzes jinx vexed zebras by dawn!\n",
    "other": tiny_corpus(1, seed=4)[0],
}


@pytest.mark.parametrize(("factory", "keys"), [("Flat", "float32"), ("exact", "float16"), ("IVF2,SQ8", "float16"), ("IVF2,SQ8", "none")])
def test_of_a_removed_document_nothing_is_left_in_any_file(factory: str, keys: str, tmp_path: Path) -> None:
    """Its twin, which begins with the same sentence, keeps its own."""
    store = tmp_path / "store"
    corpus = documents_file(tmp_path / "corpus.jsonl", TWINS, license="licence of {}")
    built(corpus, store, index=factory, keys=keys, **SETTINGS)
    before, table = Held.of(store), Datastore.open(store).documents
    traces = traces_of(before, table.token_starts, table.token_counts)
    assert all(files_with(store, trace) for trace in traces)
    remove_documents(store, ["gone"], {"license": "licence of gone"})
    compacted(store)
    assert [trace for trace in traces if files_with(store, trace)] == []
    # Only the log says that there was such a document, by its id alone.
    assert files_with(store, b'"gone"') == ["audit.log"]
    for word in (b"licence of gone", b"Xylophone", b"zebras"):
        assert files_with(store, word) == []
    assert files_with(store, b"licence of kept")
    after = Held.of(store)
    count = int(table.token_counts[0])
    np.testing.assert_array_equal(after.tokens[:count], before.tokens[:count])
    if after.keys is not None and before.keys is not None:
        np.testing.assert_array_equal(after.keys[: count - 1], before.keys[: count - 1])
        found = search_all(Datastore.open(store), before.keys[: count - 1], 1)
        assert float(found.distances.max()) == pytest.approx(0, abs=1e-5)
    require_provenance(store, less(TWINS, ["gone"]))


def traces_of(held: Held, starts: Array, counts: Array) -> list[bytes]:
    """Rows of keys, and windows of tokens, as they are written, that only the second document has."""
    first, last = int(starts[1]), int(starts[1] + counts[1])
    others = np.delete(held.tokens, np.arange(first, last))
    windows = {held.tokens[at : at + 6].tobytes() for at in range(first, last - 5)}
    rows = set()
    if held.keys is not None:
        rows = {key.tobytes() for key in held.keys[first - 1 : last - 2]} - {
            key.tobytes() for key in np.delete(held.keys, np.arange(first - 1, last - 2), axis=0)
        }
        assert 10 < len(rows) < last - first - 1
    own = sorted(windows - {others[at : at + 6].tobytes() for at in range(len(others) - 5)})
    assert 10 < len(own) < len(windows)
    return [*own, *sorted(rows)]


def test_the_files_of_before_are_gone(store: Path) -> None:
    remove_documents(store, GONE)
    before = Manifest.read(store)
    assert (store / "removed").exists()
    compacted(store)
    after = Manifest.read(store)
    assert not (store / "removed").exists()
    assert not (store / ".build").exists()
    assert not {shard.name for shard in before.shards} & {shard.name for shard in after.shards}
    listed = {"manifest.json", "audit.log", *after.files}
    assert {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()} == listed
    assert not any(path.is_dir() and not any(path.iterdir()) for path in store.rglob("*"))


def test_a_second_one_has_nothing_to_do(store: Path) -> None:
    remove_documents(store, GONE)
    compacted(store)
    before = contents(store)
    assert compacted(store).manifest == Manifest.read(store)
    assert contents(store) == before


def test_an_index_of_another_kind_is_made_where_nothing_was_removed(store: Path, bases: dict[str, Path]) -> None:
    held = Held.of(store)
    result = compacted(store, "IVF4,SQ8")
    assert (result.documents, result.entries) == (0, 0)
    held.require_equal(Held.of(store))
    assert index_bytes(store) == index_bytes(bases["IVF4,SQ8"])
    assert problems(store) == []
    # It stays of that kind, though the store was built with another.
    remove_documents(store, GONE)
    compacted(store)
    assert json.loads((store / Manifest.read(store).index / "index.json").read_text())["factory"] == "IVF4,SQ8"


@pytest.mark.parametrize(
    ("was", "then", "entries", "wanted"),
    [
        ("Flat", 900, 60_000, "IVF490,SQ8"),
        ("IVF490,SQ8", 60_000, 900, "Flat"),
        ("IVF490,SQ8", 61_000, 900, None),
        ("exact", 900, 60_000, None),
    ],
)
def test_what_auto_chose_is_chosen_again(was: str, then: int, entries: int, wanted: str | None) -> None:
    facts = IndexFacts(was, 8, then, 0, 0, 0, None, trained_entries=then)
    assert auto_again(facts, entries) == wanted


def test_fewer_entries_than_cells_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    """With stored keys another index can be made; nothing is begun."""
    store = tmp_path / "store"
    built(documents_file(tmp_path / "c.jsonl", {"long": TEXTS["doc-0"], "short": "ab"}), store, index="IVF8,SQ8", **SETTINGS)
    remove_documents(store, ["long"])
    with pytest.raises(InvalidInput, match="has 8 cells, but there are only"):
        compacted(store)
    assert not (store / ".build").exists()
    compacted(store, "Flat")
    assert problems(store) == []


def test_everything_removed(store: Path) -> None:
    remove_documents(store, list(TEXTS))
    with pytest.raises(StoreError, match="nothing to keep"):
        compacted(store)
    assert not (store / ".build").exists()


def test_documents_without_entries_are_not_enough(tmp_path: Path) -> None:
    built(documents_file(tmp_path / "c.jsonl", {"long": TEXTS["doc-0"], "short": "a"}), tmp_path / "store", index="exact")
    remove_documents(tmp_path / "store", ["long"])
    with pytest.raises(StoreError, match="nothing to keep"):
        compacted(tmp_path / "store")


def killed(store: Path, index: str | None = None) -> None:
    """A compaction that ends before its index is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction.IndexStage, "build", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compacted(store, index)


@pytest.mark.parametrize("index", [None, "exact"])
def test_one_that_was_interrupted_begins_again_where_more_was_removed_or_another_index_is_wanted(index: str | None, store: Path) -> None:
    remove_documents(store, GONE[:2])
    killed(store)
    assert len(list(store.glob("shards/*"))) > len(Manifest.read(store).shards)
    if index is None:
        remove_documents(store, GONE[2:])
    compacted(store, index)
    gone = GONE if index is None else GONE[:2]
    assert [row["id"] for row in table_of(store)] == list(less(TEXTS, gone))
    require_provenance(store, less(TEXTS, gone))
    assert problems(store) == []


def test_one_that_was_interrupted_goes_on(store: Path) -> None:
    remove_documents(store, GONE)
    killed(store)
    done = {path: path.stat().st_ino for path in store.glob("shards/*/receipt.json")}
    compacted(store)
    kept = [path for path, inode in done.items() if path.exists() and path.stat().st_ino == inode]
    assert len(kept) == len(Manifest.read(store).shards)
    assert problems(store) == []


@pytest.mark.parametrize("name", ["store-exact", "store-sq8"])
def test_a_store_of_version_1(name: str, tmp_path: Path) -> None:
    store = Path(shutil.copytree(GOLDEN / name, tmp_path / "store"))
    rows = table_of(store)
    remove_documents(store, [rows[1]["id"]])
    compacted(store)
    assert json.loads((store / "manifest.json").read_text())["format_version"] == FORMAT_VERSION
    assert [row["id"] for row in table_of(store)] == [row["id"] for row in rows if row != rows[1]]
    assert Datastore.open(store).documents.serials.tolist() == [number for number in range(len(rows)) if number != 1]
    assert not (store / "documents.arrow").exists()
    assert not (store / "index" / "index.json").exists()
    assert problems(store) == []
    opened = open_store(store, model=str(GOLDEN / "model"), verify=True)
    assert int(opened.next_token("The farmer sold").neighbors.ids.min()) >= 0


@pytest.fixture
def opened(gpt2: HFLanguageModel, tmp_path: Path) -> OpenedKNNLM:
    build(documents_file(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "store", gpt2, index="IVF4,SQ8", **SETTINGS)
    return open_store(tmp_path / "store", k=8)


def test_a_reader_that_was_open_keeps_its_files_and_loses_what_was_removed(opened: OpenedKNNLM) -> None:
    prompt, path = TEXTS["doc-4"][:40], opened.store.path

    def named(lm: OpenedKNNLM) -> list[str]:
        return [lm.store.evidence(entry).document.id for entry in lm.next_token(prompt).neighbors.ids[0].tolist()]

    assert "doc-4" in named(opened)
    remove_documents(path, GONE)
    compacted(path)
    # It has not looked yet, and its files are still there for it.
    assert "doc-4" in named(opened)
    assert opened.store.refresh()
    assert not set(named(opened)) & set(GONE)
    later = open_store(path, k=8)
    assert named(later) == named(opened)
    one, other = opened.next_token(prompt), later.next_token(prompt)
    assert one.neighbors.distances[0].tolist() == other.neighbors.distances[0].tolist()
    assert Mixture(k=8) == later.knn_lm.mixture


def test_the_command(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*flags: str, status: int = 0) -> tuple[str, str]:
        assert knnlm("compact", store, *flags) == status
        captured = capsys.readouterr()
        return captured.out, " ".join(captured.err.split())

    assert "nothing is removed from" in said()[1]
    removal = remove_documents(store, GONE)
    out, err = said("--json")
    assert f"3 removed documents with {removal.entries} entries left the disk; " in err
    facts = json.loads(out)
    assert (facts["counts"]["documents"], facts["removed"]) == (4, {"documents": 0, "entries": 0})
    assert [json.loads(line)["operation"] for line in (store / "audit.log").read_text().splitlines()] == ["remove", "compact"]
    out, err = said("--index", "exact")
    assert "was made anew" in err
    assert "exact" in out
    assert "--index" in said("--index", "IVFx", status=2)[1]
    assert not (store / ".build").exists()
    remove_documents(store, list(less(TEXTS, GONE)))
    assert "nothing to keep" in said(status=1)[1]

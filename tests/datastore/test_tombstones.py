"""Tombstones: which entries go with removed documents, and what an open datastore takes over from the one on disk."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.documents import DocumentRecord, DocumentTable, DocumentWriter
from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.manifest import MANIFEST, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.datastore.tombstones import Tombstones, read_serials, write_serials
from knnlm.errors import InvalidInput, StoreDamaged, StoreError, StoreNotFound


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=12), st.data())
def test_the_mask_leaves_out_the_entries_of_removed_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Documents of some tokens each (one token: no entry), with gaps between serials."""
    serials = np.cumsum([gap for _, gap in lengths])
    path = tmp_path_factory.mktemp("table") / "documents.arrow"
    writer, start, owner = DocumentWriter(path), 0, []
    for row, (tokens, _) in enumerate(lengths):
        writer.add(DocumentRecord(f"{row}", "", start, tokens, 0, [], {}, int(serials[row])))
        start += tokens
        owner += [row] * (tokens - 1)
    writer.close()
    rows = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(lengths)))))), dtype=np.int64)
    # Serials that no document has any more mean nothing.
    found = Tombstones(DocumentTable([path]), len(owner), np.union1d(serials[rows], [10_000]))
    assert found.documents.tolist() == rows.tolist()
    assert found.serials.tolist() == serials[rows].tolist()
    if not len(rows):
        assert found.mask is None
    else:
        assert found.mask is not None
        kept = ~np.isin(owner, rows) if owner else np.zeros(0, bool)
        assert found.mask.rows(0, len(owner)).tolist() == kept.tolist()


def test_serials_are_read_as_written(tmp_path: Path) -> None:
    write_serials(tmp_path / "serials.npy", np.array([0, 3, 1 << 40]))
    assert read_serials(tmp_path / "serials.npy").tolist() == [0, 3, 1 << 40]
    assert [path.name for path in tmp_path.iterdir()] == ["serials.npy"]


@pytest.mark.parametrize(
    "array", [np.array([3, 1]), np.array([1, 1]), np.array([1.0]), np.array([1], dtype=np.int32), np.array([[1]])], ids=str
)
def test_anything_but_ascending_numbers_is_damage(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "serials.npy", array)
    with pytest.raises(StoreDamaged, match=r"serials\.npy is damaged"):
        read_serials(tmp_path / "serials.npy")


def test_a_file_that_is_no_array_is_damage(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    for kept in (b"", b"text", content.getvalue()[:-1], content.getvalue()[:50]):
        (tmp_path / "serials.npy").write_bytes(kept)
        with pytest.raises(StoreDamaged, match=r"serials\.npy"):
            read_serials(tmp_path / "serials.npy")


def allowed_documents(store: Datastore) -> list[str]:
    mask = store.allowed()
    rows = [store.documents.of_entry(entry) for entry in range(len(store)) if mask is None or not store.is_removed(entry)]
    return [store.documents[row].id for row in dict.fromkeys(rows)]


ALL = [f"doc-{number}" for number in range(12)]


def test_an_open_store_takes_removals_over_when_it_is_refreshed(store: Path) -> None:
    opened = Datastore.open(store)
    assert not opened.refresh()
    assert opened.allowed() is None
    remove_documents(store, ["doc-3"])
    assert opened.allowed() is None
    assert opened.refresh()
    assert not opened.refresh()
    remove_documents(store, ["doc-0", "doc-11"])
    assert opened.refresh()
    left = [name for name in ALL if name not in ("doc-0", "doc-3", "doc-11")]
    assert allowed_documents(opened) == allowed_documents(Datastore.open(store)) == left


def test_a_removed_entry_gives_no_evidence(store: Path) -> None:
    opened = Datastore.open(store)
    first, last = opened.documents.entry_range(3)
    assert opened.evidence(first).document.id == "doc-3"
    remove_documents(store, ["doc-3"])
    for found in (opened, Datastore.open(store)):
        found.refresh()
        for entry in (first, last - 1):
            assert found.is_removed(entry)
            with pytest.raises(InvalidInput, match=f"entry: is {entry}, whose document was removed"):
                found.evidence(entry)
        assert found.evidence(first - 1).document.id == "doc-2"
        assert found.evidence(last).document.id == "doc-4"
        with pytest.raises(InvalidInput, match="has entries 0 to"):
            found.is_removed(len(found))


def compacted(store: Path, without: set[str], extra: int = 0) -> None:
    """Put another table in the place of the store's: fewer documents under the serials that they had, and ``extra`` new ones."""
    manifest = Manifest.read(store)
    table = DocumentTable([store / name for name in manifest.documents])
    records = [table[row] for row in range(len(table)) if table[row].id not in without]
    following = manifest.next_serial
    records += [DocumentRecord(f"new-{n}", "", 0, 5, 0, [], {}, following + n) for n in range(extra)]
    (old,) = manifest.documents
    new = f"documents/{int(Path(old).stem) + 1:05}.arrow"
    writer = DocumentWriter(store / new)
    for record in records:
        writer.add(record)
    writer.close()
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"]
    content["counts"] |= {"documents": len(records), "tokens": sum(record.tokens for record in records)}
    content["files"] = {name: facts for name, facts in content["files"].items() if not name.startswith(("documents/", "removed/"))}
    write_json_with_checksum(store / MANIFEST, {**content, "documents": [new], "removed": None})
    (store / old).unlink()


@pytest.mark.parametrize("extra", [0, 3], ids=["compacted", "compacted and appended"])
def test_documents_that_another_store_lacks_in_its_place_are_gone(extra: int, store: Path) -> None:
    """A removal, and a compaction that left the tombstones behind before anybody looked: serials tell."""
    opened = Datastore.open(store)
    remove_documents(store, ["doc-2"])
    assert opened.refresh()
    remove_documents(store, ["doc-5"])
    compacted(store, {"doc-2", "doc-5"}, extra)
    assert opened.refresh()
    assert allowed_documents(opened) == [name for name in ALL if name not in ("doc-2", "doc-5")]
    compacted(store, {"doc-9"})
    assert opened.refresh()
    assert allowed_documents(opened) == [name for name in ALL if name not in ("doc-2", "doc-5", "doc-9")]


def test_a_store_that_is_gone_or_damaged_is_said_and_what_is_open_stays(store: Path) -> None:
    opened = Datastore.open(store)
    remove_documents(store, ["doc-2"])
    opened.refresh()
    before = allowed_documents(opened)
    manifest = (store / MANIFEST).read_bytes()
    (store / MANIFEST).write_bytes(manifest[:-10])
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=r"manifest\.json is damaged"):
            opened.refresh()
    shutil.move(store, store.with_name("elsewhere"))
    with pytest.raises(StoreNotFound):
        opened.refresh()
    assert allowed_documents(opened) == before
    shutil.move(store.with_name("elsewhere"), store)
    (store / MANIFEST).write_bytes(manifest)
    remove_documents(store, ["doc-1"])
    assert opened.refresh()
    assert "doc-1" not in allowed_documents(opened)


def test_a_tombstone_file_that_vanishes_while_it_is_read_is_looked_for_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the manifest and the file that it names, another removal puts the next one in its place."""
    from knnlm.datastore import reader

    opened = Datastore.open(store)
    remove_documents(store, ["doc-2"])
    real, others = reader.read_serials, iter(["doc-7"])

    def overtaken(path: Path) -> np.ndarray:
        for name in others:
            remove_documents(store, [name])
        return real(path)

    monkeypatch.setattr(reader, "read_serials", overtaken)
    assert opened.refresh()
    assert allowed_documents(opened) == [name for name in ALL if name not in ("doc-2", "doc-7")]


def test_a_damaged_tombstone_file_is_an_error_on_opening(store: Path) -> None:
    remove_documents(store, ["doc-2"])
    (path,) = (store / "removed").iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"removed/00000\.npy"):
        Datastore.open(store)

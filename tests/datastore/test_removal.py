"""Removal: who is meant, what it writes, what a crash leaves, and that no search finds what was removed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.documents import SCHEMA_1, DocumentRecord, DocumentTable, DocumentWriter
from knnlm.datastore.files import file_facts, write_json_with_checksum
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import MANIFEST, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import Removal, remove_documents
from knnlm.datastore.selection import matching_rows
from knnlm.errors import DocumentNotFound, InvalidInput, StoreDamaged, StoreError, StoreIncomplete, StoreLocked, StoreNotFound
from knnlm.mixture import Mixture
from knnlm.opening import open_store
from tests.datastore.conftest import DOCUMENTS
from tests.stores import contents, environment, knnlm
from tests.tiny import tiny_corpus

ALL = [f"doc-{number}" for number in range(DOCUMENTS)]
EVERYTHING: dict[str, str] = {"metadata.source": "web"}


class Killed(Exception):
    """Stands for the end of the process."""


def live(store: Path) -> list[str]:
    opened = Datastore.open(store, verify=True)
    gone = set(opened.tombstones.documents.tolist())
    return [opened.documents[row].id for row in range(len(opened.documents)) if row not in gone]


def less(*names: str) -> list[str]:
    return [name for name in ALL if name not in names]


def log_lines(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / "audit.log").read_text().splitlines()]


def entries_of(store: Path, *names: str) -> int:
    opened = Datastore.open(store)
    return sum(int(np.diff(opened.documents.entry_range(ALL.index(name)))[0]) for name in names)


def test_a_removal_says_what_it_came_to(store: Path) -> None:
    total = Manifest.read(store).counts.entries
    first, second = entries_of(store, "doc-3", "doc-8"), entries_of(store, "doc-4")
    assert remove_documents(store, ["doc-8", "doc-3"]) == Removal(["doc-3", "doc-8"], [], first, 10, total - first)
    assert live(store) == less("doc-3", "doc-8")
    again = remove_documents(store, ["doc-4", "doc-3"])
    assert again == Removal(["doc-4"], ["doc-3"], second, 9, total - first - second)
    assert live(store) == less("doc-3", "doc-4", "doc-8")


def test_what_is_on_disk_after_it(store: Path) -> None:
    before = Manifest.read(store)
    remove_documents(store, ["doc-3"])
    remove_documents(store, ["doc-0", "doc-1"])
    after = Manifest.read(store)
    # Only the tombstones of the last one are left, and they are those of all.
    assert [path.name for path in (store / "removed").iterdir()] == ["00001.npy"]
    assert np.load(store / "removed" / "00001.npy").tolist() == [0, 1, 3]
    assert after.removed is not None
    assert (after.removed.file, after.removed.documents) == ("removed/00001.npy", 3)
    assert after.removed.entries == entries_of(store, "doc-0", "doc-1", "doc-3")
    assert set(after.files) == {*before.files, "removed/00001.npy"}
    assert after.counts == before.counts
    assert after.live_documents == DOCUMENTS - 3
    assert after.created == before.created
    assert len({before.fingerprint, after.fingerprint}) == 2
    assert set(contents(store)) == {*after.files, MANIFEST, "audit.log"}


def test_the_log_says_who_and_when_but_no_metadata(store: Path) -> None:
    fingerprint = Manifest.read(store).fingerprint
    remove_documents(store, ["doc-3"])
    remove_documents(store, where={"license": "CC-BY", "source": "one.jsonl"})
    first, second = log_lines(store)
    assert first["operation"] == second["operation"] == "remove"
    assert (first["documents"], first["where"], first["fingerprint_before"]) == (["doc-3"], [], fingerprint)
    assert (second["documents"], second["where"]) == (["doc-1", "doc-5", "doc-7"], ["license", "source"])
    assert second["entries"] == entries_of(store, "doc-1", "doc-5", "doc-7")
    assert second["time"] > first["time"]
    text = (store / "audit.log").read_text()
    assert "CC-BY" not in text
    assert "one.jsonl" not in text


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"id": "doc-5"}, [5]),
        ({"source": "two.jsonl"}, [8, 9, 10, 11]),
        ({"metadata.source": "web", "id": "doc-2"}, [2]),
        ({"license": "MIT", "source": "two.jsonl"}, [8, 10]),
        ({"year": "2001"}, [4, 5, 6, 7]),
        ({"checked": "true"}, [9, 10, 11]),
        ({"tags": '["a", 6]'}, [6]),
        ({"source": "web"}, []),
        ({"nothing": "x"}, []),
        ({"checked": "True"}, []),
        ({"license": "MIT", "year": "1999"}, []),
        ({"license": "mit"}, []),
    ],
    ids=str,
)
def test_conditions_choose_documents(where: dict[str, str], expected: list[int], store: Path) -> None:
    if not expected:
        with pytest.raises(DocumentNotFound, match="There is no document for which " + "|".join(where)):
            remove_documents(store, where=where)
        assert live(store) == ALL
        return
    assert remove_documents(store, where=where).removed == [f"doc-{number}" for number in expected]
    assert live(store) == less(*(f"doc-{number}" for number in expected))


FIELDS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y", 1, 1.5, True, None, [1], {"k": "é"}]), max_size=3)
CONDITIONS = st.dictionaries(
    st.sampled_from(["a", "b", "metadata.c", "id", "source"]),
    st.sampled_from(["x", "y", "1", "1.5", "true", "null", "[1]", '{"k": "é"}', "0", "s0"]),
    max_size=3,
)


@given(st.lists(FIELDS, min_size=1, max_size=8), CONDITIONS)
def test_conditions_are_compared_as_strings_field_by_field(
    tmp_path_factory: pytest.TempPathFactory, fields: list[dict[str, Any]], where: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("table") / "documents.arrow"
    writer = DocumentWriter(path, batch=3)
    for row, metadata in enumerate(fields):
        writer.add(DocumentRecord(str(row), f"s{row % 2}", row, 1, 0, [], metadata, row))
    writer.close()

    def meets(row: int, name: str, value: str) -> bool:
        if name in ("id", "source"):
            return value == {"id": str(row), "source": f"s{row % 2}"}[name]
        name = name.removeprefix("metadata.")
        found = fields[row].get(name, ...)
        return found is not ... and value == (found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))

    expected = [row for row in range(len(fields)) if all(meets(row, *condition) for condition in where.items())]
    assert matching_rows(DocumentTable([path]), where).tolist() == expected


def test_ids_that_do_not_meet_the_conditions_are_named_and_nothing_is_removed(store: Path) -> None:
    assert remove_documents(store, ["doc-1", "doc-3"], {"license": "CC-BY"}).removed == ["doc-1", "doc-3"]
    before = contents(store)
    with pytest.raises(
        DocumentNotFound, match=r"Nothing was removed, since license=CC-BY does not hold for the document: 'doc-4'\."
    ) as refused:
        remove_documents(store, ["doc-4", "doc-5"], {"license": "CC-BY"})
    assert "doc-5" not in str(refused.value)
    assert contents(store) == before


def test_unknown_ids_are_named_and_nothing_is_removed(store: Path) -> None:
    before = contents(store)
    with pytest.raises(DocumentNotFound, match=r"no document of this id: 'doc-99'\."):
        remove_documents(store, ["doc-1", "doc-99"])
    many = [f"no-{n}" for n in range(1005)]
    with pytest.raises(DocumentNotFound, match=r"'no-0', 'no-1', 'no-2', 'no-3', 'no-4' and 1,000 more\."):
        remove_documents(store, [*many, "doc-1"])
    assert contents(store) == before


def test_a_removal_that_says_of_nothing_is_refused(store: Path) -> None:
    with pytest.raises(InvalidInput, match="must name what to remove") as refused:
        remove_documents(store)
    assert refused.value.field == "document"


def test_what_is_removed_already_changes_nothing(store: Path) -> None:
    remove_documents(store, ["doc-3", "doc-5"])
    before = contents(store)
    again = remove_documents(store, ["doc-5", "doc-3", "doc-3"])
    assert (again.removed, again.already_removed, again.entries) == ([], ["doc-3", "doc-5"], 0)
    assert contents(store) == before
    # A filter that is run again finds what it removed.
    assert remove_documents(store, where={"id": "doc-3"}).already_removed == ["doc-3"]
    assert contents(store) == before


def test_a_dry_run_says_the_same_and_changes_nothing(store: Path) -> None:
    remove_documents(store, ["doc-2"])
    before = contents(store)
    dry = remove_documents(store, where={"license": "MIT"}, dry_run=True)
    assert contents(store) == before
    assert dry == remove_documents(store, where={"license": "MIT"})
    assert dry.already_removed == ["doc-2"]


def test_a_new_document_may_have_the_id_of_a_removed_one(store: Path) -> None:
    """As after a removal and an append: the one that is there is meant."""
    remove_documents(store, ["doc-11"])
    manifest = Manifest.read(store)
    table = DocumentTable([store / name for name in manifest.documents])
    writer = DocumentWriter(store / "documents" / "two.arrow")
    for row in range(DOCUMENTS):
        writer.add(table[row] if row != 3 else DocumentRecord(**{**table[row].__dict__, "id": "doc-11"}))
    writer.close()
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"]
    write_json_with_checksum(store / MANIFEST, {**content, "documents": ["documents/two.arrow"]})
    gone = remove_documents(store, ["doc-11"])
    assert (gone.removed, gone.already_removed) == (["doc-11"], [])
    assert np.load(store / "removed" / "00001.npy").tolist() == [3, 11]
    assert remove_documents(store, ["doc-11"]).already_removed == ["doc-11"]


def test_a_removal_lets_what_was_appended_be_appended_again(store: Path) -> None:
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"]
    write_json_with_checksum(store / MANIFEST, {**content, "appended": ["0" * 32]})
    remove_documents(store, ["doc-1"])
    assert Manifest.read(store).appended == []


def test_a_store_of_version_1_becomes_one_of_version_2(store: Path) -> None:
    """Its table has no serials; they are the numbers of its rows."""
    path = store / "documents" / "00000.arrow"
    table = pa.ipc.open_file(path).read_all().select(SCHEMA_1.names)
    with pa.OSFile(str(store / "documents.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA_1) as writer:
        writer.write_table(table)
    shutil.rmtree(path.parent)
    content = json.loads((store / MANIFEST).read_bytes())
    for name in ("checksum", "next_serial", "search", "removed", "audit", "appended"):
        del content[name]
    files = {name: facts for name, facts in content["files"].items() if "receipt" not in name and "arrow" not in name}
    files["documents.arrow"] = file_facts(store / "documents.arrow").__dict__
    write_json_with_checksum(store / MANIFEST, {**content, "format_version": 1, "documents": "documents.arrow", "files": files})
    assert knnlm("verify", store) == 0
    remove_documents(store, ["doc-2", "doc-7"])
    content = json.loads((store / MANIFEST).read_bytes())
    assert (content["format_version"], content["documents"], content["next_serial"]) == (2, ["documents.arrow"], DOCUMENTS)
    assert live(store) == less("doc-2", "doc-7")
    assert knnlm("verify", store) == 0


def test_removing_everything_leaves_the_base_lm(store: Path) -> None:
    lone = open_store(store)
    with_neighbours = lone.next_token("The farmer", Mixture(8, 10.0, 0.5))
    base = lone.next_token("The farmer", Mixture(8, 10.0, 0.0))
    gone = remove_documents(store, where=EVERYTHING)
    assert (gone.documents_left, gone.entries_left) == (0, 0)
    for opened in (lone, open_store(store)):
        opened.store.refresh()
        found = opened.next_token("The farmer", Mixture(8, 10.0, 0.5))
        assert (found.log_probs == base.log_probs).all()
        assert not found.neighbors.found.any()
    assert (with_neighbours.log_probs != base.log_probs).any()


def test_no_search_finds_what_was_removed(store: Path) -> None:
    """Nor do k neighbours become fewer: asked with the very texts of the documents."""
    names = ["doc-0", "doc-6", "doc-7"]
    before = open_store(store)
    remove_documents(store, names)
    after = open_store(store)
    before.store.refresh()
    for text in tiny_corpus(DOCUMENTS):
        for opened in (before, after):
            neighbors = opened.next_token(text[:40], Mixture(32, 10.0, 0.5)).neighbors
            assert neighbors.found.sum() == 32
            found = {opened.store.evidence(entry).document.id for entry in neighbors.ids[0].tolist()}
            assert not found & set(names)


# A crash


def dying_at(number: int, real: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    uses = itertools.count()

    def call(*arguments: Any, **options: Any) -> Any:
        if next(uses) != number:
            return real(*arguments, **options)
        if after:
            real(*arguments, **options)
        raise Killed

    return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
@pytest.mark.parametrize("first", [True, False], ids=["first removal", "second removal"])
def test_ended_at_any_write_it_is_done_or_not_and_the_same_call_finishes_it(
    name: str, after: bool, first: bool, documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(documented, tmp_path / "whole"))
    before = ALL
    if not first:
        remove_documents(whole, ["doc-1"])
        before = less("doc-1")
    reached = 0
    for number in range(50):
        store = Path(shutil.copytree(whole, tmp_path / f"store-{number}"))
        with monkeypatch.context() as patch:
            patch.setattr(os, name, dying_at(number, getattr(os, name), after=after))
            try:
                remove_documents(store, ["doc-4", "doc-5"])
            except Killed:
                reached += 1
            else:
                break
        assert live(store) in (before, [n for n in before if n not in ("doc-4", "doc-5")])
        again = remove_documents(store, ["doc-4", "doc-5"])
        assert sorted([*again.removed, *again.already_removed]) == ["doc-4", "doc-5"]
        assert live(store) == [n for n in before if n not in ("doc-4", "doc-5")]
        assert knnlm("verify", store) == 0
        shutil.rmtree(store)
    # Folders, tombstones, log and manifest; two files are renamed; only a second removal has one to delete.
    assert reached == {"fsync": 8 if first else 7, "replace": 2, "unlink": 0 if first else 1}[name]


def test_a_line_of_the_log_that_was_cut_does_not_swallow_the_next(store: Path) -> None:
    remove_documents(store, ["doc-1"])
    with (store / "audit.log").open("a") as log:
        log.write('{"time": "20')
    remove_documents(store, ["doc-2"])
    lines = (store / "audit.log").read_text().split("\n")
    assert [json.loads(lines[place])["documents"] for place in (0, 2)] == [["doc-1"], ["doc-2"]]
    assert lines[1] == '{"time": "20'
    assert live(store) == less("doc-1", "doc-2")


@pytest.mark.parametrize("change", [lambda log: log[:-1], lambda log: b"", lambda log: log.replace(b"doc-1", b"doc-2")])
def test_the_log_is_never_rewritten(change: Callable[[bytes], bytes], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_documents(store, ["doc-1"])
    log = store / "audit.log"
    content = log.read_bytes()
    log.write_bytes(change(content))
    with pytest.raises(StoreDamaged, match=r"audit\.log"):
        Datastore.open(store, verify=True)
    assert knnlm("verify", store, "--json") == 1
    assert "audit.log" in json.loads(capsys.readouterr().out)["problems"][0]
    if len(log.read_bytes()) < len(content):
        with pytest.raises(StoreDamaged, match=r"audit\.log"):
            remove_documents(store, ["doc-2"])


# Refusals


def test_one_writer_at_a_time(store: Path) -> None:
    with locked(store), pytest.raises(StoreLocked, match="is writing"):
        remove_documents(store, ["doc-1"])
    assert live(store) == ALL


def test_an_unfinished_build_is_refused(store: Path, tmp_path: Path) -> None:
    (store / MANIFEST).unlink()
    with pytest.raises(StoreNotFound, match="is no datastore"):
        remove_documents(store, ["doc-1"])
    (store / ".build").mkdir()
    with pytest.raises(StoreIncomplete, match="incomplete"):
        remove_documents(store, ["doc-1"])
    for path in (tmp_path / "nowhere", store / "settings.json"):
        with pytest.raises(StoreNotFound, match="There is no datastore at"):
            remove_documents(path, ["doc-1"])


@pytest.mark.parametrize("number", [28, 30])
def test_a_folder_that_can_not_be_written_is_one_sentence(number: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk (28), a read-only file system (30)."""
    before = contents(store)
    real = Path.open

    def refusing(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "r" not in mode:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refusing)
        with pytest.raises(StoreError, match=rf"removed/00000\.npy\.tmp can't be written \({os.strerror(number)}\)"):
            remove_documents(store, ["doc-1"])
    assert contents(store) == before
    assert remove_documents(store, ["doc-1"]).removed == ["doc-1"]


# The command


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], tuple[str, str]]]:
    def read() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return read  # type: ignore[return-value]


def test_the_command_says_what_it_did(store: Path, said: Callable[[], tuple[str, str]]) -> None:
    gone, total = entries_of(store, "doc-1", "doc-2"), Manifest.read(store).counts.entries
    assert knnlm("remove", store, "--document", "doc-1", "--document", "doc-2", "--dry-run") == 0
    out, err = said()
    assert out.splitlines() == [
        f"{store}: 2 documents with {gone:,} entries would be removed; 10 documents with {total - gone:,} entries left",
        "would be removed: doc-1",
        "would be removed: doc-2",
    ]
    assert err == ""
    assert live(store) == ALL
    assert knnlm("remove", store, "--document", "doc-1", "--document", "doc-2") == 0
    assert said()[0].splitlines()[0].endswith(f"entries removed; 10 documents with {total - gone:,} entries left")
    assert knnlm("remove", store, "--document", "doc-1") == 0
    assert said()[0].splitlines() == [
        f"{store}: nothing to remove; 10 documents with {total - gone:,} entries left",
        "already removed: doc-1",
    ]
    assert knnlm("remove", store, "--where", "license=MIT", "--where", "year=2000", "--json") == 0
    found = json.loads(said()[0])
    assert (found["removed"], found["already_removed"], found["dry_run"]) == (["doc-0"], ["doc-2"], False)
    assert live(store) == less("doc-0", "doc-1", "doc-2")


def test_the_command_warns_when_nothing_is_left(store: Path, said: Callable[[], tuple[str, str]]) -> None:
    assert knnlm("remove", store, "--where", "metadata.source=web") == 0
    out, err = said()
    assert "0 documents with 0 entries left" in out
    assert err.startswith("warning: no document is left")
    assert knnlm("inspect", store) == 0
    assert knnlm("verify", store) == 0


def test_ids_come_from_a_file_or_standard_input(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(b"doc-1\r\n\ndoc-2\ndoc-2")
    assert knnlm("remove", store, "--ids-from", tmp_path / "ids.txt", "--document", "doc-3") == 0
    assert live(store) == less("doc-1", "doc-2", "doc-3")
    (tmp_path / "bare").write_text("doc-9")
    assert knnlm("remove", store, "--ids-from", tmp_path / "bare") == 0
    assert live(store) == less("doc-1", "doc-2", "doc-3", "doc-9")


@pytest.mark.parametrize(
    ("line", "status", "sentence"),
    [
        ((), 2, "error: --document must name what to remove, unless --where or --ids-from does."),
        (("--document", "doc-77"), 1, "error: The datastore holds no document of this id: 'doc-77'."),
        (("--where", "license=GPL"), 1, "error: There is no document for which license=GPL holds."),
        (("--where", "license"), 2, "error: --where is 'license', but must be FIELD=VALUE."),
        (("--where", "=x"), 2, "error: --where is '=x', but must be FIELD=VALUE."),
        (
            ("--where", "a=1", "--where", "a=2"),
            2,
            "error: --where names a twice, but a document has one value of it, and all conditions must hold.",
        ),
        (("--ids-from", "EMPTY"), 2, "error: --ids-from is EMPTY, which holds no id."),
        (("--ids-from", "BINARY"), 2, "error: --ids-from is BINARY, which is not UTF-8 at byte 1."),
        (("--ids-from", "NOWHERE"), 1, "error: NOWHERE: No such file or directory."),
        (("--document", "\udcff"), 2, "error: --document is '\\udcff', which is no text in UTF-8."),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_can_not_be_removed_is_one_sentence(
    line: tuple[str, ...], status: int, sentence: str, store: Path, tmp_path: Path, said: Callable[[], tuple[str, str]]
) -> None:
    names = {name: str(tmp_path / name) for name in ("EMPTY", "BINARY", "NOWHERE")}
    (tmp_path / "EMPTY").write_text("\n\n")
    (tmp_path / "BINARY").write_bytes(b"a\xff")
    before = contents(store)
    assert knnlm("remove", store, *(names.get(word, word) for word in line)) == status
    for name, path in names.items():
        sentence = sentence.replace(name, path)
    assert said() == ("", sentence + "\n")
    assert contents(store) == before


def test_the_command_in_a_process_of_its_own_reads_standard_input(store: Path) -> None:
    line = [sys.executable, "-m", "knnlm", "remove", str(store), "--ids-from", "-", "--json"]
    piped = subprocess.run(line, input="doc-4\n", capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert json.loads(piped.stdout)["removed"] == ["doc-4"]
    assert live(store) == less("doc-4")

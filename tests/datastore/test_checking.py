"""``verify``: what files say against one another, files that are no part of the store, and no crash on any damage."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm import inspection
from knnlm.datastore.documents import DocumentTable, DocumentWriter
from knnlm.datastore.files import file_facts, write_json_with_checksum
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import MANIFEST, Manifest
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import StoreDamaged, StoreError
from knnlm.mixture import Mixture
from tests.stores import knnlm

TABLE = "documents/00000.arrow"


def change_manifest(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest with other content and a checksum that fits."""
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"]
    change(content)
    write_json_with_checksum(store / MANIFEST, content)


def listed_again(store: Path, *names: str) -> None:
    """The manifest (and receipts) say of these files what they are now."""
    for name in names:
        facts = file_facts(store / name).__dict__
        change_manifest(store, lambda content, name=name, facts=facts: content["files"].update({name: facts}))  # type: ignore[misc]
        receipt = store / Path(name).parent / "receipt.json"
        if name.startswith("shards/") and receipt.exists() and Path(name).name != "receipt.json":
            content = json.loads(receipt.read_bytes())
            del content["checksum"]
            content["files"][Path(name).name] = facts
            write_json_with_checksum(receipt, content)
            listed_again(store, receipt.relative_to(store).as_posix())


def change_array(store: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    array = np.load(store / name)
    change(array)
    np.save(store / name, array)
    listed_again(store, name)


def change_documents(store: Path, **columns: Callable[[int], Any]) -> None:
    """The document table with other values, as functions of the row's number."""
    table = DocumentTable([store / TABLE])
    writer = DocumentWriter(store / "new.arrow")
    for row in range(len(table)):
        record = table[row]
        writer.add(type(record)(**{**record.__dict__, **{name: value(row) for name, value in columns.items()}}))
    writer.close()
    (store / "new.arrow").replace(store / TABLE)
    listed_again(store, TABLE)


@pytest.fixture
def problems(store: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What ``knnlm verify`` finds now; its status says whether that is anything."""

    def found() -> list[str]:
        capsys.readouterr()
        status = knnlm("verify", store, "--json")
        said: list[str] = json.loads(capsys.readouterr().out)["problems"]
        assert status == (1 if said else 0)
        assert not any("\n" in sentence for sentence in said)
        return said

    return found


Problems = Callable[[], list[str]]


def test_a_whole_store_has_none(store: Path, problems: Problems, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems() == []
    remove_documents(store, ["doc-1"])
    Profile(Mixture(5, 2.5, 0.35), "exact", "held-out text").write(store)
    assert problems() == []
    assert knnlm("verify", store) == 0
    count = len(Manifest.read(store).files)
    said = capsys.readouterr()
    assert said.out.startswith(f"{store}: {count} files, ")
    assert said.err == ""


def set_at(place: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("values", set_at(5, 299), r"shards/00000/values\.npy: the value of entry 5 is 299, but its token in tokens\.npy is \d+\."),
        ("keys", set_at((3, 7), np.nan), r"shards/00000/keys\.npy: the key of entry 3 is not finite\."),
        ("keys", set_at((0, 0), -np.inf), r"shards/00000/keys\.npy: the key of entry 0 is not finite\."),
        ("spans", set_at(4, [9, 8]), r"shards/00000/spans\.npy: token 4 is characters 9 to 8 of a document of \d+\."),
        ("spans", set_at(4, [0, 100_000]), r"shards/00000/spans\.npy: token 4 is characters 0 to 100000 of a document of \d+\."),
    ],
)
def test_what_an_array_may_not_hold_is_named(
    name: str, change: Callable[[np.ndarray], None], sentence: str, store: Path, problems: Problems
) -> None:
    change_array(store, f"shards/00000/{name}.npy", change)
    (found,) = problems()
    assert found.startswith(f"{store}/")
    assert re.search(sentence, found), found


@pytest.mark.parametrize("token", [-1, 300, 2**31 - 1])
def test_a_token_outside_of_the_vocabulary_is_named(token: int, store: Path, problems: Problems) -> None:
    shard = Manifest.read(store).shards[1]
    change_array(store, "shards/00001/tokens.npy", set_at(shard.tokens - 1, token))
    change_array(store, "shards/00001/values.npy", set_at(shard.entries - 1, token))
    place = shard.token_start + shard.tokens - 1
    assert problems() == [f"{store}/shards/00001/tokens.npy: token {place} is {token}, but the model's are 0 to 299."]


def test_values_that_are_shifted_by_a_document_are_found_in_every_piece(
    store: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knnlm.datastore.checking.PIECE_NUMBERS", 7)
    assert problems() == []
    last = Manifest.read(store).shards[-1]
    change_array(store, f"shards/{last.name}/values.npy", lambda array: array.__setitem__(slice(None), np.roll(array, 1)))
    (found,) = problems()
    assert f"{last.name}/values.npy" in found


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"token_start": lambda row: 0}, "but the documents before it end at"),
        ({"serial": lambda row: 11 - row}, "the serials of the documents do not ascend from 0 to less than 12"),
        ({"serial": lambda row: row + 1}, "the serials of the documents do not ascend from 0 to less than 12"),
        ({"serial": lambda row: row // 2}, "the serials of the documents do not ascend"),
        ({"id": lambda row: f"doc-{row % 11}"}, "several documents that are not removed have the id 'doc-0'"),
    ],
)
def test_a_document_table_that_does_not_fit_is_named(
    columns: dict[str, Callable[[int], Any]], sentence: str, store: Path, problems: Problems
) -> None:
    change_documents(store, **columns)
    found = problems()
    assert [TABLE in one and sentence in one for one in found].count(True) == 1, found


def test_a_removed_document_may_share_its_id(store: Path, problems: Problems) -> None:
    change_documents(store, id=lambda row: f"doc-{row % 11}")
    assert len(problems()) == 1
    remove_documents(store, ["doc-0"])
    assert problems() == []


def swap_shards(content: dict[str, Any]) -> None:
    first, second = content["shards"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def one_entry_too_many(content: dict[str, Any]) -> None:
    content["counts"]["entries"] += 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content["shards"][1].update(token_start=7), "shard 00001 begins at token 7 and entry"),
        (swap_shards, "shards/00001/tokens.npy is int32"),
        (one_entry_too_many, "manifest.json: the shards hold"),
        (lambda content: content["key"].update(dimension=31), "keys.npy"),
        (lambda content: content.update(next_serial=5), "less than 5, the next one in the manifest"),
        (lambda content: content["files"].pop("search/00000.json"), "search/00000.json, the file of search settings, is not among"),
    ],
)
def test_a_manifest_that_says_other_things_than_its_files_is_named(
    change: Callable[[dict[str, Any]], None], sentence: str, store: Path, problems: Problems
) -> None:
    change_manifest(store, change)
    found = problems()
    assert any(sentence in one for one in found), found


def test_tombstones_that_do_not_fit_are_named(store: Path, problems: Problems) -> None:
    remove_documents(store, ["doc-1", "doc-2"])
    np.save(store / "removed" / "00000.npy", np.array([1, 77]))
    listed_again(store, "removed/00000.npy")
    first, second = problems()
    assert first == f"{store}/removed/00000.npy: 1 of the removed serials, 77 the first, are those of no document."
    assert second.startswith(f"{store}/removed/00000.npy removes 1 documents with ")
    assert "but the manifest says 2 with" in second


def test_a_receipt_of_another_shard_is_named(store: Path, problems: Problems) -> None:
    shutil.copy(store / "shards" / "00000" / "receipt.json", store / "shards" / "00001" / "receipt.json")
    listed_again(store, "shards/00001/receipt.json")
    assert problems() == [f"{store}/shards/00001/receipt.json says other ranges or files of its shard than the manifest."]


def test_an_index_of_other_entries_is_named(store: Path, problems: Problems) -> None:
    path = store / "index" / "00000" / "index.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    write_json_with_checksum(path, {**content, "entries": 7})
    listed_again(store, "index/00000/index.json")
    (found,) = problems()
    assert "index/00000 indexes 7 entries, but the datastore has" in found


def test_search_settings_that_were_changed_are_named(store: Path, problems: Problems) -> None:
    (store / "search" / "00000.json").write_text("{}")
    listed_again(store, "search/00000.json")
    (found,) = problems()
    assert "search/00000.json is damaged" in found


# Files that are no part of the store


@pytest.mark.parametrize("name", ["removed/00007.npy", "shards/00099/keys.npy", "manifest.json.tmp", "index/00001/index.faiss", "core"])
def test_a_file_that_is_no_part_of_the_store_is_named(name: str, store: Path, problems: Problems) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"removed text")
    (found,) = problems()
    assert found.startswith(f"{store / name} is no part of the datastore")
    assert f"knnlm compact {store}" in found
    # It harms nobody who reads the store.
    Datastore.open(store)


def test_an_interrupted_append_is_named_once(store: Path, problems: Problems) -> None:
    (store / ".build").mkdir()
    for name in (".build/one", ".build/two", "shards/00002.tmp"):
        (store / name).write_text("text")
    (found,) = problems()
    assert found.startswith(f"{store / '.build'} is left over from an interrupted command; run that again")


def test_files_of_a_writer_that_runs_are_none_of_verifys_business(store: Path, problems: Problems) -> None:
    (store / "removed").mkdir()
    (store / "removed" / "00000.npy.tmp").write_text("half")
    with locked(store):
        assert problems() == []
    assert len(problems()) == 1


def test_a_store_that_changes_meanwhile_is_not_called_damaged(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_documents(store, ["doc-1"])
    real = inspection.store_problems

    def overtaken(*arguments: Any) -> Any:
        remove_documents(store, ["doc-2"])
        return real(*arguments)

    monkeypatch.setattr(inspection, "store_problems", overtaken)
    assert knnlm("verify", store) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {store} was changed by another process while it was read; run knnlm verify again.\n"


# Any damage to any file


@pytest.fixture(scope="module")
def whole(documented: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of file: removed documents, log, profile, search settings."""
    store = Path(shutil.copytree(documented, tmp_path_factory.mktemp("whole") / "store"))
    remove_documents(store, ["doc-1", "doc-6"])
    Profile(Mixture(5, 2.5, 0.35), "exact", "held-out text").write(store)
    return store


def files_of(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


EVERY_FILE = (
    "audit.log",
    TABLE,
    "index/00000/index.faiss",
    "index/00000/index.json",
    MANIFEST,
    "profile.json",
    "removed/00000.npy",
    "search/00000.json",
    "settings.json",
    *(f"shards/{shard}/{name}.npy" for shard in ("00000", "00001") for name in ("keys", "spans", "tokens", "values")),
    "shards/00001/receipt.json",
)


def test_every_kind_of_file_is_tried(whole: Path) -> None:
    found = files_of(whole)
    assert set(EVERY_FILE) <= set(found)
    assert {Path(name).name for name in found} == {Path(name).name for name in EVERY_FILE}
    assert knnlm("verify", whole) == 0


def refused_by_every_command(store: Path, name: str, capsys: pytest.CaptureFixture[str], *commands: tuple[str, ...]) -> None:
    for line in commands:
        capsys.readouterr()
        assert knnlm(line[0], store, *line[1:]) == 1, line
        said = capsys.readouterr()
        assert name in said.err + said.out, (line, said)
        assert "Traceback" not in said.err
        if line[0] != "verify":
            assert said.err.startswith("error: "), said.err
            assert said.err.count("\n") == 1, said.err


COMMANDS = (("verify",), ("inspect",), ("inspect", "--documents"), ("compare", "--text", __file__), ("remove", "--document", "doc-2"))


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_that_was_cut_or_deleted_is_refused_by_every_command(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    content = (store / name).read_bytes()
    chance = random.Random(name)
    for left in {0, 1, len(content) // 2, len(content) - 1, chance.randrange(len(content))}:
        (store / name).write_bytes(content[:left])
        with pytest.raises(StoreDamaged, match=name.replace(".", r"\.")):
            Datastore.open(store)
        refused_by_every_command(store, name, capsys, *COMMANDS)
    (store / name).unlink()
    if name == "profile.json":  # no part of the build; without it the defaults apply
        assert knnlm("verify", store) == 0
        return
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        Datastore.open(store)
    refused_by_every_command(store, name, capsys, *COMMANDS)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_bit_anywhere_is_named_by_verify(name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    content = (store / name).read_bytes()
    chance = random.Random(name)
    for place in {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(8))}:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (store / name).write_bytes(damaged)
        refused_by_every_command(store, name, capsys, ("verify",))
    (store / name).write_bytes(content)
    assert knnlm("verify", store) == 0


def test_a_log_may_grow(whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    with (store / "audit.log").open("a") as log:
        log.write('{"operation": "remove"')
    Datastore.open(store, verify=True)
    assert knnlm("verify", store) == 0


def test_progress_is_shown_for_big_stores(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspection, "BIG_STORE", 0)
    assert knnlm("verify", store, "--json") == 0
    said = capsys.readouterr()
    size = sum(facts.bytes for facts in Manifest.read(store).files.values())
    assert f"reading files (bytes): {size:,} of {size:,}" in said.err
    entries = Manifest.read(store).counts.entries
    assert f"checking entries: {entries:,} of {entries:,}" in said.err
    assert json.loads(said.out)["problems"] == []

"""``inspect``: facts in numbers and words, documents, and where an entry came from, as text where that can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import ModelError, StoreMismatch
from knnlm.model import HFLanguageModel
from knnlm.opening import load_tokenizer
from tests.datastore.conftest import DOCUMENTS, metadata_of
from tests.stores import build, knnlm, token_folder
from tests.tiny import byte_fallback_tokenizer, save, tiny_gpt2, tiny_tokenizer

Show = Callable[..., dict[str, str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """The table that ``knnlm inspect`` prints, as a dictionary."""

    def shown(*arguments: str | Path) -> dict[str, str]:
        assert knnlm("inspect", *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [cell.strip() for cell in lines[2].split("┃")[1:-1]] == ["fact", "value"]
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
        found, last = dict[str, str](), ""
        for name, value in cells:  # a value that is too long goes on below, beside an empty name
            found[name or last] = f"{found[last]} {value}" if not name else value
            last = name or last
        return found

    return shown


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert knnlm("inspect", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_facts_of_a_store_that_nothing_was_removed_from(store: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    counts, found = Manifest.read(store).counts, show(store)
    assert counts.entries > 1000
    assert found["documents"] == "12"
    assert found["tokens"] == f"{counts.tokens:,}"
    assert found["entries"] == f"{counts.entries:,}, in {len(Manifest.read(store).shards)} shards"
    assert found["keys"] == "width 32, stored as float16"
    assert found["search settings"] == "search/00000.json"
    assert found["audit log"] == "0 lines"
    said = as_json(capsys, store)
    size = sum(path.stat().st_size for path in (store / "index" / "00000").iterdir())
    assert said["index"]["bytes"] == size
    assert found["index"] == f"IVF4,SQ8, {size / 1000:.1f} kB ({size / counts.entries:.0f} bytes an entry)"
    assert (said["removed"], said["search"], said["audit_log_lines"]) == ({"documents": 0, "entries": 0}, "search/00000.json", 0)


def test_facts_after_a_removal(store: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    gone = remove_documents(store, ["doc-1", "doc-2"]).entries
    entries, found = Manifest.read(store).counts.entries, show(store)
    assert found["documents"] == "10 live, 2 removed"
    assert found["entries"].startswith(f"{entries - gone:,} live, {gone:,} removed, in ")
    assert found["audit log"] == "1 line"
    assert as_json(capsys, store)["removed"] == {"documents": 2, "entries": gone}


def test_one_is_no_plural(gpt2: HFLanguageModel, tmp_path: Path, show: Show) -> None:
    build(token_folder(tmp_path / "corpus", [[1, 2, 3]]), tmp_path / "store", gpt2, index="exact", max_length=16)
    assert show(tmp_path / "store")["entries"] == "2, in 1 shard"


def test_documents_are_listed_with_their_entries(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_documents(store, ["doc-4"])
    listed = as_json(capsys, store, "--documents")["documents"]
    opened = Datastore.open(store)
    for row, document in enumerate(listed):
        first, last = opened.documents.entry_range(row)
        expected = {"id": f"doc-{row}", "source": "one.jsonl" if row < 8 else "two.jsonl", "entries": last - first, "removed": row == 4}
        assert document == expected
    assert len(listed) == DOCUMENTS
    chosen = as_json(capsys, store, "--documents", "--where", "license=MIT", "--where", "source=two.jsonl")["documents"]
    assert [document["id"] for document in chosen] == ["doc-8", "doc-10"]
    assert knnlm("inspect", store, "--documents", "--where", "id=doc-4") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["doc-4", "one.jsonl", f"{listed[4]['entries']}", "yes"]


def test_a_table_of_documents_that_is_cut_says_so(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnlm.inspection.LISTED_AT_MOST", 5)
    assert knnlm("inspect", store, "--documents") == 0
    said = capsys.readouterr()
    assert len([line for line in said.out.splitlines() if line.startswith("│")]) == 5
    assert said.err == "and 7 documents more; --json lists all\n"
    assert len(as_json(capsys, store, "--documents")["documents"]) == DOCUMENTS


def test_an_entry_is_shown_as_text(store: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Datastore.open(store)
    entry = opened.documents.entry_range(6)[0] + 60
    evidence, found = opened.evidence(entry), show(store, "--entry", str(entry))
    tokenizer = tiny_tokenizer()
    assert found["value token"] == f"{tokenizer.decode([evidence.token_id])!r} (id {evidence.token_id})"
    assert found["left context"].split() == tokenizer.decode(evidence.left_context).split()
    assert (found["document"], found["source"]) == ("doc-6", "one.jsonl")
    assert evidence.characters is not None
    assert found["place"] == f"characters {evidence.characters[0]} to {evidence.characters[1]}, line {evidence.line}"
    for name, value in metadata_of(6).items():
        assert found[f"metadata: {name}"] == (value if isinstance(value, str) else json.dumps(value))
    said = as_json(capsys, store, "--entry", str(entry))
    assert said["left_context"] == evidence.left_context
    assert said["left_context_text"] == tokenizer.decode(evidence.left_context)
    assert said["token_text"] == tokenizer.decode([evidence.token_id])
    assert said["document"]["metadata"].items() >= metadata_of(6).items()
    assert (said["removed"], said["no_text_because"]) == (False, None)


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["table", "json"])
def test_a_removed_entry_shows_nothing_else(flags: tuple[str, ...], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Datastore.open(store)
    first, last = opened.documents.entry_range(6)
    remove_documents(store, ["doc-6"])
    for entry in (first, last - 1):
        assert knnlm("inspect", store, "--entry", str(entry), *flags) == 0
        out = capsys.readouterr().out
        assert "removed" in out
        for secret in ("doc-6", "one.jsonl", "MIT"):
            assert secret not in out
        if flags:
            assert json.loads(out) == {"entry": entry, "removed": True}
    assert knnlm("inspect", store, "--entry", str(last)) == 0
    assert "doc-7" in capsys.readouterr().out


@pytest.fixture
def orphan(tmp_path: Path) -> Path:
    """A store whose model was moved since."""
    path = save(tiny_gpt2(), tiny_tokenizer(), tmp_path / "model")
    build(
        token_folder(tmp_path / "corpus", [[5, 6, 7, 8, 9]]), tmp_path / "store", HFLanguageModel.load(path), index="exact", max_length=16
    )
    shutil.move(path, tmp_path / "moved")
    return tmp_path / "store"


def test_without_tokenizer_ids_are_shown_and_why(orphan: Path, tmp_path: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    found = show(orphan, "--entry", "2")
    assert (found["value token"], found["left context"]) == ("8", "5 6 7")
    assert found["token ids, since"].startswith(f"There is no folder '{tmp_path}")
    said = as_json(capsys, orphan, "--entry", "2")
    assert (said["token_text"], said["left_context_text"], said["left_context"]) == (None, None, [5, 6, 7])
    assert "There is no folder" in said["no_text_because"]
    assert show(orphan, "--entry", "2", "--model", tmp_path / "moved")["value token"].endswith("(id 8)")


def test_another_tokenizer_is_not_taken_for_the_stores(orphan: Path, tmp_path: Path, show: Show) -> None:
    byte_fallback_tokenizer().save_pretrained(tmp_path / "model")
    manifest = Manifest.read(orphan)
    with pytest.raises(StoreMismatch, match="is not the one that the datastore was built with"):
        load_tokenizer(manifest)
    found = show(orphan, "--entry", "2")
    assert found["left context"] == "5 6 7"
    assert "is not the one" in found["token ids, since"]
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of"):
        load_tokenizer(manifest)
    assert show(orphan, "--entry", "2")["left context"] == "5 6 7"


def test_a_tokenizer_needs_no_weights(orphan: Path, tmp_path: Path) -> None:
    (tmp_path / "moved" / "model.safetensors").unlink()
    assert load_tokenizer(Manifest.read(orphan), str(tmp_path / "moved")).decode([40, 41]) == tiny_tokenizer().decode([40, 41])


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (("--documents", "--entry", "1"), "--entry"),
        (("--where", "a=b"), "--where"),
        (("--model", "m"), "--model"),
        (("--documents", "--where", "a"), "--where"),
        (("--entry", "99999999"), "--entry"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    line: tuple[str, ...], field: str, documented: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert knnlm("inspect", documented, *line) == 2
    assert capsys.readouterr().err.startswith(f"error: {field} ")

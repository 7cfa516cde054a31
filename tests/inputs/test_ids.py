"""Ids that were seen before, in little memory, and an id used twice told from two of one hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import knnlm.inputs.ids
from knnlm.corpus import Corpus
from knnlm.errors import CorpusError
from knnlm.inputs.ids import SLOTS, SeenIds


@given(st.lists(st.text(max_size=3), max_size=200))
def test_each_is_new_once(ids: list[str]) -> None:
    seen, reference = SeenIds(), set[str]()
    for identity in ids:
        assert seen.add(identity) == (identity in reference)
        reference.add(identity)


def test_more_than_the_first_table_holds() -> None:
    seen = SeenIds()
    ids = [f"file.jsonl:{number}" for number in range(5 * SLOTS)]
    assert not any(seen.add(identity) for identity in ids)
    assert all(seen.add(identity) for identity in ids)
    assert seen._slots.itemsize * len(seen._slots) <= 24 * len(ids)


def write(folder: Path, *ids: list[str]) -> Path:
    for number, of_file in enumerate(ids):
        lines = [json.dumps({"text": "a text", "id": identity}) for identity in of_file]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def test_two_ids_of_one_hash_are_two_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knnlm.inputs.ids, "_hash", lambda identity: len(identity))
    corpus = Corpus([write(tmp_path, ["a", "bb", "c"], ["dd", "e", "f"])])
    assert [document.id for document in corpus] == ["a", "bb", "c", "dd", "e", "f"]
    write(tmp_path, ["a", "bb", "c"], ["dd", "e", "bb"])
    with pytest.raises(CorpusError, match=r"Two documents have the id 'bb': in .*0\.jsonl and .*1\.jsonl"):
        list(corpus)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_id_used_twice_is_refused_whatever_is_done_with_problems(on_error: str, tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], ["c", "a"])
    if on_error == "skip":
        (tmp_path / "00.jsonl").write_text("broken\n")
    with pytest.raises(CorpusError, match=r"id 'a': in .*0\.jsonl and .*1\.jsonl"):
        list(Corpus([tmp_path], on_error=on_error))  # type: ignore[arg-type]
    write(tmp_path, ["a", "b", "b"])
    with pytest.raises(CorpusError, match=r"id 'b': in .*0\.jsonl and .*0\.jsonl"):
        list(Corpus([tmp_path / "0.jsonl"]))

"""Portions of a corpus: spread over its files, within a budget, each standing for its part of the bytes."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm import corpus
from knnlm.corpus import Corpus
from knnlm.inputs import files, portions, text
from knnlm.inputs.portions import choose_portions

SIZES = st.lists(st.integers(0, 30_000_000), min_size=1, max_size=60).filter(any)


@given(sizes=SIZES, budget=st.integers(1, 100_000_000), data=st.data())
def test_portions_stand_for_the_whole_within_the_budget(sizes: list[int], budget: int, data: st.DataObject) -> None:
    whole = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    found = choose_portions(sizes, whole, budget)
    assert sum(portion.share for portion in found) == pytest.approx(1)
    assert [portion.file for portion in found] == sorted({portion.file for portion in found})
    assert all(0 < portion.limit <= sizes[portion.file] for portion in found)
    assert all(portion.limit == sizes[portion.file] for portion in found if whole[portion.file])
    assert len(found) == 1 or sum(portion.limit for portion in found) <= budget


@given(sizes=SIZES)
def test_shares_follow_sizes(sizes: list[int]) -> None:
    found = {portion.file: portion.share for portion in choose_portions(sizes, [False] * len(sizes), 10**12)}
    for number, size in enumerate(sizes):
        assert found.get(number, 0) == pytest.approx(size / sum(sizes), abs=1 / portions.MOST_POINTS)


CHANCE = random.Random(0)
LINES = [json.dumps({"text": CHANCE.randbytes(20 + 37 * (number % 11)).hex()}) for number in range(6000)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"lines.{kind}"
    lines = "\n".join(LINES) + "\n"
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "txt":
        path.write_text("".join(f"# {line}\n" for line in LINES))
    else:
        pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in LINES]}), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet"])
def test_a_part_of_a_file_is_read_and_its_bytes_are_told(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, kind)
    step = path.stat().st_size // 40
    for module in (corpus, files, portions, text):
        monkeypatch.setattr(module, "CHUNK", step)
    [portion] = Corpus([path], "^# ").portions(path.stat().st_size // 4)
    documents = list(portion)
    assert portion.share == 1
    assert step < portion.bytes < path.stat().st_size / 2
    assert len(documents) < len(LINES) / 2
    assert len(documents) * path.stat().st_size / portion.bytes == pytest.approx(len(LINES), rel=0.05)


def test_a_file_that_is_one_document_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 16)
    (tmp_path / "a.txt").write_text("a" * 5000)
    [portion] = Corpus([tmp_path]).portions(10)
    assert [document.text for document in portion] == ["a" * 5000]
    assert portion.bytes == 5000


def test_a_document_longer_than_the_portion_is_given_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 64)
    monkeypatch.setattr(portions, "CHUNK", 64)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "a" * 900}) + "\n") * 20)
    [portion] = Corpus([tmp_path]).portions(64)
    assert [document.text for document in portion] == ["a" * 900]
    assert portion.bytes == pytest.approx(920, abs=64)

"""Parquet files and saved datasets: a document a row, its other columns as metadata that JSON can hold."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knnlm.corpus import Corpus, Document
from knnlm.errors import CorpusError, MissingDependency
from knnlm.inputs.tables import ROWS_AT_ONCE, plain

UTC = datetime.UTC
COLUMNS: dict[str, tuple[pa.DataType, Any, Any]] = {
    "whole": (pa.int64(), 2**62, 2**62),
    "small": (pa.uint8(), 255, 255),
    "real": (pa.float32(), 0.5, 0.5),
    "half": (pa.float16(), 0.25, 0.25),
    "not_a_number": (pa.float64(), float("nan"), "nan"),
    "infinite": (pa.float64(), float("-inf"), "-inf"),
    "truth": (pa.bool_(), True, True),
    "nothing": (pa.null(), None, None),
    "missing": (pa.int32(), None, None),
    "word": (pa.string(), "Zoë", "Zoë"),
    "view": (pa.string_view(), "v", "v"),
    "category": (pa.dictionary(pa.int8(), pa.string()), "c", "c"),
    "day": (pa.date32(), datetime.date(1999, 12, 31), "1999-12-31"),
    "seconds": (pa.timestamp("s"), datetime.datetime(1999, 12, 31, 1, 2, 3), "1999-12-31T01:02:03"),
    "nanoseconds": (pa.timestamp("ns"), 1_000_000_000_123_456_789, "2001-09-09T01:46:40.123456"),
    "zoned": (pa.timestamp("us", "UTC"), datetime.datetime(2000, 1, 1, tzinfo=UTC), "2000-01-01T00:00:00+00:00"),
    "clock": (pa.time64("ns"), 3_723_000_001_999, "01:02:03.000001"),
    "duration": (pa.duration("ns"), 1_500_000_000, 1.5),
    "price": (pa.decimal128(5, 2), decimal.Decimal("12.30"), "12.30"),
    "uuid": (pa.uuid(), uuid.UUID(int=5).bytes, str(uuid.UUID(int=5))),
    "tags": (pa.list_(pa.string()), ["a", None], ["a", None]),
    "fixed": (pa.list_(pa.int8(), 2), [1, 2], [1, 2]),
    "nested": (
        pa.struct([("days", pa.list_(pa.date32())), ("at", pa.timestamp("ns"))]),
        {"days": [datetime.date(2000, 1, 1)], "at": 1999},
        {"days": ["2000-01-01"], "at": "1970-01-01T00:00:00.000001"},
    ),
    "map": (pa.map_(pa.string(), pa.timestamp("ns")), [("k", 1000)], [["k", "1970-01-01T00:00:00.000001"]]),
}


def table(**columns: Any) -> pa.Table:
    return pa.table({"text": ["one"], **columns})


def write(path: Path, content: pa.Table, **options: Any) -> Path:
    pq.write_table(content, path, **options)
    return path


def read(path: Path, **settings: Any) -> list[Document]:
    return list(Corpus([path], **settings))


@pytest.mark.parametrize("pandas", [True, False], ids=["with pandas", "without"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_become_metadata_that_json_holds(name: str, pandas: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether pandas is there or not, which decides what Arrow makes of times."""
    if not pandas:
        monkeypatch.setitem(sys.modules, "pandas", None)
    kind, value, expected = COLUMNS[name]
    path = write(tmp_path / "a.parquet", table(**{name: pa.array([value], kind)}))
    (document,) = read(path)
    assert document.metadata == {name: expected}
    assert json.loads(json.dumps(document.metadata, allow_nan=False)) == document.metadata


def test_rows_are_documents_across_row_groups_and_batches(tmp_path: Path) -> None:
    count = 3 * ROWS_AT_ONCE + 7
    content = pa.table({"number": range(count), "text": [f"text {row}" for row in range(count)]})
    write(tmp_path / "a.parquet", content, row_group_size=ROWS_AT_ONCE + 50)
    corpus = Corpus([tmp_path])
    seen, documents = [], []
    for document in corpus:
        documents.append(document)
        seen.append(corpus.bytes_read)
    assert documents == [Document(f"a.parquet:{row}", "a.parquet", f"text {row}", metadata={"number": row}) for row in range(count)]
    assert seen == sorted(seen)
    assert 3 <= len(set(seen)) <= 6
    assert corpus.bytes_read == corpus.bytes_total == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.large_string()])
def test_ids_are_strings_or_whole_numbers(kind: pa.DataType, tmp_path: Path) -> None:
    values = [7, None, 9] if kind == pa.int64() else ["7", None, "9"]
    write(tmp_path / "a.parquet", pa.table({"text": ["x", "y", "z"], "id": pa.array(values, kind), "key": pa.array(values, kind)}))
    assert [d.id for d in read(tmp_path)] == ["7", "a.parquet:1", "9"]
    # The default name is a wish, a name that was given is a demand.
    with pytest.raises(CorpusError, match=r'a\.parquet, row 1 has no field "key" with a string or whole number'):
        read(tmp_path, id_field="key")


def test_the_fields_are_those_that_are_named(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet", pa.table({"body": pa.array(["x"], pa.dictionary(pa.int8(), pa.large_string())), "url": ["u"], "text": [1]})
    )
    assert read(tmp_path, text_field="body", id_field="url") == [Document("u", "a.parquet", "x", metadata={"url": "u", "text": 1})]
    with pytest.raises(
        CorpusError, match=r'a\.parquet has no column "text" of strings; --text-field names it, of its columns body, url hold strings'
    ):
        read(tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text('{"body": "x", "url": "u", "text": 1}\n{"body": "y"}\n')
    with pytest.raises(CorpusError, match=r'a\.jsonl, line 2 has no field "url"'):
        read(tmp_path, text_field="body", id_field="url")
    corpus = Corpus([tmp_path], on_error="skip", text_field="body", id_field="url")
    assert list(corpus) == [Document("u", "a.jsonl", "x", metadata={"url": "u", "text": 1})]
    assert corpus.problems.counts == {"no id": 1}


def test_binary_columns_are_left_out_by_name(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": b"\x89", "path": "p"}], image),
        "raw": pa.array([b"\xff"], pa.large_binary()),
        "many": pa.array([[b"\xff"]], pa.list_(pa.binary_view())),
        "fixed": pa.array([b"ab"], pa.binary(2)),
        "kept": [1],
    }
    write(tmp_path / "a.parquet", table(**columns))
    write(tmp_path / "b.parquet", pa.table({"text": ["two"]}))
    corpus = Corpus([tmp_path])
    assert [(document.text, document.metadata) for document in corpus] == [("one", {"kept": 1}), ("two", {})]
    assert corpus.left_out == {"binary columns": [f"a.parquet: {name}" for name in ("image", "raw", "many", "fixed")]}


def broken_text(*values: bytes) -> pa.Array:
    """Strings that need not be UTF-8, as careless writers leave them."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    content = pa.table(
        {
            "text": broken_text(b"one", b"caf\xe9", b"three", b"", b"five"),
            "year": pa.array([0, 0, 2**40, 0, 0], pa.timestamp("s")),
        }
    )
    write(tmp_path / "a.parquet", content)
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1 holds a value that can't be read: .*0xe9"):
        read(tmp_path)
    corpus = Corpus([tmp_path], on_error="skip")
    assert [(document.id, document.text) for document in corpus] == [("a.parquet:0", "one"), ("a.parquet:4", "five")]
    assert corpus.problems.counts == {"unreadable values": 2, "empty text": 1}
    assert [sentence.split(" ")[2] for sentence in corpus.problems.first] == ["1", "2", "3"]


@pytest.mark.parametrize("damage", ["no table", "cut", "changed"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        pa.table({"text": [f"{row} text" for row in range(5000)]}),
        row_group_size=1000,
        compression="none",
        write_page_checksum=True,
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    if damage == "changed":
        content[content.index(b"3500 text")] ^= 1
    (tmp_path / "a.parquet").write_bytes(b"no table" if damage == "no table" else content[:-20] if damage == "cut" else content)
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(CorpusError, match=r"a\.parquet can't be read"):
        read(tmp_path)
    corpus = Corpus([tmp_path], on_error="skip")
    found = [document.text for document in corpus]
    assert found[-1] == "b"
    assert found[:-1] == [f"{row} text" for row in range(len(found) - 1)]
    assert (2500 < len(found) <= 3501) if damage == "changed" else len(found) == 1
    assert corpus.problems.counts == {"unreadable files": 1}


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.Table.from_arrays([pa.array(["x"]), pa.array([1]), pa.array([2])], ["text", "n", "n"]))
    with pytest.raises(CorpusError, match=r'a\.parquet has two columns "n"'):
        read(tmp_path)


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}))
    write(tmp_path / "b.parquet", table())
    corpus = Corpus([tmp_path])
    assert [document.id for document in corpus] == ["b.parquet:0"]
    assert corpus.left_out == {"files without text": ["a.parquet"]}


def test_parquet_below_a_url(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"text": ["one", "two"]}))
    fsspec.filesystem("memory").pipe("/tables/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert [(d.id, d.source, d.text) for d in Corpus(["memory://tables"])] == [
        ("a.parquet:0", "memory://tables/a.parquet", "one"),
        ("a.parquet:1", "memory://tables/a.parquet", "two"),
    ]


def test_values_that_json_does_not_know_become_strings() -> None:
    assert plain({1: (b"x", {None: 1.0})}) == {"1": ["b'x'", {"None": 1.0}]}


datasets = pytest.importorskip("datasets")


def saved(folder: Path, **columns: Any) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return folder


def test_a_saved_dataset_is_a_table(tmp_path: Path) -> None:
    day = datetime.date(2000, 1, 1)
    folder = saved(tmp_path / "data", text=[f"text {row}" for row in range(600)], day=[day] * 600, raw=[b"x"] * 600)
    corpus = Corpus([folder])
    assert list(corpus) == [Document(f"data:{row}", "data", f"text {row}", metadata={"day": "2000-01-01"}) for row in range(600)]
    assert corpus.left_out == {"binary columns": ["data: raw"]}
    assert corpus.bytes_read == corpus.bytes_total == sum(file.stat().st_size for file in folder.glob("*.arrow"))


def test_saved_datasets_and_files_in_one_folder(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "corpus" / "data")
    (tmp_path / "corpus" / "a.txt").write_text("a")
    assert [(d.id, d.text) for d in Corpus([tmp_path / "corpus"])] == [("a.txt", "a"), ("data/test:0", "test"), ("data/train:0", "train")]
    assert [d.id for d in Corpus([tmp_path / "corpus" / "data"])] == ["test:0", "train:0"]
    assert [d.id for d in Corpus([f"{tmp_path}/corpus/*/train"])] == ["data/train:0"]
    assert [d.id for d in Corpus([tmp_path / "corpus" / "data" / "train", tmp_path / "corpus" / "a.txt"])] == ["train:0", "a.txt"]


def test_rows_are_those_that_were_selected(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0]).with_format("numpy")
    data.save_to_disk(tmp_path / "data")
    assert [(d.id, d.text) for d in Corpus([tmp_path / "data"])] == [("data:0", "c"), ("data:1", "a")]


def test_a_saved_dataset_below_a_url(tmp_path: Path) -> None:
    folder = saved(tmp_path / "data", text=["one"])
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/saved/data/{file.name}", file.read_bytes())
    assert [(d.id, d.source, d.text) for d in Corpus(["memory://saved"])] == [("data:0", "memory://saved/data", "one")]


@pytest.mark.parametrize("file", ["state.json", "data-00000-of-00001.arrow"])
def test_a_damaged_dataset_is_named(file: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "data", text=["one"] * 100)
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    with pytest.raises(CorpusError, match=r"data can't be read: "):
        read(folder)


def test_a_dataset_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "data", text=["one"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"data needs datasets, which is not installed; pip install 'knnlm\[datasets\]'"):
        Corpus([folder])

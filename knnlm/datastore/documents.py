"""Where entries came from: the document table, and the way from an entry to document, characters and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from knnlm.datastore.files import named
from knnlm.errors import StoreDamaged

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("token_start", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("characters", pa.int64(), nullable=False),
        pa.field("line_starts", pa.list_(pa.uint32()), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("serial", pa.int64(), nullable=False),
    ]
)
SCHEMA_1 = SCHEMA.remove(SCHEMA.get_field_index("serial"))
"""Of format version 1, where the serial is the row's number."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class DocumentRecord:
    """One row of the table.

    ``token_start``, ``tokens``: its range in the corpus token stream. ``characters``: length of its text.
    ``line_starts``: character offset of each line's start, within the document. ``metadata``: further fields of the
    input. ``serial``: given once in the life of a store and never again, ascending; removal goes by it.
    """

    id: str
    source: str
    token_start: int
    tokens: int
    characters: int
    line_starts: list[int]
    metadata: dict[str, Any]
    serial: int

    def line_of(self, character: int) -> int:
        """Number, from 1, of the line in which a character stands."""
        return int(np.searchsorted(np.asarray(self.line_starts), character, side="right")) or 1


class DocumentWriter:
    """Writes the table row by row in batches, so memory does not grow with the corpus."""

    def __init__(self, path: Path, batch: int = ROWS_AT_ONCE) -> None:
        self._path, self._sink = path, pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._batch = batch

    def add(self, record: DocumentRecord) -> None:
        """Append one document."""
        self._rows.append({**record.__dict__, "metadata": json.dumps(record.metadata, ensure_ascii=False, sort_keys=True)})
        if len(self._rows) >= self._batch:
            self._flush()

    def close(self) -> None:
        """Write the rest and the table's end."""
        self._flush()
        with named(self._path):
            self._writer.close()
            self._sink.close()

    def _flush(self) -> None:
        if self._rows:
            batch = pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA)
            with named(self._path):
                self._writer.write_batch(batch)
            self._rows.clear()


class DocumentTable:
    """The document table of a store: its segments, memory-mapped, one after another.

    Entry e of document d is token e + d + 1 of the corpus, since each document's first token is no value: both ways
    are a binary search over documents. ``token_starts``, ``token_counts``, ``serials``: [documents] int64.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = [_read_segment(path) for path in paths]
        rows = 0
        for number, table in enumerate(tables):
            if "serial" not in table.schema.names:
                tables[number] = table.append_column(SCHEMA.field("serial"), pa.array(np.arange(rows, rows + len(table))))
            rows += len(table)
        self._table = pa.concat_tables(tables)
        self.token_starts: np.ndarray[Any, np.dtype[np.int64]] = self._table["token_start"].to_numpy()
        self.token_counts: np.ndarray[Any, np.dtype[np.int64]] = self._table["tokens"].to_numpy()
        self.serials: np.ndarray[Any, np.dtype[np.int64]] = self._table["serial"].to_numpy()
        self._entry_starts = self.token_starts - np.arange(len(self.token_starts))

    def __len__(self) -> int:
        return len(self.token_starts)

    def __getitem__(self, document: int) -> DocumentRecord:
        row = self._table.slice(document, 1).to_pylist()[0]
        return DocumentRecord(**{**row, "metadata": json.loads(row["metadata"])})

    def ids(self) -> Iterable[str]:
        """All document ids, in corpus order."""
        return (value.as_py() for value in self._table["id"])

    def character_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Length of each document's text, in characters: [documents]."""
        counts: np.ndarray[Any, np.dtype[np.int64]] = self._table["characters"].to_numpy()
        return counts

    def repeated_ids(self, among: np.ndarray[Any, np.dtype[np.bool_]]) -> list[str]:
        """Ids that several of the documents have for which ``among`` [documents] is true."""
        counted = pc.value_counts(self._table["id"].filter(pa.array(among)))
        repeated: list[str] = counted.filter(pc.greater(counted.field("counts"), 1)).field("values").to_pylist()
        return repeated

    def texts(self, column: str, rows: Iterable[int]) -> list[str]:
        """``id`` or ``source`` of documents by number, in that order."""
        values = self._table[column]
        return [values[int(row)].as_py() for row in rows]

    def rows_of(self, column: str, values: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of the documents whose ``id`` or ``source`` is one of ``values``."""
        found = pc.is_in(self._table[column], value_set=pa.array(values, pa.string()))
        return np.flatnonzero(found.to_numpy())

    def clash(self, before: int, serials: np.ndarray[Any, np.dtype[np.int64]]) -> str | None:
        """An id that a document from row ``before`` on shares with an earlier one whose serial is not among ``serials``."""
        old = self._table["id"].slice(0, before).filter(pa.array(~np.isin(self.serials[:before], serials)))
        new = self._table["id"].slice(before)
        both = new.filter(pc.is_in(new, value_set=old.combine_chunks()))
        return both[0].as_py() if len(both) else None

    def write_rows(self, rows: np.ndarray[Any, np.dtype[np.int64]], path: Path) -> None:
        """Write the documents ``rows`` (ascending) as a table of their own at ``path``, their tokens one after another."""
        with named(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            token_start = 0
            for first in range(0, len(rows), ROWS_AT_ONCE):
                part = self._table.take(rows[first : first + ROWS_AT_ONCE]).combine_chunks()
                counts = part["tokens"].to_numpy()
                starts = token_start + np.cumsum(counts) - counts
                token_start += int(counts.sum())
                part = part.set_column(SCHEMA.get_field_index("token_start"), SCHEMA.field("token_start"), pa.array(starts))
                writer.write_table(part.cast(SCHEMA))

    def metadata(self, rows: Iterable[int]) -> Iterable[dict[str, Any]]:
        """The metadata of documents by number, in that order."""
        column = self._table["metadata"]
        return (json.loads(column[int(row)].as_py()) for row in rows)

    def of_entry(self, entry: int) -> int:
        """Number of the document that an entry belongs to."""
        return int(np.searchsorted(self._entry_starts, entry, side="right")) - 1

    def of_entries(self, entries: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """:meth:`of_entry` for many: [m]."""
        return np.searchsorted(self._entry_starts, entries, side="right") - 1

    def position_of_entry(self, entry: int) -> int:
        """Corpus position of an entry's value token."""
        return entry + self.of_entry(entry) + 1

    def entry_range(self, document: int) -> tuple[int, int]:
        """Entries [first, last) of a document."""
        start = int(self._entry_starts[document])
        return start, start + int(self.token_counts[document]) - 1

    def entry_ranges(self, documents: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[int, int]]:
        """Entries [first, last) of each of ``documents``."""
        starts = self._entry_starts[documents]
        return list(zip(starts.tolist(), (starts + self.token_counts[documents] - 1).tolist(), strict=True))


def _read_segment(path: Path) -> pa.Table:
    """A segment as a table; raises :class:`StoreDamaged` for anything that is none."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise StoreDamaged(f"{path} is damaged: {error}") from error
    if not (table.schema.equals(SCHEMA) or table.schema.equals(SCHEMA_1)):
        raise StoreDamaged(f"{path} is damaged: its columns are {table.schema.names}, expected {SCHEMA.names}.")
    return table

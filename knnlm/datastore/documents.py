"""Where entries came from: the document table, and the way from an entry to document, characters and line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

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
    ]
)


@dataclass(frozen=True)
class DocumentRecord:
    """One row of the table.

    ``token_start``, ``tokens``: its range in the corpus token stream. ``characters``: length of its text.
    ``line_starts``: character offset of each line's start, within the document. ``metadata``: further fields of the
    input.
    """

    id: str
    source: str
    token_start: int
    tokens: int
    characters: int
    line_starts: list[int]
    metadata: dict[str, Any]


class DocumentWriter:
    """Writes the table row by row in batches, so memory does not grow with the corpus."""

    def __init__(self, path: Path, batch: int = 4096) -> None:
        self._sink = pa.OSFile(str(path), "wb")
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
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows.clear()


class DocumentTable:
    """The document table of a store, memory-mapped.

    Entry e of document d is token e + d + 1 of the corpus, since each document's first token is no value: both ways
    are a binary search over documents.
    """

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                self._table = pa.ipc.open_file(source).read_all()
            self.token_starts: np.ndarray[Any, np.dtype[np.int64]] = self._table["token_start"].to_numpy()
            self.token_counts: np.ndarray[Any, np.dtype[np.int64]] = self._table["tokens"].to_numpy()
            matches = self._table.schema.equals(SCHEMA)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise StoreDamaged(f"{path} is damaged: {error}") from error
        if not matches:
            raise StoreDamaged(f"{path} is damaged: its columns are {self._table.schema.names}, expected {SCHEMA.names}.")
        self._entry_starts = self.token_starts - np.arange(len(self.token_starts))

    def __len__(self) -> int:
        return len(self.token_starts)

    def __getitem__(self, document: int) -> DocumentRecord:
        row = self._table.slice(document, 1).to_pylist()[0]
        return DocumentRecord(**{**row, "metadata": json.loads(row["metadata"])})

    def ids(self) -> Iterable[str]:
        """All document ids, in corpus order."""
        return (value.as_py() for value in self._table["id"])

    def of_entry(self, entry: int) -> int:
        """Number of the document that an entry belongs to."""
        return int(np.searchsorted(self._entry_starts, entry, side="right")) - 1

    def position_of_entry(self, entry: int) -> int:
        """Corpus position of an entry's value token."""
        return entry + self.of_entry(entry) + 1

    def entry_range(self, document: int) -> tuple[int, int]:
        """Entries [first, last) of a document."""
        start = int(self._entry_starts[document])
        return start, start + int(self.token_counts[document]) - 1

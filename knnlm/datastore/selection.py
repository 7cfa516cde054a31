"""Which documents are meant: by id, and by conditions on their source and metadata. Knows nothing of what is done to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.datastore.documents import DocumentTable
from knnlm.errors import DocumentNotFound, InvalidInput

COLUMNS = ("id", "source")
METADATA = "metadata."
NAMED_AT_MOST = 5

Rows = np.ndarray[Any, np.dtype[np.int64]]


def matching_rows(table: DocumentTable, where: Mapping[str, str]) -> Rows:
    """Numbers of the documents that meet every condition of ``where`` (all of them if there is none), ascending.

    A condition's name is ``id``, ``source``, or a field of the metadata; ``metadata.id`` and ``metadata.source`` are
    fields that are named like the columns. Values are compared as :func:`as_text` gives them (``3``, ``true``,
    ``null``). A document without the field does not meet the condition.
    """
    rows: Rows = np.arange(len(table))
    for column in COLUMNS:
        if column in where:
            rows = np.intersect1d(rows, table.rows_of(column, [_text("where", where[column])]), assume_unique=True)
    fields = {name.removeprefix(METADATA): value for name, value in where.items() if name not in COLUMNS}
    if not fields:
        return rows
    met = [all(_meets(found, *field) for field in fields.items()) for found in table.metadata(rows)]
    kept: Rows = rows[np.array(met, dtype=bool)]
    return kept


def parse_conditions(given: Sequence[str]) -> dict[str, str]:
    """Conditions as a command takes them, ``FIELD=VALUE`` each; raises :class:`InvalidInput` for anything else."""
    where: dict[str, str] = {}
    for condition in given:
        field, equals, value = condition.partition("=")
        if not field or not equals:
            raise InvalidInput("where", f"is {condition!r}, but must be FIELD=VALUE.")
        if field in where:
            raise InvalidInput("where", f"names {field} twice, but a document has one value of it, and all conditions must hold.")
        where[field] = value
    return where


def read_ids(path: Path) -> list[str]:
    """Ids of documents from a file, one a line (``-``: standard input); empty lines are none.

    Raises :class:`InvalidInput` if it holds none or is not UTF-8.
    """
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput("ids_from", f"is {path}, which is not UTF-8 at byte {error.start}.") from None
    ids = [line.removesuffix("\r") for line in lines]
    if not any(ids):
        raise InvalidInput("ids_from", f"is {path}, which holds no id.")
    return [name for name in ids if name]


def named_rows(table: DocumentTable, ids: Sequence[str]) -> Rows:
    """Numbers of the documents with these ids, ascending; raises :class:`DocumentNotFound` naming ids that none has.

    An id may be that of several rows, at most one of which is not removed.
    """
    rows = table.rows_of("id", [_text("document", name) for name in ids])
    require_all(ids, table.texts("id", rows), "The datastore holds no document of this id")
    return rows


def require_all(ids: Sequence[str], found: Sequence[str], problem: str) -> None:
    """Raise :class:`DocumentNotFound` with ``problem`` and the names of those of ``ids`` that were not found."""
    known = set(found)
    missing = [repr(name) for name in dict.fromkeys(ids) if name not in known]
    if missing:
        more = f" and {len(missing) - NAMED_AT_MOST:,} more" if len(missing) > NAMED_AT_MOST else ""
        raise DocumentNotFound(f"{problem}: {', '.join(missing[:NAMED_AT_MOST])}{more}.")


def _meets(metadata: Mapping[str, Any], name: str, value: str) -> bool:
    if name not in metadata:
        return False
    return value == as_text(metadata[name])


def as_text(value: Any) -> str:
    """A value of a document's metadata as conditions compare it: a string as it is, anything else as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(field: str, value: str) -> str:
    """``value`` if a document table can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, f"is {value!r}, which is no text in UTF-8.") from None
    return value

"""Tables: Parquet files and saved Hugging Face datasets, a document a row."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from knnlm.inputs.document import Document
from knnlm.inputs.files import InputFile
from knnlm.inputs.reading import Reading, document_of

ROWS_AT_ONCE = 256
BUFFER = 1 << 20
BINARY_COLUMNS = "binary columns"
UNCONVERTIBLE = (ValueError, OverflowError, pa.ArrowInvalid)
"""What Arrow raises for bytes that are no UTF-8 in a string, and for dates that Python does not know."""


def read_parquet(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A document for each row of a Parquet file, rows counted from 0; other columns are metadata, binary ones left out."""
    with file.filesystem.open(file.path, "rb") as raw:
        table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)
        columns = _columns(table.schema_arrow, file, reading)
        if columns is not None:
            batches = table.iter_batches(ROWS_AT_ONCE, columns=columns)
            yield from _rows((pa.Table.from_batches([batch]) for batch in batches), table.metadata.num_rows, file, reading)


def read_dataset(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A document for each row of a dataset that was saved with ``save_to_disk``, as in a Parquet file."""
    import datasets

    try:
        dataset = datasets.load_from_disk(file.place if file.remote else file.path)
    except Exception as error:  # It says in many ways that its files are missing or damaged.
        raise OSError(f"{type(error).__name__}: {error}") from error
    columns = _columns(dataset.data.schema, file, reading)
    if columns is not None:
        batches = dataset.with_format("arrow").select_columns(columns).iter(ROWS_AT_ONCE)
        yield from _rows(batches, len(dataset), file, reading)


def _columns(schema: pa.Schema, file: InputFile, reading: Reading) -> list[str] | None:
    """The columns to be read; None for a table that can't be, which is noted."""
    texts = [column.name for column in schema if _is_text(column.type)]
    if reading.text_field not in texts:
        others = f"of its columns {', '.join(texts)} hold strings" if texts else "none of its columns holds strings"
        reading.problems.found("no text", f'{file.place} has no column "{reading.text_field}" of strings; --text-field names it, {others}')
        return None
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        reading.problems.found("unreadable files", f'{file.place} has two columns "{twice[0]}"')
        return None
    binary = [column.name for column in schema if _holds_binary(column.type)]
    for name in binary:
        reading.left_out.add(BINARY_COLUMNS, f"{file.name}: {name}")
    return [name for name in schema.names if name not in binary]


def _rows(tables: Iterator[pa.Table], rows: int, file: InputFile, reading: Reading) -> Iterator[Document]:
    number = 0
    for table in tables:
        for record in _records(table):
            where = f"{file.place}, row {number}"
            if isinstance(record, Exception):
                reading.problems.found("unreadable values", f"{where} holds a value that can't be read: {record}")
            elif (document := document_of(record, file, number, where, reading)) is not None:
                yield document
            number += 1
        reading.meter.count_rows(number, rows)


def _records(table: pa.Table) -> Iterator[dict[str, Any] | Exception]:
    """Rows as JSON could hold them, or why one can't be converted."""
    kinds = [_microseconds(kind) for kind in table.schema.types]
    if kinds != table.schema.types:
        table = table.cast(pa.schema(list(zip(table.schema.names, kinds, strict=True))), safe=False)
    try:
        rows = table.to_pylist()
    except UNCONVERTIBLE as error:
        if len(table) == 1:
            yield error
            return
        for row in range(len(table)):
            yield from _records(table.slice(row, 1))
    else:
        yield from map(plain, rows)


def plain(value: Any) -> Any:
    """A value as JSON holds it: dates and times in ISO 8601, durations in seconds; numbers it does not know as strings."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return str(value)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_binary(kind: pa.DataType) -> bool:
    """Whether it is bytes, or something that bytes are a part of, such as an image."""
    if isinstance(kind, pa.BaseExtensionType):
        return not isinstance(kind, pa.UuidType) and _holds_binary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_binary(kind.value_type)
    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_it(kind) for is_it in is_binary) or any(_holds_binary(kind.field(at).type) for at in range(kind.num_fields))


def _microseconds(kind: pa.DataType) -> pa.DataType:
    """The type with times to the microsecond, which is what Python's own have."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz) if kind.unit == "ns" else kind
    if pa.types.is_duration(kind):
        return pa.duration("us") if kind.unit == "ns" else kind
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_microseconds(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_microseconds(kind.key_type), _microseconds(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(_microseconds(kind.value_type))
    return pa.large_list(_microseconds(kind.value_type)) if pa.types.is_large_list(kind) else kind

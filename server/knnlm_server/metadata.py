"""A document's metadata as a ``google.protobuf.Struct`` and back. Knows no transport.

A Struct's numbers are doubles and its depth is bounded by what protobuf's parsers accept. What it can't hold goes as
text, so that nothing is rounded or lost: an integer beyond 2^53 in decimal digits, NaN and infinities by their names in
protobuf's JSON (``NaN``, ``Infinity``, ``-Infinity``), a list or object inside 16 others as JSON. Half of a surrogate pair, which
UTF-8 can't hold, becomes U+FFFD.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2

# Each level of JSON is up to three of protobuf's, whose parsers refuse messages more than 100 deep.
DEEPEST = 16
_LARGEST_EXACT = 2**53


def metadata_message(values: Mapping[str, Any]) -> struct_pb2.Struct:
    """The Struct of what JSON can hold: None, booleans, numbers, strings, lists and objects by name."""
    return _struct(values, 1)


def read_metadata(struct: struct_pb2.Struct) -> dict[str, Any]:
    """The values of a Struct in the order of their names; whole numbers as integers."""
    return {name: _read(value) for name, value in sorted(struct.fields.items())}


def _struct(values: Mapping[str, Any], depth: int) -> struct_pb2.Struct:
    return struct_pb2.Struct(fields={_utf8(str(name)): _value(value, depth) for name, value in values.items()})


def _value(value: Any, depth: int) -> struct_pb2.Value:
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=_utf8(value))
    if depth == DEEPEST:
        return struct_pb2.Value(string_value=json.dumps(value, sort_keys=True))
    if isinstance(value, Mapping):
        return struct_pb2.Value(struct_value=_struct(value, depth + 1))
    return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[_value(part, depth + 1) for part in value]))


def _number(value: float) -> struct_pb2.Value:
    if isinstance(value, int):
        return struct_pb2.Value(number_value=value) if abs(value) <= _LARGEST_EXACT else struct_pb2.Value(string_value=str(value))
    if math.isfinite(value):
        return struct_pb2.Value(number_value=value)
    return struct_pb2.Value(string_value="NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity")


def _read(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return read_metadata(value.struct_value)
    if kind == "list_value":
        return [_read(part) for part in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= _LARGEST_EXACT else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def _utf8(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

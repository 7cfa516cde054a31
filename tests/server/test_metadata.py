"""Metadata of documents as a Struct: what JSON can hold arrives, and what a Struct can't hold arrives as text."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from knnlm_server.metadata import DEEPEST, metadata_message, read_metadata

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
number = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def over_the_wire(metadata: dict[str, Any]) -> dict[str, Any]:
    return read_metadata(struct_pb2.Struct.FromString(metadata_message(metadata).SerializeToString()))


@given(st.dictionaries(text, values, max_size=4))
def test_what_a_struct_can_hold_arrives(metadata: dict[str, Any]) -> None:
    assert over_the_wire(metadata) == metadata


def test_kinds_stay_apart() -> None:
    sent = {"none": None, "no": False, "zero": 0, "half": 0.5, "empty": "", "list": [], "object": {}}
    found = over_the_wire(sent)
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in sent.items()}
    assert list(found) == sorted(sent)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (2**53, 2**53),
        (2**53 + 1, "9007199254740993"),
        (-(2**70), "-1180591620717411303424"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        ("\ud800x\U0001f600", "\ufffdx\U0001f600"),
    ],
)
def test_what_a_struct_cannot_hold_arrives_as_text(value: Any, sent: Any) -> None:
    assert over_the_wire({"at": [value]}) == {"at": [sent]}


def test_names_that_utf8_cannot_hold_arrive() -> None:
    assert over_the_wire({"\ud800": 1}) == {"\ufffd": 1}


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"in": value}])
def test_what_is_too_deep_arrives_as_json(wrap: Any) -> None:
    value: Any = "core"
    for _ in range(200):
        value = wrap(value)
    found: Any = over_the_wire({"deep": value})
    for _ in range(DEEPEST):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    assert isinstance(found, str)
    assert "core" in json.dumps(json.loads(found))


@given(st.dictionaries(text, values, max_size=4))
def test_other_clients_can_write_it_as_json(metadata: dict[str, Any]) -> None:
    assert json_format.MessageToDict(metadata_message(metadata)) == metadata

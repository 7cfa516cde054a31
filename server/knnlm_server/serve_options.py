"""Options of ``knnlm serve`` that hold several values: datastores by name, and limits."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knnlm.errors import InvalidInput
from knnlm_server.sequence import DATASTORE_NAME, Limits

DEFAULT_NAME = "default"
"""Name of the datastore that is given without one."""

_OWN_OPTIONS = {"context": "--max-context", "max_concurrent": "--max-concurrent"}
# What gRPC's own options hold.
_LARGEST = 2**31 - 1


def named_datastores(store: Path | None, given: Sequence[str]) -> dict[str, Path]:
    """Paths of datastores by name, the default one first; ``given``: NAME=PATH. Raises :class:`InvalidInput`."""
    stores = {} if store is None else {DEFAULT_NAME: store}
    for text in given:
        name, path = _split("datastore", text, "wiki=stores/wiki")
        if not DATASTORE_NAME.fullmatch(name):
            raise InvalidInput(
                "datastore",
                f"is {text!r}, but a name has 1 to 64 letters, digits, -, _ and ., of which the first is a letter or digit.",
            )
        if name in stores:
            raise InvalidInput("datastore", f"is {text!r}, but there is a datastore {name!r} already, at {stores[name]}.")
        stores[name] = Path(path)
    if not stores:
        raise InvalidInput("datastore", "is not given; name at least one datastore, as STORE or as --datastore NAME=PATH.")
    return stores


def chosen_limits(given: Sequence[str]) -> dict[str, Any]:
    """Fields of :class:`Limits` that ``given``, NAME=VALUE each, say. Raises :class:`InvalidInput`."""
    limits: dict[str, Any] = {}
    for text in given:
        name, value = _split("limit", text, "max_k=256")
        if name in limits:
            raise InvalidInput("limit", f"gives {name} twice.")
        limits[name] = _limit(name, value)
    return limits


def _limit(name: str, text: str) -> int | float:
    if name in _OWN_OPTIONS:
        raise InvalidInput("limit", f"is {name}={text}, but that limit has the option {_OWN_OPTIONS[name]}.")
    names = [field.name for field in dataclasses.fields(Limits) if field.name not in _OWN_OPTIONS]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise InvalidInput("limit", f"is {name}={text}, but there is no such limit; {_did_you_mean(near, names)}")
    kind = float if name == "max_seconds" else int
    try:
        value = kind(text)
    except ValueError:
        value = kind(0)
    if not 0 < value <= (math.inf if kind is float else _LARGEST) or value == math.inf:
        wanted = "a number above 0" if kind is float else f"a whole number from 1 to {_LARGEST}"
        raise InvalidInput("limit", f"is {name}={text}, but must be {wanted}.")
    return value


def _did_you_mean(near: Sequence[str], names: Sequence[str]) -> str:
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."


def _split(option: str, text: str, example: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise InvalidInput(option, f"is {text!r}, but must be NAME=VALUE, such as {example}.")
    return name, value

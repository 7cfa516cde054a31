"""From JSON to dataclasses: every field there, and of its type. Knows the types, not what they mean."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from knnlm.errors import InvalidInput, StoreDamaged

T = TypeVar("T")


def parse(kind: type[T], content: Any, where: str) -> T:
    """Build a dataclass from the JSON object ``content``, checking every field's presence and type.

    Fields that the class does not have are read over. Raises :class:`StoreDamaged`, which says ``where``.
    """
    if not isinstance(content, dict):
        raise StoreDamaged(f"{where} is damaged: expected an object for {kind.__name__}, found {type(content).__name__}.")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if missing := sorted(names - set(content)):
        raise StoreDamaged(f"{where} is damaged: {kind.__name__} lacks {', '.join(missing)}.")
    values = {name: parse_value(hints[name], content[name], f"{where}: {name}") for name in names}
    try:
        return kind(**values)
    except InvalidInput as error:
        raise StoreDamaged(f"{where} is damaged: {error}") from error


def parse_value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` says; raises :class:`StoreDamaged`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast("type[Any]", hint), value, where)
    if origin is types.UnionType:
        return None if value is None and type(None) in arguments else parse_value(arguments[0], value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is list and isinstance(value, list):
        return [parse_value(arguments[0], item, where) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {key: parse_value(arguments[1], item, f"{where}[{key}]") for key, item in value.items()}
    elif origin is None and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise StoreDamaged(f"{where} is damaged: found {value!r}.")

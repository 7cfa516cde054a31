"""What every reader of messages needs: fields that are set, their paths, and refusals that name them."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from knnlm.errors import InvalidInput


def at(path: str, name: str) -> str:
    """The path of a field below ``path``."""
    return f"{path}.{name}" if path else name


def values_of(message: Message) -> dict[str, Any]:
    """The fields that are set, by name; lists as tuples."""
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


def refuse_unknown(message: Message, path: str = "") -> None:
    """Raise for a field of a newer client that this server would otherwise ignore."""
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidInput(path or "request", f"has field number {unknown[0].field_number}, which this server does not know.")
    for field, value in message.ListFields():
        place = at(path, field.name)
        if isinstance(value, Message):
            refuse_unknown(value, place)
        elif field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for number, part in enumerate(value):
                refuse_unknown(part, f"{place}[{number}]")


def count(number: int, name: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def require(condition: bool, field: str, problem: str) -> None:
    """Raise :class:`InvalidInput` unless the condition holds."""
    if not condition:
        raise InvalidInput(field, problem)

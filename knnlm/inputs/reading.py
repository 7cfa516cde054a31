"""What the readers of all formats are given, and what they share: fields of records, pieces of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from knnlm.inputs.document import Document
from knnlm.inputs.files import InputFile, Meter
from knnlm.inputs.options import DEFAULT_ID_FIELD
from knnlm.inputs.problems import LeftOut, Problems
from knnlm.inputs.splitting import split


@dataclass(frozen=True)
class Reading:
    """One reading of a corpus: how it is to be read, and where a reader says what it found.

    ``cut``: a document of a text file begins at each match (None: a file is a document). ``text_field``, ``id_field``:
    of records.
    """

    cut: re.Pattern[str] | None
    text_field: str
    id_field: str
    problems: Problems
    meter: Meter
    left_out: LeftOut


Reader = Callable[[InputFile, Reading], Iterator[Document]]
"""What makes documents of a file; it raises what :func:`knnlm.inputs.files.is_unreadable` knows for one that is damaged."""


def pieces(file: InputFile, chunks: Iterable[str], reading: Reading, metadata: Mapping[str, Any]) -> Iterator[Document]:
    """The documents of a text that comes in chunks: one, or those that begin at each match of ``split_documents``."""
    if reading.cut is None:
        yield Document(file.name, file.source, "".join(chunks), metadata=dict(metadata))
        return
    character, line = 0, 1
    for number, piece in enumerate(split(chunks, reading.cut)):
        place = {"first_character": character, "first_line": line}
        yield Document(f"{file.name}#{number}", file.source, piece, metadata={**metadata, **place})
        character, line = character + len(piece), line + piece.count("\n")


def document_of(record: Mapping[str, Any], file: InputFile, number: int, where: str, reading: Reading) -> Document | None:
    """The document of a record, with its other fields as metadata; None for one that is no document, which is noted.

    ``number`` of its line or row names it where it has no id; ``where`` says file and place.
    """
    text = record.get(reading.text_field)
    if not isinstance(text, str):
        reading.problems.found("no text", f'{where} has no field "{reading.text_field}" with a string (--text-field names another one)')
        return None
    if not text:
        reading.problems.found("empty text", f'{where} has an empty field "{reading.text_field}"')
        return None
    identity = record.get(reading.id_field)
    if not isinstance(identity, str | int):
        if reading.id_field != DEFAULT_ID_FIELD:
            reading.problems.found("no id", f'{where} has no field "{reading.id_field}" with a string or whole number')
            return None
        identity = f"{file.name}:{number}"
    return Document(str(identity), file.source, text, metadata={key: value for key, value in record.items() if key != reading.text_field})

"""JSON lines: a document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from knnlm.inputs.document import Document
from knnlm.inputs.files import InputFile, opened
from knnlm.inputs.reading import Reading, document_of


def read_jsonl(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A document for each line that is not blank: a JSON object with the text in a field, and perhaps an id."""
    with opened(file, reading.meter) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file.place}, line {number}"
            record = _parse(line, where, reading)
            if record is not None and (document := document_of(record, file, number, where, reading)) is not None:
                yield document


def _parse(line: bytes, where: str, reading: Reading) -> dict[str, Any] | None:
    problems = reading.problems
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        problems.found("not UTF-8", f"{where} is not UTF-8: byte {error.start} of the line is 0x{error.object[error.start]:02x}")
        return None
    except (ValueError, RecursionError) as error:
        problems.found("broken JSON", f"{where} is no JSON: {error}")
        return None
    if not isinstance(record, dict):
        problems.found("no text", f'{where} has no field "{reading.text_field}" with a string: it is no JSON object')
        return None
    if b"\\u" in line and not is_unicode(json.dumps(record, ensure_ascii=False)):
        problems.found("half surrogate pairs", f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        return None
    return record


def is_unicode(text: str) -> bool:
    """Whether all of it are characters, so that it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Text files: UTF-8, read as a stream."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from io import BufferedReader

from knnlm.inputs.document import Document
from knnlm.inputs.files import CHUNK, UNREADABLE, InputFile, Meter, opened
from knnlm.inputs.reading import Reading, pieces


class NotUTF8(Exception):
    """Bytes are no UTF-8; its text says which and where."""


def read_text(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A text file is one document, or is cut at each match of ``split_documents``; it must be UTF-8."""
    try:
        if reading.cut is not None and not reading.problems.are_fatal:
            _require_utf8(file)
        with opened(file, reading.meter) as stream:
            yield from pieces(file, decoded(stream), reading, {})
    except NotUTF8 as error:
        reading.problems.found("not UTF-8", f"{file.place} is not UTF-8: {error}")


def decoded(stream: BufferedReader) -> Iterator[str]:
    """Text of a UTF-8 stream in chunks, without a byte order mark. Raises :class:`NotUTF8`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, is_first, is_last = 0, True, False
    while not is_last:
        chunk = stream.read1(CHUNK)
        is_last = not chunk
        try:
            text = decoder.decode(chunk, final=is_last)
        except UnicodeDecodeError as error:
            at = read + len(chunk) - len(error.object) + error.start
            raise NotUTF8(f"byte {at} is 0x{error.object[error.start]:02x}") from None
        read += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False


def _require_utf8(file: InputFile) -> None:
    """A file that is cut into documents is left out as a whole or not at all, so none is given away before the last byte."""
    try:
        with opened(file, Meter()) as stream:
            for _ in decoded(stream):
                pass
    except UNREADABLE:
        pass  # What can be read of it stays, and reading it says what can't.

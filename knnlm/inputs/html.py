"""Web pages: their visible text with its lines. Needs resiliparse, the extra ``html``."""

from __future__ import annotations

from collections.abc import Iterator

from knnlm.inputs.document import Document
from knnlm.inputs.files import InputFile, opened
from knnlm.inputs.reading import Reading, pieces

BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
UTF8 = "utf-8"


def read_html(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A page's text, headings, paragraphs, list items and table rows on lines of their own; nothing is taken for boilerplate.

    Its title is metadata, and so is its encoding where that is not UTF-8.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    with opened(file, reading.meter) as stream:
        content = stream.read()
    encoding = encoding_of(content)
    try:
        tree = HTMLTree.parse(content.decode(encoding).removeprefix("\ufeff"))
    except (UnicodeError, LookupError) as error:
        reading.problems.found(
            "unreadable HTML", f"{file.place} can't be read as {encoding}, the encoding that it declares or seems to have: {error}"
        )
        return
    metadata = {"title": tree.title} if tree.title else {}
    if encoding != UTF8:
        metadata["encoding"] = encoding
    yield from pieces(file, [extract_plain_text(tree, preserve_formatting=True)], reading, metadata)


def encoding_of(page: bytes) -> str:
    """The encoding of a page: of its byte order mark; UTF-8 if it can be that; what it declares; else a guess.

    Zero and escape bytes are UTF-8 too, but come from UTF-16 and ISO-2022 there.
    """
    from resiliparse.parse.encoding import detect_encoding

    for mark, encoding in BYTE_ORDER_MARKS.items():
        if page.startswith(mark):
            return encoding
    if b"\0" not in page and b"\x1b" not in page and _is_utf8(page):
        return UTF8
    return str(detect_encoding(page, from_html_meta=True))


def _is_utf8(page: bytes) -> bool:
    try:
        page.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Cutting a text that comes in chunks gives the pieces that cutting all of it gives."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knnlm.corpus import Corpus
from knnlm.inputs.files import CHUNK
from knnlm.inputs.splitting import MARGIN, compile_cut, split

MARGIN_HERE = 6
PATTERNS = [
    "", "^", "$", "^$", "a", "ab", "^=", "=$", "^= ?a", "(?<=\n)a", "(?<!b)a(?!b)", r"\ba", r"a\b", r"\B", "(?=ab)", r"\Aa", r"b\Z",
    "(?<=^a)b", "(?<=ba)=", "a{1,3}", r"(a|b)\1", r"\n+?", "a*?b?", "(?!a)", "[^a]{2}", "a?", "(?s:.)=", "\r?\n", "€|b",
    # Of any length: a match is certain only when it ends well before what is not known yet.
    "a*", "^=.*$", "=+", r"\s+", "a+b|b",
]  # fmt: skip
"""Each looks at no more than MARGIN_HERE characters, but for those that are said to be longer."""


def at_once(text: str, pattern: str) -> list[str]:
    """The definition: the whole text, and a piece from each match to the next."""
    starts = sorted({0, *(match.start() for match in re.compile(pattern, re.MULTILINE).finditer(text))})
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def cut_into(text: str, sizes: list[int]) -> Iterator[str]:
    """The text in chunks of these sizes, again and again."""
    at, number = 0, 0
    while at < len(text):
        yield text[at : at + sizes[number % len(sizes)]]
        at, number = at + sizes[number % len(sizes)], number + 1


@settings(max_examples=600)
@given(st.text("aab=\n €", max_size=60), st.sampled_from(PATTERNS), st.lists(st.integers(1, 20), min_size=1, max_size=4))
@example("aaaaaaaaaaaaaaab" * 3, "a*", [1])
@example("\n\n\n\n\n\n\n\n\n\n", "$", [2])
@example("= aaaaaaaaaaaaaaaaaaa\n=\nb\n= a", "^=.*$", [3])
def test_pieces_do_not_depend_on_chunks(text: str, pattern: str, sizes: list[int]) -> None:
    assert list(split(cut_into(text, sizes), compile_cut(pattern), MARGIN_HERE)) == at_once(text, pattern)


@given(st.text("ab", min_size=30, max_size=60), st.integers(1, 9))
def test_what_a_match_looks_at_may_be_as_long_as_the_margin(text: str, size: int) -> None:
    pattern = "(?<=a.{4})b(?=.{4}a)"
    assert list(split(cut_into(text, [size]), compile_cut(pattern), MARGIN_HERE)) == at_once(text, pattern)


def test_a_file_larger_than_the_chunk_is_cut_as_one_that_is_not(tmp_path: Path) -> None:
    chance = random.Random(0)
    lines = ["= Title €🙂 =" if chance.random() < 0.0001 else "a line of the text\r" for _ in range(150_000)]
    text = "\n".join(lines) + "= no title =\n" + "x" * (MARGIN + 5) + "\n= The last =\n"
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    assert path.stat().st_size > 2 * CHUNK
    documents = list(Corpus([path], "^= .* =$"))
    pieces = at_once(text, "^= .* =$")
    assert len(pieces) > 5
    assert [document.text for document in documents] == pieces
    starts = [document.metadata["first_character"] for document in documents]
    assert starts == [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    assert [document.metadata["first_line"] for document in documents] == [text[:start].count("\n") + 1 for start in starts]


@pytest.mark.parametrize("text", ["", "a", "\n"])
def test_short_texts(text: str) -> None:
    for pattern in PATTERNS:
        assert list(split([text] if text else [], compile_cut(pattern))) == at_once(text, pattern)


def test_what_is_kept_is_the_piece_and_the_margin() -> None:
    """Twenty megabytes of pieces go by, and text that nothing needs any more is not held on to."""
    tracemalloc.start()
    try:
        count = sum(1 for _ in split(("=" + "a" * 9_999 for _ in range(2000)), compile_cut("="), 100))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2000
    assert peak < 200_000

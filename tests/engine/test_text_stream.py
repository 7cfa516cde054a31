"""A completion's text, token by token: nothing lost, no character cut, stop strings found across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.tokenization import REPLACEMENT, TextTokenizer
from knnlm_server.text_stream import TextStream
from tests.tiny import byte_fallback_tokenizer, tiny_corpus, tiny_tokenizer

BYTE_LEVEL = TextTokenizer(tiny_tokenizer())
TOKENIZERS = [BYTE_LEVEL, TextTokenizer(byte_fallback_tokenizer())]
# Few letters, so that stop strings are met often; characters of 1 to 4 bytes.
LETTERS = st.sampled_from(["a", "b", "c", " ", "\n", "é", "ж", "語", "🙂", "e\u0301"])
TEXTS = st.one_of(st.lists(LETTERS, max_size=25).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=15))
STOPS = st.lists(st.lists(LETTERS, min_size=1, max_size=4).map("".join), max_size=3).map(tuple)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """``text`` up to the stop string that is complete first, wherever token borders lie; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def stream(tokens: list[int], stops: tuple[str, ...], tokenizer: TextTokenizer = BYTE_LEVEL) -> tuple[list[str], TextStream]:
    """The pieces of text after the prompt "x" in the order they came, the last one from ``finish``."""
    texts = TextStream(tokenizer, tokenizer.encode("x"), stops)
    pieces = []
    for token in tokens:
        pieces.append(texts.push(token))
        if texts.stopped:
            break
    return [*pieces, texts.finish()], texts


@given(TEXTS, STOPS, st.sampled_from(TOKENIZERS))
@settings(max_examples=300)
def test_the_pieces_are_the_whole_text_up_to_the_first_stop_string(text: str, stops: tuple[str, ...], tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode(text)
    whole = tokenizer.decode([*tokenizer.encode("x"), *tokens]).removeprefix("x")
    pieces, texts = stream(tokens, stops, tokenizer)
    assert "".join(pieces) == cut(whole, stops)
    assert texts.stopped == any(stop in whole for stop in stops)
    assert REPLACEMENT in whole or all(REPLACEMENT not in piece for piece in pieces), "a character was cut"


@given(TEXTS, STOPS)
def test_what_was_handed_out_is_never_taken_back(text: str, stops: tuple[str, ...]) -> None:
    """After every push, what was released is a beginning of the answer whatever comes next, and lags by no more than it must."""
    tokens = BYTE_LEVEL.encode(text)
    texts = TextStream(BYTE_LEVEL, [], stops)
    released = ""
    for number, token in enumerate(tokens, start=1):
        released += texts.push(token)
        if texts.stopped:
            break
        certain = BYTE_LEVEL.decode(tokens[:number])
        held = certain[len(released) :].rstrip(REPLACEMENT)
        assert certain.startswith(released)
        assert held == "" or any(stop.startswith(held) for stop in stops), f"{held!r} was held back without a reason"


@given(st.lists(LETTERS, min_size=1, max_size=20).map("".join), st.integers(0, 20))
def test_text_of_a_completion_does_not_depend_on_where_the_prompt_ends(text: str, border: int) -> None:
    tokens = BYTE_LEVEL.encode(text)
    prompt, completion = tokens[:border], tokens[border:]
    if REPLACEMENT in BYTE_LEVEL.decode(prompt):
        return  # the prompt ends within a character, of which neither side has the whole
    texts = TextStream(BYTE_LEVEL, prompt)
    pieces = [texts.push(token) for token in completion]
    assert BYTE_LEVEL.decode(prompt) + "".join(pieces) + texts.finish() == text


@given(TEXTS, STOPS, st.integers(0, 12))
def test_stop_strings_that_may_not_stop_yet_are_text(text: str, stops: tuple[str, ...], least: int) -> None:
    tokens = BYTE_LEVEL.encode(text)
    texts = TextStream(BYTE_LEVEL, [], stops)
    pieces, number = [], 0
    for number, token in enumerate(tokens, start=1):
        pieces.append(texts.push(token, may_stop=number >= least))
        assert number >= least or not texts.stopped
        if texts.stopped:
            break
    whole = BYTE_LEVEL.decode(tokens)
    assert whole.startswith("".join(pieces))
    # Stop strings that are complete only now, begun before or not, do stop.
    now, before = BYTE_LEVEL.decode(tokens[:number]), BYTE_LEVEL.decode(tokens[: number - 1])
    if number >= least and REPLACEMENT not in now + before:
        ends = range(len(before) + 1, len(now) + 1)
        assert texts.stopped == any(now[:end].endswith(stop) for stop in stops for end in ends)
    if not texts.stopped:
        assert "".join(pieces) + texts.finish() == whole


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("apples",), "sold seven "),
        (("seven apples", "apples near"), "sold "),
        (("even", "seven apples"), "sold s"),
        (("s near", "les"), "sold seven app"),
        (("none",), "sold seven apples near the river"),
        ((), "sold seven apples near the river"),
        (("r",), "sold seven apples nea"),
    ],
)
def test_the_stop_string_that_is_complete_first_decides(stops: tuple[str, ...], expected: str) -> None:
    pieces, _ = stream(BYTE_LEVEL.encode("sold seven apples near the river"), stops)
    assert "".join(pieces) == expected


def test_a_stop_string_within_one_token_gives_the_text_before_it() -> None:
    token = next(t for t in range(1, 300) if len(BYTE_LEVEL.token_text(t)) >= 4)
    text = BYTE_LEVEL.token_text(token)
    # The second is complete first, in one token as it would be in several.
    for stops in ((text[2:4],), (text[:4], text[2:3])):
        texts = TextStream(BYTE_LEVEL, [], stops)
        assert texts.push(token) == text[:2]
        assert texts.stopped
        assert texts.finish() == ""


def test_a_character_of_four_tokens_is_whole_also_after_a_token_without_text() -> None:
    tokenizer = TOKENIZERS[1]
    texts = TextStream(tokenizer, [])
    assert "".join(texts.push(token) for token in tokenizer.encode("𐀀")) == "𐀀"


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    tokens = BYTE_LEVEL.encode("ok 🙂")[:-1]
    pieces, _ = stream(tokens, ())
    assert "".join(pieces[:-1]) == "ok "
    assert pieces[-1].strip(REPLACEMENT) == ""
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens)


def test_plain_text_comes_with_its_token() -> None:
    tokens = BYTE_LEVEL.encode(tiny_corpus(1)[0])
    pieces, _ = stream(tokens, ())
    assert all(pieces[:-1])
    assert pieces[-1] == ""

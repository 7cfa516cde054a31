"""Tokenization: special tokens as asked for, and text that arrives token by token as the whole would."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput, ModelError
from knnlm.tokenization import REPLACEMENT, IncrementalDetokenizer, TextTokenizer
from tests.tiny import VOCABULARY, byte_fallback_tokenizer, tiny_corpus, tiny_tokenizer

TEXTS = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_categories=["Cs"]),
        st.sampled_from("👩‍🔬🇩🇪é中文日本語 한국어\u200d\ufe0f\u0301"),
        st.sampled_from("abc \n"),
    ),
    max_size=30,
)


@cache
def byte_level() -> TextTokenizer:
    return TextTokenizer(tiny_tokenizer())


@cache
def byte_fallback() -> TextTokenizer:
    return TextTokenizer(byte_fallback_tokenizer(), "no")


def stream(tokenizer: TextTokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    """What each token gives, and the rest at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, context)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@given(TEXTS)
@example("👩‍🔬 €uro \U0001f1e9\U0001f1ea")
def test_text_in_pieces_is_the_text(text: str) -> None:
    ids = byte_level().encode(text)
    assert "".join(stream(byte_level(), ids)) == byte_level().decode(ids) == text


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=20))
@example([222, 222, 222, 159, 225, 106, 65])
@example([159, 159, 159, 159, 225, 106, 65])
def test_any_tokens_in_pieces_are_their_text(ids: list[int]) -> None:
    assert "".join(stream(byte_level(), ids)) == byte_level().decode(ids)


@given(TEXTS)
def test_no_piece_holds_a_cut_character(text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    assert not any(REPLACEMENT in piece for piece in stream(byte_level(), byte_level().encode(text)))
    assert not any(REPLACEMENT in piece for piece in stream(byte_fallback(), byte_fallback().encode(text)))


@given(TEXTS)
@example("a €€ 😀😀 b")
def test_text_in_pieces_with_a_byte_fallback_tokenizer(text: str) -> None:
    ids = byte_fallback().encode(text)
    assert "".join(stream(byte_fallback(), ids)) == byte_fallback().decode(ids)


@given(TEXTS)
@example("😀😀")
def test_text_after_a_prompt_keeps_its_spaces(text: str) -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        context, ids = tokenizer.encode("the prompt"), tokenizer.encode("the prompt " + text)
        if ids[: len(context)] == context:
            pieces = stream(tokenizer, ids[len(context) :], context)
            assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(context)) :]


def test_ascii_comes_at_once() -> None:
    ids = byte_level().encode("The farmer sold seven apples.")
    pieces = stream(byte_level(), ids)
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_a_character_of_several_tokens_comes_whole_with_its_last() -> None:
    ids = byte_level().encode("a😀b")
    assert stream(byte_level(), ids) == ["a", "", "", "", "😀", "b", ""]


def test_a_cut_character_at_the_end_is_given_by_finish_only() -> None:
    ids = byte_level().encode("a😀")[:-1]
    assert stream(byte_level(), ids) == ["a", "", "", "", REPLACEMENT]


def test_bytes_that_are_no_text_do_not_hold_back_what_follows() -> None:
    stray = byte_level().encode("é")[1]
    pieces = stream(byte_level(), [stray] * 12)
    assert sum(len(piece) for piece in pieces[:-1]) >= 8
    assert "".join(pieces) == REPLACEMENT * 12


def test_special_tokens_give_no_text() -> None:
    assert stream(byte_level(), [0, *byte_level().encode("ab"), 0]) == [
        "",
        *(list("ab") if len(byte_level().encode("ab")) == 2 else ["ab"]),
        "",
        "",
    ]
    assert byte_level().token_text(0) == "<|endoftext|>"
    assert byte_level().token_text(VOCABULARY + 5) == f"<{VOCABULARY + 5}>"
    assert byte_level().token_text(byte_level().encode("a")[0]) == "a"


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [(False, "auto", None), (True, "auto", 0), (False, "yes", 0), (True, "yes", 0), (False, "no", None), (True, "no", None)],
)
def test_bos_is_added_where_the_tokenizer_adds_it_or_as_asked(adds_bos: bool, bos: str, expected: int | None) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer(adds_bos=adds_bos), bos)  # type: ignore[arg-type]
    assert tokenizer.bos_id == expected
    plain = byte_level().encode("the sailor")
    assert tokenizer.encode("the sailor") == ([] if expected is None else [expected]) + plain
    assert tokenizer.encode("") == ([] if expected is None else [expected])


def test_eos_ends_documents_and_never_a_prompt() -> None:
    tokenizer = TextTokenizer(tiny_tokenizer(adds_bos=True), "auto", eos=True)
    (encoding,) = tokenizer.encode_documents(["the sailor"])
    assert (encoding.ids[0], encoding.ids[-1]) == (0, 0)
    assert tokenizer.encode("the sailor") == encoding.ids[:-1]
    assert tokenizer.eos_id == 0
    assert byte_level().eos_id is None


def test_spans_point_at_the_text_of_each_token() -> None:
    text = "The sailor sold 😀 seven apples.\n"
    tokenizer = TextTokenizer(tiny_tokenizer(), "yes", eos=True)
    (encoding,) = tokenizer.encode_documents([text])
    assert len(encoding.ids) == len(encoding.spans)
    assert (encoding.spans[0], encoding.spans[-1]) == ((0, 0), (0, 0))
    for token, (start, end) in zip(encoding.ids[1:-1], encoding.spans[1:-1], strict=True):
        piece = tokenizer.token_text(token)
        assert text[start:end] == piece or REPLACEMENT in piece
    assert [start for start, _ in encoding.spans[1:-1]] == sorted(start for start, _ in encoding.spans[1:-1])


@given(st.lists(TEXTS, max_size=4))
def test_documents_encode_each_for_itself(texts: list[str]) -> None:
    assert [e.ids for e in byte_level().encode_documents(texts)] == [byte_level().encode(text) for text in texts]


@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_truncation_and_padding_saved_with_a_tokenizer_cut_nothing(bos: str) -> None:
    raw = tiny_tokenizer()
    raw.pad_token = raw.eos_token
    raw.backend_tokenizer.enable_truncation(max_length=8)
    raw.backend_tokenizer.enable_padding(length=300)
    tokenizer = TextTokenizer(raw, bos)  # type: ignore[arg-type]
    plain = TextTokenizer(tiny_tokenizer(), bos)  # type: ignore[arg-type]
    text = tiny_corpus(1)[0]
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.encode_documents([text, "a"]) == plain.encode_documents([text, "a"])
    raw("a long text that is cut", truncation=True, max_length=4, padding="max_length")
    assert tokenizer.encode_documents([text, "a"]) == plain.encode_documents([text, "a"])


def test_a_slow_tokenizer_is_refused_with_what_to_use() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow.*fast tokenizer"):
        TextTokenizer(Slow())


def test_bos_and_eos_that_the_tokenizer_lacks_are_refused() -> None:
    raw = tiny_tokenizer()
    raw.bos_token = raw.eos_token = None
    with pytest.raises(InvalidInput, match="no BOS") as refused:
        TextTokenizer(raw, "yes")
    assert refused.value.field == "bos"
    with pytest.raises(InvalidInput, match="no EOS") as refused:
        TextTokenizer(raw, "no", eos=True)
    assert refused.value.field == "eos"
    assert TextTokenizer(raw, "auto").bos_id is None
    with pytest.raises(InvalidInput, match="maybe") as refused:
        TextTokenizer(raw, "maybe")  # type: ignore[arg-type]
    assert refused.value.field == "bos"

"""Text to token ids and back: which special tokens a document or prompt gets, and text that arrives token by token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from knnlm.errors import InvalidInput, ModelError

BosMode = Literal["auto", "yes", "no"]
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text and, for each, its character span [start, end) there (0, 0 for special tokens)."""

    ids: list[int]
    spans: list[tuple[int, int]]


class TextTokenizer:
    """A Hugging Face tokenizer with the special tokens of a datastore: the same for documents, held-out text, prompts.

    ``bos``: ``auto`` adds the beginning-of-sequence token where the tokenizer does so by itself; ``eos`` ends each
    document with the end-of-sequence token (never a prompt). What they came to is :attr:`bos_id` and :attr:`eos_id`.
    """

    def __init__(self, tokenizer: Any, bos: BosMode = "auto", eos: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer (tokenizer.json)."
            )
        self._tokenizer = tokenizer
        # A copy without the truncation and padding that a tokenizer may have been saved with: no text is cut or filled up.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._token_texts: dict[int, str] = {}  # every token of a stream asks, and decoding one costs tens of microseconds
        self.bos_id = _bos_id(tokenizer, bos)
        self.eos_id = _eos_id(tokenizer) if eos else None

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the tokenizer knows."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: with BOS where documents have it, never with EOS."""
        ids = self.encode_plain(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, without any special token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids and character spans of documents, with BOS and EOS as set."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        before = [] if self.bos_id is None else [self.bos_id]
        after = [] if self.eos_id is None else [self.eos_id]
        nowhere = (0, 0)
        return [Encoding([*before, *e.ids, *after], [nowhere] * len(before) + list(e.offsets) + [nowhere] * len(after)) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out; bytes that are no whole character become U+FFFD."""
        text: str = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token for display, special ones by their name."""
        if (known := self._token_texts.get(token_id)) is None:
            known = self._token_texts[token_id] = self._token_text(token_id)
        return known

    def _token_text(self, token_id: int) -> str:
        if token_id in self._tokenizer.all_special_ids or token_id >= len(self._tokenizer):
            name = self._tokenizer.convert_ids_to_tokens(int(token_id)) if token_id < len(self._tokenizer) else None
            return str(name if name is not None else f"<{token_id}>")
        text: str = self._tokenizer.decode([int(token_id)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class IncrementalDetokenizer:
    """Text of a growing token sequence, never cutting a character.

    :meth:`push` returns what became certain: it decodes a short tail again with each token, so spaces that depend on
    the token before come out as in the whole text, and holds back U+FFFD at its end, which may be the first bytes of a
    character: all of them for the tokens that a character may take, then the last :data:`LONGEST_CHARACTER` - 1 only.
    """

    def __init__(self, tokenizer: TextTokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-6:])
        self._prefix, self._read = 0, len(self._ids)
        self._given = len(tokenizer.decode(self._ids))
        self._waiting = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now and was not before (may be empty)."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids[self._prefix :])
        held = len(text) - len(text.rstrip(REPLACEMENT))
        self._waiting = self._waiting + 1 if held else 0
        if self._waiting >= LONGEST_CHARACTER:
            held = min(held, LONGEST_CHARACTER - 1)
        piece = text[self._given : len(text) - held]
        self._given += len(piece)
        if piece and not held:
            self._prefix, self._read = self._read, len(self._ids)
            self._given = len(self._tokenizer.decode(self._ids[self._prefix :]))
        return piece

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that never became whole."""
        piece = self._tokenizer.decode(self._ids[self._prefix :])[self._given :]
        self._given += len(piece)
        return piece


def _bos_id(tokenizer: Any, bos: BosMode) -> int | None:
    if bos not in ("auto", "yes", "no"):
        raise InvalidInput("bos", f"is {bos!r}, but must be auto, yes or no.")
    token: int | None = tokenizer.bos_token_id
    if bos == "yes" and token is None:
        raise InvalidInput("bos", "is yes, but the model's tokenizer has no BOS token; use --bos no.")
    if bos == "auto":
        ids = tokenizer("a")["input_ids"]
        return token if token is not None and len(ids) > 0 and ids[0] == token else None
    return token if bos == "yes" else None


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InvalidInput("eos", "is set, but the model's tokenizer has no EOS token.")
    return int(tokenizer.eos_token_id)

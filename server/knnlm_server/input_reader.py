"""Token ids of the inputs in messages: text tokenised, ids checked, and nothing copied that is too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from knnlm.errors import InvalidInput
from knnlm_server.engine_protocol import PromptTokenizer
from knnlm_server.field_checks import count, require
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import ServerInfo


@dataclass(frozen=True)
class Room:
    """How many tokens an input may have. ``problem``: what is wrong with one of so many others; None: the end of a longer one
    is kept."""

    most: int
    problem: Callable[[int], str] | None = None
    least: int = 1


@dataclass(frozen=True)
class InputReader:
    """Token ids from inputs, checked against what is served. Every method raises :class:`InvalidInput`."""

    tokenizer: PromptTokenizer
    info: ServerInfo

    def tokens(self, message: pb.Input, path: str, room: Room) -> tuple[int, ...]:
        """The token ids of an input at ``path``, at least one."""
        kind = message.WhichOneof("content")
        require(kind is not None, path, "is not set; give text or token_ids.")
        field = f"{path}.text" if kind == "text" else f"{path}.token_ids.ids"
        # A message may hold millions of ids, so they are counted before they are copied.
        ids: Sequence[int] = self.encode(message.text, field) if kind == "text" else message.token_ids.ids
        require(len(ids) > 0, field, "has no tokens.")
        if room.problem is not None:
            require(room.least <= len(ids) <= room.most, field, room.problem(len(ids)))
        if kind != "text":
            self.check_ids(ids, field)
        return tuple(ids[-room.most :])

    def encode(self, text: str, field: str) -> list[int]:
        """The token ids of a text as a prompt."""
        self._check_size(text, field)
        return self.tokenizer.encode(text)

    def check_ids(self, ids: Iterable[int], field: str) -> None:
        """Refuse ids outside the vocabulary."""
        size = self.info.vocabulary_size
        if max(ids, default=0) < size:
            return
        position, token_id = next((position, token_id) for position, token_id in enumerate(ids) if token_id >= size)
        raise InvalidInput(f"{field}[{position}]", f"is {token_id}, but the vocabulary has ids 0 to {size - 1}.")

    def bad_words(self, words: Sequence[pb.Input], path: str) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell them, each once."""
        most = self.info.limits.max_bad_words
        require(len(words) <= most, path, f"has {len(words)}, but at most {most} are taken.")
        return tuple(dict.fromkeys(tokens for at, word in enumerate(words) for tokens in self._bad_word(word, f"{path}[{at}]")))

    def _bad_word(self, message: pb.Input, path: str) -> list[tuple[int, ...]]:
        """Token sequences that spell it: text as it stands and after a space."""
        # Every bad word is looked at before every token, so none may be as long as a message.
        most = self.info.limits.context
        room = Room(most, lambda length: f"has {count(length, 'token')}, but the context holds {most}.")
        if message.WhichOneof("content") != "text":
            return [self.tokens(message, path, room)]
        field = f"{path}.text"
        require(message.text != "", field, "is empty.")
        self._check_size(message.text, field)
        spelled = [tuple(self.tokenizer.encode_plain(text)) for text in (message.text, f" {message.text}")]
        # A sequence of no tokens would forbid everything.
        require(all(spelled), field, "has no tokens.")
        for tokens in spelled:
            require(len(tokens) <= most, field, f"has {count(len(tokens), 'token')}, but the context holds {most}.")
        return spelled

    def _check_size(self, text: str, field: str) -> None:
        size, limit = len(text.encode()), self.info.limits.max_text_bytes
        require(size <= limit, field, f"has {size} bytes, but at most {limit} are taken.")

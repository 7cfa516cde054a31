"""Passages of a text whose tokens changed most, with the neighbours that caused it.

A comparison keeps no neighbours but the nearest ones' numbers, so the few tokens that are shown are read and searched
again, in the windows and with the settings of the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knnlm.datastore.reader import Datastore, Evidence
from knnlm.distribution import log_weights
from knnlm.evaluation.comparison import FloatArray, PerToken
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.search_positions import keys_before
from knnlm.tokenization import TextTokenizer
from knnlm.tokenized import TokenizedDocument
from knnlm.windows import Windowing, windows

PASSAGE_TOKENS = 64
SHOWN_NEIGHBORS = 4
LEFT_CONTEXT = 12
MOST_TOGETHER = 4
INCOMPLETE = "\ufffd"
LISTED_TOKENS = 12
LISTED_CHANGE = 0.1
IMPOSSIBLE = 30.0
"""Nats: a change to or from probability 0 counts so much where passages are chosen."""

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class ShownNeighbor:
    """An entry that voted: its ``token``, its ``weight`` among the neighbours (0 to 1), squared ``distance``, and where it
    stands: ``document`` (id), ``line`` (None: token input) and the ``left_context`` before the token. ``same``: its token is the
    one that came."""

    entry: int
    token: str
    weight: float
    distance: float
    document: str
    line: int | None
    left_context: str
    same: bool


@dataclass(frozen=True)
class ShownToken:
    """A token of a passage, or several that make one character together: log-probabilities of base LM and mixture in nats (their
    sums), λ and the heaviest ``neighbors`` (none where there was no search), both of the one that changed most."""

    text: str
    lm_logprob: float
    logprob: float
    weight: float
    neighbors: tuple[ShownNeighbor, ...]

    @property
    def gain(self) -> float:
        """Mixture less base, above 0 where the token became more probable."""
        return 0.0 if self.logprob == self.lm_logprob else self.logprob - self.lm_logprob

    @property
    def is_telling(self) -> bool:
        """Whether it changed by neighbours that can be shown."""
        return bool(self.neighbors) and abs(self.gain) >= LISTED_CHANGE


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens from ``position`` of ``document`` (id) on; ``gain``: the sum of their changes in nats."""

    document: str
    position: int
    gain: float
    tokens: tuple[ShownToken, ...]


def most_telling(passage: Passage, count: int = LISTED_TOKENS) -> list[ShownToken]:
    """Up to ``count`` tokens of a passage whose neighbours are listed: those that changed most, in order of the text."""
    order = sorted(range(len(passage.tokens)), key=lambda place: -abs(passage.tokens[place].gain))[:count]
    return [passage.tokens[place] for place in sorted(order) if passage.tokens[place].is_telling]


def most_changed(per_token: PerToken, count: int, length: int = PASSAGE_TOKENS) -> list[Rows]:
    """Rows of the ``count`` passages of up to ``length`` tokens that gained and lost most: half of them each, the better
    half larger, best first, then worst first. Passages are parts of a fixed grid over each document."""
    changes = clear_changes(per_token)
    block = per_token.position // length
    starts = np.flatnonzero(np.r_[True, (np.diff(per_token.doc) != 0) | (np.diff(block) != 0)])
    stops = np.r_[starts[1:], len(changes)]
    sums = np.add.reduceat(changes, starts)
    order = np.argsort(-sums, kind="stable")
    gained, lost = order[sums[order] > 0], order[sums[order] < 0][::-1]
    worst = min(count // 2, len(lost))
    best = gained[: count - worst]
    chosen = [*best, *lost[: count - len(best)]]
    return [np.arange(starts[place], stops[place]) for place in chosen]


def clear_changes(per_token: PerToken) -> FloatArray:
    """Changes of log-probability [n], finite."""
    with np.errstate(invalid="ignore"):
        gain = np.where(per_token.logprob == per_token.lm_logprob, np.float32(0), per_token.logprob - per_token.lm_logprob)
    clear: FloatArray = np.clip(gain, -IMPOSSIBLE, IMPOSSIBLE)
    return clear


def show_passages(
    knn_lm: KNNLanguageModel, store: Datastore, text: Sequence[TokenizedDocument], per_token: PerToken, mixture: Mixture,
    count: int, length: int = PASSAGE_TOKENS,
) -> list[Passage]:  # fmt: skip
    """The ``count`` most changed passages of ``text``, which ``per_token`` scores, with their neighbours.

    ``knn_lm`` searches as the comparison did: with what it left out left out.
    """
    passages = []
    for rows in most_changed(per_token, count, length):
        document = text[int(per_token.doc[rows[0]])]
        positions = per_token.position[rows]
        neighbors = _search(knn_lm, document, positions, store.manifest.windowing, mixture)
        before = document.ids[max(0, positions[0] - MOST_TOGETHER + 1) : positions[0]].tolist()
        votes = log_weights(neighbors, mixture.temperature).exp()
        tokens = tuple(
            _shown(
                knn_lm.tokenizer, store, per_token, rows[places], text_of_them, [(neighbors.row(place), votes[place]) for place in places]
            )
            for places, text_of_them in characters(knn_lm.tokenizer, per_token.token_id[rows].tolist(), before)
        )
        passages.append(Passage(document.document.id, int(positions[0]), float(clear_changes(per_token)[rows].sum()), tokens))
    return passages


def _search(knn_lm: KNNLanguageModel, document: TokenizedDocument, positions: Rows, windowing: Windowing, mixture: Mixture) -> Neighbors:
    """Neighbours of the contexts before ``positions``, ascending and without gaps, of a document."""
    queries = []
    for window in windows(len(document.ids), windowing):
        targets = positions[(positions >= window.first_target) & (positions < window.end)]
        if len(targets):
            queries.append(keys_before(knn_lm.model, document.ids, window, targets))
    return knn_lm.retriever.retrieve(torch.cat(queries), mixture.k)


def characters(tokenizer: TextTokenizer, ids: Sequence[int], before: Sequence[int]) -> list[tuple[list[int], str]]:
    """Places of ``ids`` with their text, those together that make a character together: a byte-level tokenizer may cut one into
    bytes, some of which may stand ``before``."""
    found: list[tuple[list[int], str]] = []
    start, places = list(before), list[int]()
    for place in range(len(ids)):
        places.append(place)
        text = tokenizer.decode([*start, *(ids[each] for each in places)])
        if not text.endswith(INCOMPLETE) or len(places) == MOST_TOGETHER or place == len(ids) - 1:
            # What comes before may itself begin within a character.
            whole = text.lstrip(INCOMPLETE)[len(tokenizer.decode(start).strip(INCOMPLETE)) :] or INCOMPLETE
            found.append((places, tokenizer.token_text(ids[place]) if len(places) == 1 and not start else whole))
            start, places = [], []
    return found


def _shown(
    tokenizer: TextTokenizer,
    store: Datastore,
    per_token: PerToken,
    rows: Rows,
    shown: str,
    searched: Sequence[tuple[Neighbors, torch.Tensor]],
) -> ShownToken:
    """The tokens ``rows`` as one, ``shown`` as text, with the neighbours (and their votes [k]) of the one that changed most."""
    ids = per_token.token_id[rows].tolist()
    most = int(np.abs(clear_changes(per_token)[rows]).argmax())
    neighbors, votes = searched[most]
    return ShownToken(
        shown,
        float(per_token.lm_logprob[rows].sum(dtype=np.float64)),
        float(per_token.logprob[rows].sum(dtype=np.float64)),
        float(per_token.weight[rows[most]]),
        _neighbors(tokenizer, store, neighbors, votes, ids[most]) if per_token.searched[rows[most]] else (),
    )


def _neighbors(
    tokenizer: TextTokenizer, store: Datastore, neighbors: Neighbors, votes: torch.Tensor, token: int
) -> tuple[ShownNeighbor, ...]:
    """The heaviest of ``neighbors`` [1, found], and the nearest one that has ``token``, however light it is."""
    heaviest = votes.argsort(descending=True, stable=True)[: min(SHOWN_NEIGHBORS, neighbors.ids.shape[1])].tolist()
    supporters = (neighbors.tokens[0] == token).nonzero()[:, 0].tolist()
    if supporters and supporters[0] not in heaviest:
        heaviest[-1] = supporters[0]
    return tuple(_neighbor(tokenizer, store, neighbors, place, float(votes[place]), token) for place in heaviest)


def _neighbor(tokenizer: TextTokenizer, store: Datastore, neighbors: Neighbors, place: int, vote: float, token: int) -> ShownNeighbor:
    evidence = store.evidence(int(neighbors.ids[0, place]))
    context, text = _in_context(tokenizer, store, evidence)
    return ShownNeighbor(
        entry=evidence.entry,
        token=text,
        weight=vote,
        distance=float(neighbors.distances[0, place]),
        document=evidence.document.id,
        line=evidence.line,
        left_context=context,
        same=evidence.token_id == token,
    )


def _in_context(tokenizer: TextTokenizer, store: Datastore, evidence: Evidence) -> tuple[str, str]:
    """Left context of an entry and its token; of a token that is a part of a character, the whole character."""
    before = evidence.left_context[-LEFT_CONTEXT:]
    context = tokenizer.decode(before).strip(INCOMPLETE)
    position = store.documents.position_of_entry(evidence.entry)
    last = evidence.document.token_start + evidence.document.tokens
    following = store.tokens.slice(position, min(position + MOST_TOGETHER, last)).tolist()
    text = tokenizer.token_text(evidence.token_id)
    for count in range(1, len(following) + 1):
        if not text.strip(INCOMPLETE):
            # Bytes before the token may belong to the same character.
            text = tokenizer.decode([*before, *following[:count]]).lstrip(INCOMPLETE)[len(context) :]
    return context, text

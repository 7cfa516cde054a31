"""Positions at which searches are measured: stored entries without their own document, or held-out text.

Seeded, so that a build and its repetition measure at the same ones. Knows neither index nor settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.datastore.documents import DocumentTable
from knnlm.entry_mask import EntryMask
from knnlm.errors import CorpusError
from knnlm.model import LanguageModel
from knnlm.windows import Window, Windowing, windows

POSITIONS = 128
SEED = 20200430
TEXT_POSITIONS_PER_WINDOW = 8

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Tokens = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Positions:
    """Queries whose answers are known.

    ``queries`` [q, dimension] float32; ``values`` [q] int64, the token that follows; ``left_out`` [q, 2] int64, the entries
    [first, last) that each may not find (equal numbers: none); ``source`` says where they come from.
    """

    queries: Tensor
    values: Tensor
    left_out: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.queries)


def sample_entries(entries: int, allowed: EntryMask | None, count: int = POSITIONS, seed: int = SEED) -> Numbers:
    """Ascending numbers of ``count`` of the ``entries`` that are ``allowed`` (all of them if there are no more)."""
    choices = entries if allowed is None else allowed.allowed
    if not choices:
        return np.zeros(0, np.int64)
    ranks = np.sort(np.random.default_rng(seed).choice(choices, min(count, choices), replace=False))
    return ranks if allowed is None else allowed.at(ranks)


def stored_positions(
    entries: Numbers, keys: Tensor, values: Tensor, documents: DocumentTable, windowing: Windowing, live_entries: int
) -> Positions:
    """Stored ``entries`` [q] with their ``keys`` [q, dimension] and ``values`` [q], each to be asked without its document.

    Without a document that holds more than half of the ``live_entries`` there would be nothing to find; of such a one,
    only the entries that may have shared a window with the position are left out.
    """
    ranges = []
    shortened = 0
    for entry in entries.tolist():
        first, last = documents.entry_range(documents.of_entry(entry))
        if last - first > live_entries / 2:
            first, last = max(first, entry - windowing.max_length), min(last, entry + windowing.max_length + 1)
            shortened += 1
        ranges.append((first, last))
    source = "stored entries, own document left out"
    if shortened:
        source += f" (in {shortened}, whose document holds more than half of all, the {windowing.max_length} entries to either side)"
    left_out = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
    return Positions(keys.float(), values.long(), left_out, source)


def text_positions(
    model: LanguageModel, documents: Sequence[Tokens], windowing: Windowing, count: int = POSITIONS, seed: int = SEED
) -> Positions:
    """``count`` positions of held-out ``documents`` (token ids of each), in windows as the store was built with.

    About eight a window, so that a large model reads few windows. Raises :class:`CorpusError` if there is no position.
    """
    placed = [(tokens, window) for tokens in documents for window in windows(len(tokens), windowing)]
    if not placed:
        raise CorpusError("There is nothing to measure at: no document of the text has at least two tokens.")
    chance = np.random.default_rng(seed)
    chosen = np.sort(chance.choice(len(placed), min(len(placed), -(-count // TEXT_POSITIONS_PER_WINDOW)), replace=False))
    queries, values, left = list[Tensor](), list[Tensor](), count
    for done, number in enumerate(chosen.tolist()):
        tokens, window = placed[number]
        wanted = min(-(-left // (len(chosen) - done)), window.target_count)
        targets = np.sort(chance.choice(np.arange(window.first_target, window.end), wanted, replace=False))
        queries.append(keys_before(model, tokens, window, targets))
        values.append(torch.from_numpy(tokens[targets].astype(np.int64)))
        left -= wanted
    found = torch.cat(queries)
    return Positions(found, torch.cat(values), torch.zeros((len(found), 2), dtype=torch.int64), "positions of held-out text")


def keys_before(model: LanguageModel, tokens: Tokens, window: Window, targets: Numbers) -> Tensor:
    """Keys of the positions before ``targets``, which lie in ``window`` of the document ``tokens``: [t, dimension] float32."""
    ids = torch.from_numpy(tokens[window.start : window.end - 1].astype(np.int64))[None]
    columns = torch.from_numpy(targets - 1 - window.start)
    return model.forward(ids.to(model.device), logits=False).keys[0].cpu()[columns].float()

"""Keys of a seeded sample of windows: what an index is trained on where keys are not stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.datastore.documents import DocumentTable
from knnlm.model import LanguageModel
from knnlm.windows import PlacedWindow, Windowing, block_window
from knnlm_index_builder.encode import encode
from knnlm_index_builder.ingest import IngestedCorpus
from knnlm_index_builder.train_index import SEED

IntArray = np.ndarray[Any, np.dtype[np.int64]]


def sample_windows(documents: DocumentTable, windowing: Windowing, points: int, first: int) -> list[tuple[int, PlacedWindow]]:
    """Windows of the documents from token ``first`` on, drawn with the project's seed until they hold ``points`` targets
    (or all), in corpus order.

    Each with the number of its first target's entry; ``row`` counts the targets of the sample.
    """
    blocks = np.where(documents.token_starts >= first, -(-documents.token_counts // windowing.stride), 0)
    last = np.cumsum(blocks)
    drawn = torch.randperm(int(last[-1]), generator=torch.Generator().manual_seed(SEED)).numpy()
    targets = _targets(drawn, documents, last, windowing.stride)
    count = int(np.searchsorted(np.cumsum(targets), points)) + 1
    row, placed = 0, []
    for block in np.sort(drawn[:count]).tolist():
        number = int(np.searchsorted(last, block, side="right"))
        origin, place = int(documents.token_starts[number]), block - (int(last[number - 1]) if number else 0)
        window = block_window(int(documents.token_counts[number]), place, windowing)
        if window is not None:
            placed.append((origin + window.first_target - number - 1, PlacedWindow(window, origin, row)))
            row += window.target_count
    return placed


def _targets(drawn: IntArray, documents: DocumentTable, last: IntArray, stride: int) -> IntArray:
    numbers = np.searchsorted(last, drawn, side="right")
    places = drawn - np.where(numbers > 0, last[numbers - 1], 0)
    sizes = np.minimum(documents.token_counts[numbers] - places * stride, stride)
    return np.asarray(sizes - (places == 0))


def sample_keys(
    sample: list[tuple[int, PlacedWindow]], corpus: IngestedCorpus, model: LanguageModel, documents: DocumentTable, batch_tokens: int,
    progress: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """Keys of the sample's targets: [targets, dimension] float32, in corpus order."""
    total = sum(item.window.target_count for _, item in sample)
    keys = torch.empty(total, model.key_dimension)
    for row, found in encode((item for _, item in sample), corpus, model, documents, "none", batch_tokens):
        keys[row : row + len(found)] = found
        progress(len(found))
    return keys


def sample_entries(sample: list[tuple[int, PlacedWindow]]) -> Iterator[int]:
    """Entry numbers of the sample's targets, in the order of their keys."""
    for first, item in sample:
        yield from range(first, first + item.window.target_count)

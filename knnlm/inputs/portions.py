"""Portions of a corpus that is too large to be read whole: which files, and how much of each. Works on sizes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.inputs.files import CHUNK

MOST_POINTS = 4096


@dataclass(frozen=True)
class Portion:
    """The beginning of file number ``file``, about ``limit`` bytes of it; ``share`` of the corpus stands behind it (0 to 1)."""

    file: int
    limit: int
    share: float


def choose_portions(sizes: Sequence[int], whole: Sequence[bool], budget: int) -> list[Portion]:
    """Portions of files of ``sizes`` bytes that come to about ``budget`` bytes, or to one file if that is more.

    Points lie at equal distances in the corpus, and a file is read for each that falls into it, so that large files count
    by their size and every portion's share is the part of the points in it. ``whole``: files that can't be read in part.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    points = MOST_POINTS
    while True:
        places = (np.arange(points) + 0.5) * (int(ends[-1]) / points)
        hits = Counter(np.searchsorted(ends, places, side="right").tolist())
        chosen = [
            Portion(file, sizes[file] if whole[file] else min(sizes[file], count * CHUNK), count / points)
            for file, count in sorted(hits.items())
        ]
        if points == 1 or sum(portion.limit for portion in chosen) <= budget:
            return chosen
        points = points * 3 // 4

"""The document: what every format of input becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Document:
    """One document: either ``text`` or ``tokens`` (1-D integers) is set.

    ``id`` names it within the corpus, ``source`` is the file it came from (its URL, where one was given), ``metadata``
    what else the input said, as JSON can hold it.
    """

    id: str
    source: str
    text: str | None = None
    tokens: IntArray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether it has neither a character nor a token."""
        return not self.text and (self.tokens is None or not len(self.tokens))

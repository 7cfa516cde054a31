"""What a comparison of several datastores found: each with its own figures, and pairs of them token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from knnlm.evaluation.comparison import Comparison, Interval


@dataclass(frozen=True)
class Setup:
    """With what a datastore was compared: facts for tables and files, the same names in ``--json``. ``tokenizer``: its
    fingerprint; equal ones cut a text alike. ``mixture_from``: where k, temperature and weight come from."""

    model: str
    dtype: str
    tokenizer: str
    key_layer: str
    index: str
    entries: int
    k: int
    knn_temperature: float
    weight: float
    mixture_from: str
    gate: str | None
    overfetch: float
    max_length: int
    stride: int


@dataclass(frozen=True)
class ComparedStore:
    """One datastore's part of the table. ``name``: its path as it was given; ``left_out``: names of input files by reason,
    ``problems``: counts of what could not be read."""

    name: str
    setup: Setup
    comparison: Comparison
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    problems: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """The kNN-LM of store ``second`` against that of ``first`` (their numbers), token by token: relative ``change`` of
    perplexity with its ``interval``, below 0 where the second is better; shares of tokens ``better`` and ``worse``."""

    first: int
    second: int
    change: float
    interval: Interval
    better: float
    worse: float


@dataclass(frozen=True)
class ComparedStores:
    """Several datastores over the same text, in the order given. ``pairs``: each store after the first against the first one
    before it that scored the very same tokens."""

    stores: tuple[ComparedStore, ...]
    pairs: tuple[Pair, ...]

    @property
    def one_tokenizer(self) -> bool:
        """Whether all stores' tokenizers are the same; where not, only bits per byte compare."""
        return len({store.setup.tokenizer for store in self.stores}) == 1

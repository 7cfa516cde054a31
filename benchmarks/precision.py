"""What computing in bfloat16 does: a store and queries in it against both in float32, on held-out text, searched exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoded import Part, first_part
from benchmarks.inputs import Inputs
from benchmarks.reports import print_facts
from knnlm.evaluation.scoring import ScoredBatch, score
from knnlm.index import ExactIndex
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.retrieval import Retriever
from knnlm.search_measurement import total_variation

STORED_TOKENS, HELD_OUT_TOKENS = 262_144, 8_192
BLOCK = 256


@dataclass
class _Losses:
    """Nats of each scored token [tokens] by the base LM and by the mixture."""

    lm: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)

    def add(self, batch: ScoredBatch) -> None:
        self.lm.append(-batch.lm_log_probs.double())
        self.mixed.append(-batch.log_probs.double())

    def perplexities(self) -> tuple[float, float]:
        return math.exp(torch.cat(self.lm).mean()), math.exp(torch.cat(self.mixed).mean())


def run(inputs: Inputs, half: HFLanguageModel, entries: int | None, folder: Path) -> None:
    """Total variation of both kNN distributions token by token, and the difference of perplexities."""
    mixture = Mixture()
    part = first_part(inputs, entries or STORED_TOKENS, folder)
    held_out = [document.ids for document in inputs.held_out(HELD_OUT_TOKENS)]
    windowing = part.descriptor.windowing
    full_lm, half_lm = (_knn_lm(model, part) for model in (inputs.model, half))
    variations, full, reduced = list[Tensor](), _Losses(), _Losses()
    batches = zip(score(full_lm, held_out, windowing, mixture), score(half_lm, held_out, windowing, mixture), strict=True)
    for one, other in batches:
        variations.append(total_variation(one.neighbors, other.neighbors, mixture.temperature))
        full.add(one)
        reduced.add(other)
    variation = torch.cat(variations)
    (lm, mixed), (lm_half, mixed_half) = full.perplexities(), reduced.perplexities()
    print_facts(
        f"bfloat16: {len(variation):,} held-out tokens, {part.entries:,} entries, exact search, k={mixture.k}, T={mixture.temperature:g}",
        {
            "total variation of kNN distributions, mean": float(variation.mean()),
            "… 95 % of tokens at most": float(variation.quantile(0.95)),
            "base LM perplexity, float32 -> bfloat16": f"{lm:.3f} -> {lm_half:.3f} ({lm_half / lm - 1:+.3%})",
            "mixture perplexity, float32 -> bfloat16": f"{mixed:.3f} -> {mixed_half:.3f} ({mixed_half / mixed - 1:+.3%})",
            "… standard error of that change": f"{_standard_error(torch.cat(reduced.mixed) - torch.cat(full.mixed)):.3%}",
        },
    )


def _knn_lm(model: HFLanguageModel, part: Part) -> KNNLanguageModel:
    keys, values = part.encode(model, model.dtype)
    return KNNLanguageModel(model, model.tokenizer(), Retriever(ExactIndex(keys), keys, values))


def _standard_error(differences: Tensor) -> float:
    """Of the mean of paired differences [tokens], over blocks of 256 tokens, which hang together."""
    blocks = np.array([block.mean() for block in np.array_split(differences.numpy(), max(2, len(differences) // BLOCK))])
    return float(blocks.std(ddof=1) / math.sqrt(len(blocks)))

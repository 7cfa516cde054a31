"""The kNN language model: p = λ·p_kNN + (1-λ)·p_LM (Khandelwal et al., 2020, section 2). The heart of the project.

:func:`mix_neighbors` is the one place where neighbours, distribution and interpolation meet; :meth:`KNNLanguageModel.mix`
searches one datastore, or a fixed mix of several, before it; a server's engine searches those that each row has chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnlm.datastore_mix import NeighborSource, heaviest_first
from knnlm.distribution import neighbor_token_log_probs, spread
from knnlm.errors import InvalidInput
from knnlm.interpolation import effective_weight, interpolate_at
from knnlm.mixture import Mixture
from knnlm.model import LanguageModel
from knnlm.neighbors import Neighbors
from knnlm.tokenization import TextTokenizer


@dataclass(frozen=True)
class Mixed:
    """One step's result for n rows: ``log_probs`` [n, vocabulary] of the mixture; ``neighbors`` [n, k]; ``votes``
    [n, k] float32, log p_kNN of each neighbour's token; ``weight`` [n] float64, the λ that was used; ``lm_log_probs``
    [n, vocabulary] of the base LM alone."""

    log_probs: Tensor
    neighbors: Neighbors
    votes: Tensor
    weight: Tensor
    lm_log_probs: Tensor

    @property
    def knn_log_probs(self) -> Tensor:
        """log p_kNN [n, vocabulary], -inf where no neighbour has the token and in rows that searched nothing."""
        return spread(self.neighbors, self.votes, self.log_probs.shape[1])

    def rows(self, rows: list[int]) -> Mixed:
        """Some of the rows, in this order."""
        return Mixed(
            self.log_probs[rows], self.neighbors.each(lambda part: part[rows]), self.votes[rows], self.weight[rows], self.lm_log_probs[rows]
        )

    def knn_log_prob(self, row: int, token: int) -> float:
        """One value of :attr:`knn_log_probs`."""
        votes = self.votes[row][self.neighbors.tokens[row] == token]
        return float(votes.max()) if len(votes) else -math.inf

    def knn_share(self, row: int, token: int) -> float:
        """Part of the token's probability that came from the neighbours, 0 to 1."""
        knn = self.knn_log_prob(row, token)
        # A token that neither has can be drawn where all others were forbidden.
        return 0.0 if knn == -math.inf else min(1.0, float(self.weight[row]) * math.exp(knn - float(self.log_probs[row, token])))


def mix_neighbors(lm_log_probs: Tensor, neighbors: Neighbors, *, temperature: Tensor, weight: Tensor) -> Mixed:
    """Mix the LM's log-probabilities [n, vocabulary] with those of ``neighbors``; ``temperature`` and ``weight`` float64, each [n].

    A row with weight 0 must have no neighbours; its distribution, and that of any row without, is the LM's bit for bit.
    """
    used = effective_weight(weight, neighbors.found)
    if neighbors.ids.shape[1] == 0:
        return Mixed(lm_log_probs, neighbors, neighbors.distances, used, lm_log_probs)
    neighbors = heaviest_first(neighbors, temperature)
    votes = neighbor_token_log_probs(neighbors, temperature)
    mixed = interpolate_at(lm_log_probs, neighbors.tokens, votes, used)
    return Mixed(mixed, neighbors, votes, used, lm_log_probs)


class KNNLanguageModel:
    """A base LM, a retriever over its datastore (or several as one), and the settings that apply where a call gives none."""

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, retriever: NeighborSource, mixture: Mixture | None = None) -> None:
        self.model, self.tokenizer, self.retriever = model, tokenizer, retriever
        self.mixture = (mixture or Mixture()).validate()

    def mix(self, lm_log_probs: Tensor, queries: Tensor, *, k: Tensor, temperature: Tensor, weight: Tensor) -> Mixed:
        """Mix the LM's log-probabilities [n, vocabulary] with those of each query's neighbours.

        ``queries`` [n, dimension]; ``k`` int64, ``temperature`` and ``weight`` float64, each [n]. Rows with weight 0
        are not searched, and theirs is the LM's distribution bit for bit.
        """
        neighbors = self.retriever.retrieve(queries, torch.where(weight > 0, k, 0))
        return mix_neighbors(lm_log_probs, neighbors, temperature=temperature, weight=weight)

    def mix_all(self, lm_log_probs: Tensor, queries: Tensor, mixture: Mixture) -> Mixed:
        """:meth:`mix` with the same settings for every row."""
        n = len(queries)
        return self.mix(
            lm_log_probs, queries, k=torch.full((n,), mixture.k), temperature=torch.full((n,), mixture.temperature, dtype=torch.float64),
            weight=torch.full((n,), mixture.weight, dtype=torch.float64),
        )  # fmt: skip

    def next_token(self, text: str | Sequence[int], mixture: Mixture | None = None, *, cache: Any = None) -> Mixed:
        """The distribution over the token that follows ``text`` (or token ids), as a batch of one row."""
        tokens = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not tokens:
            raise InvalidInput("text", "is empty and the tokenizer adds no BOS, so there is nothing to predict from.")
        if len(tokens) > self.model.context:
            raise InvalidInput("text", f"is {len(tokens)} tokens long, but the model's context is {self.model.context}.")
        if min(tokens) < 0 or max(tokens) >= self.model.vocabulary_size:
            raise InvalidInput(
                "text", f"has token ids from {min(tokens)} to {max(tokens)}, but the model's are 0 to {self.model.vocabulary_size - 1}."
            )
        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model.forward(ids, columns=torch.tensor([len(tokens) - 1], device=ids.device), cache=cache)
        assert out.logits is not None
        return self.mix_all(out.logits[:, -1].float().log_softmax(-1).cpu(), out.keys[:, -1].cpu(), (mixture or self.mixture).validate())

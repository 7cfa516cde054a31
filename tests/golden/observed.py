"""What a golden store says, in the form in which ``expected.json`` keeps it.

Goes through what every later version must still offer: opening with a model, evidence of an entry, neighbours of a key,
the next token of a prompt. Knows neither how a store was built nor what it ought to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.opening import OpenedKNNLM

EXPECTED = "expected.json"
NEIGHBORS = 5
TOP_TOKENS = 5


@dataclass(frozen=True)
class Asked:
    """What every store of a version is asked: ``queries`` [n, dimension], each for :data:`NEIGHBORS` neighbours, and the
    token after ``prompt``, with ``mixture`` where the store has no profile."""

    queries: list[list[float]]
    prompt: str
    mixture: Mixture

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Asked:
        """From what ``asdict`` makes of it."""
        return cls(content["queries"], content["prompt"], Mixture(**content["mixture"]))


def observe(opened: OpenedKNNLM, asked: Asked) -> dict[str, Any]:
    """Everything that the store at ``opened`` says, as JSON."""
    counts, profile = opened.store.manifest.counts, observed_profile(opened.store.path)
    found = opened.knn_lm.retriever.retrieve(torch.tensor(asked.queries), NEIGHBORS)
    return {
        "counts": {"documents": counts.documents, "tokens": counts.tokens, "entries": counts.entries},
        "profile": profile,
        "documents": [observed_document(opened.store, number) for number in range(counts.documents)],
        "neighbors": [observed_neighbors(found.row(row)) for row in range(len(found))],
        "next_token": observed_next_token(opened, asked.prompt, None if profile else asked.mixture),
    }


def observed_profile(store: Path) -> dict[str, Any] | None:
    """The calibrated mixture, None where the store has none."""
    if (profile := Profile.read(store)) is None:
        return None
    mixture = profile.mixture
    return {
        "k": mixture.k,
        "temperature": mixture.temperature,
        "weight": mixture.weight,
        "distance": profile.distance,
        "source": profile.source,
    }


def observed_document(store: Datastore, number: int) -> dict[str, Any]:
    """A document with all its tokens and, of each token but the first, what its entry's evidence says.

    ``starts``, ``ends`` (characters) and ``lines`` are None in each place where the store was built from token ids. Each
    entry is found to name this document, its own token and the tokens before it.
    """
    record = store.documents[number]
    first, last = store.documents.entry_range(number)
    tokens = store.tokens.slice(record.token_start, record.token_start + record.tokens).tolist()
    told = [store.evidence(entry) for entry in range(first, last)]
    for place, evidence in enumerate(told, start=1):
        assert (evidence.document, evidence.token_id) == (record, tokens[place]), f"entry {evidence.entry}"
        left = evidence.left_context
        assert left, f"entry {evidence.entry}"
        assert left == tokens[place - len(left) : place], f"entry {evidence.entry}"
    characters = [evidence.characters or (None, None) for evidence in told]
    return {
        "id": record.id,
        "source": record.source,
        "characters": record.characters,
        "metadata": record.metadata,
        "first_entry": first,
        "tokens": tokens,
        "starts": [start for start, _ in characters],
        "ends": [end for _, end in characters],
        "lines": [evidence.line for evidence in told],
    }


def observed_neighbors(found: Neighbors) -> dict[str, Any]:
    """Of one row."""
    return {"ids": found.ids[0].tolist(), "tokens": found.tokens[0].tolist(), "distances": found.distances[0].tolist()}


def observed_next_token(opened: OpenedKNNLM, prompt: str, mixture: Mixture | None) -> dict[str, Any]:
    """The most probable next tokens, and the natural logarithms of their probabilities."""
    log_probs, tokens = opened.next_token(prompt, mixture).log_probs[0].topk(TOP_TOKENS)
    return {"tokens": tokens.tolist(), "log_probs": log_probs.tolist()}

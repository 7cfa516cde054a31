"""Fitting the networks of a gate: the likelihood of the mixture itself is maximised, over standardised features.

Deterministic: float64, one thread, a fixed seed and order, whatever the machine's threads are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnlm.gate import Network

SEED = 0
FEWEST_STEPS = 32
MOST_ROWS = 1024
LEARNING_RATE = 8e-3
DECAY = 1e-3
AVERAGED_STEPS = 100
LEAST_SCALE, NO_SAY = 1e-6, 1e9
MOST_GAIN = 50.0

Array = np.ndarray[Any, Any]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Examples:
    """What a network is fitted to: ``features`` [n, d] float64, ``targets`` [n] float64, which the loss knows, and how much each
    row counts, ``importance`` [n] float64."""

    features: Tensor
    targets: Tensor
    importance: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def log_gain(lm: Array, knn: Array) -> Tensor:
    """p_kNN/p_LM - 1 of each target [n] float64, the target of :func:`mixture_loss`; 0 where there is no neighbour.

    ``lm`` and ``knn`` [n]: log-probabilities; NaN in ``knn``: none.
    """
    gain = np.expm1(np.clip(knn - lm, None, MOST_GAIN))
    return torch.from_numpy(np.where(np.isnan(knn), 0.0, gain))


def mixture_loss(weights: Tensor, gain: Tensor) -> Tensor:
    """How much less probable than by the LM alone the mixture makes each target, in nats: -log(1 + λ·(p_kNN/p_LM - 1))."""
    return -torch.log1p(weights.clamp(max=1 - 1e-9) * gain)


def squared_loss(values: Tensor, wanted: Tensor) -> Tensor:
    """Of a network that predicts a number from 0 to 1."""
    return (values - wanted).square()


def fit_epochs(examples: Examples, hidden: Sequence[int], start: float, loss: Loss = mixture_loss, *, epochs: int) -> list[Network]:
    """The network after each epoch of fitting. ``hidden``: widths of its tanh layers (none: a logistic function); ``start``:
    what it says of everything at first, above 0 and below 1.

    What an epoch gives is the running mean of the weights over about the last 100 steps, so that the last batch does not
    decide. Numbers are finite whatever the features are; one that never changes has no say.
    """
    with _one_thread():
        means = examples.features.mean(0)
        scales = examples.features.std(0, correction=0)
        scales = torch.where(scales > LEAST_SCALE, scales, NO_SAY)
        standard = (examples.features - means) / scales
        layers = _layers(examples.features.shape[1], hidden, start)
        parameters = list(layers.parameters())
        means_of_steps, steps = [parameter.detach().clone() for parameter in parameters], 0
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=DECAY)
        order = torch.Generator().manual_seed(SEED)
        found = []
        for _ in range(epochs):
            for rows in _batches(len(examples), order):
                optimizer.zero_grad()
                values = layers(standard[rows])[:, 0].sigmoid()
                (loss(values, examples.targets[rows]) * examples.importance[rows]).mean().backward()
                optimizer.step()
                steps += 1
                for mean, parameter in zip(means_of_steps, parameters, strict=True):
                    mean.lerp_(parameter.detach(), 1 / min(steps, AVERAGED_STEPS))
            found.append(_network(means_of_steps, means, scales))
        return found


def _layers(width: int, hidden: Sequence[int], start: float) -> nn.Sequential:
    """Hidden layers at random, and a last one that says ``start`` of everything."""
    random = torch.Generator().manual_seed(SEED)
    layers: list[nn.Module] = []
    for size in hidden:
        layer = nn.Linear(width, size, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random, dtype=torch.float64) / width**0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random, dtype=torch.float64) / 2)
        layers += [layer, nn.Tanh()]
        width = size
    last = nn.Linear(width, 1, dtype=torch.float64)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, float(torch.tensor(start, dtype=torch.float64).logit()))
    return nn.Sequential(*layers, last)


def _batches(rows: int, order: torch.Generator) -> Iterator[Tensor]:
    """All rows once, in batches that give an epoch at least 32 steps where there are as many rows."""
    size = max(1, min(MOST_ROWS, rows // FEWEST_STEPS))
    return iter(torch.randperm(rows, generator=order).split(size))


def _network(parameters: Sequence[Tensor], means: Tensor, scales: Tensor) -> Network:
    """``parameters``: weights and biases of each layer in turn."""
    layers = tuple(
        (tuple(tuple(row) for row in weights.tolist()), tuple(biases.tolist()))
        for weights, biases in zip(parameters[::2], parameters[1::2], strict=True)
    )
    return Network(tuple(means.tolist()), tuple(scales.tolist()), layers)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums come in one order, and small matrices gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Settings of the mixture: what a user chooses, a store's profile keeps and a request may override. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knnlm.errors import InvalidInput

MOST_NEIGHBORS = 4096


@dataclass(frozen=True)
class Mixture:
    """Settings of the mixture.

    ``k`` neighbours, 1 to 4096; ``temperature`` T of softmax(-d/T), in units of squared distance; ``weight`` λ of the
    neighbours' distribution, 0 to 1.
    """

    k: int = 64
    temperature: float = 10.0
    weight: float = 0.2

    def validate(self) -> Mixture:
        """Return self; raise :class:`InvalidInput` naming the field that is out of range."""
        if not 1 <= self.k <= MOST_NEIGHBORS:
            raise InvalidInput("k", f"is {self.k}, but must be from 1 to {MOST_NEIGHBORS}.")
        if not 0 < self.temperature < math.inf:
            raise InvalidInput("knn_temperature", f"is {self.temperature}, but must be above 0, and finite.")
        if not 0 <= self.weight <= 1:
            raise InvalidInput("weight", f"is {self.weight}, but must be from 0 to 1.")
        return self

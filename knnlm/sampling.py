"""From next-token log-probabilities to a token, per request. Pure: randomness comes in as one number per row.

Everything works on *normalised* log-probabilities (of the mixture, or of the base LM at weight 0). Penalties are not
invariant to a shift of the logits, so this is part of the definition (see ``docs/definition.md``, Sampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knnlm.errors import InvalidInput

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens. Steps are taken in the order of the fields, which is that of ``generate`` of transformers.

    ``logit_bias``: (token id, what is added to its log-probability). ``repetition_penalty``: above 1 makes tokens of the
    prompt and completion less likely (Keskar et al., 2019, CTRL); 1 = off. ``frequency_penalty`` and
    ``presence_penalty``: subtracted for each time, and once, that a token stands in the completion; 0 = off.
    ``bad_words``: token sequences that are never completed. ``temperature``: 0 = the most probable token. ``top_k``: 0 =
    all tokens. ``top_p``: nucleus, 1 = off (Holtzman et al., 2020). ``min_p``: least probability as a share of the
    largest, 0 = off (Nguyen et al., 2024). ``typical_p``: locally typical sampling, 1 = off (Meister et al., 2023).
    ``seed``: the same seed draws the same tokens; None = a new one for each request.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None

    def validate(self, prefix: str = "") -> SamplingParams:
        """Return self; raise :class:`InvalidInput` with ``prefix`` before the field's name if a value is out of range."""
        # Beyond these, scores overflow float32 and no token is left.
        usable = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        _require(usable, f"{prefix}temperature", self.temperature, "0, or from 1e-6 to 1e6")
        _require(self.top_k >= 0, f"{prefix}top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, f"{prefix}top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, f"{prefix}min_p", self.min_p, "from 0 to 1")
        _require(0 < self.typical_p <= 1, f"{prefix}typical_p", self.typical_p, "above 0 and at most 1")
        usable = 1e-6 <= self.repetition_penalty <= 1e6
        _require(usable, f"{prefix}repetition_penalty", self.repetition_penalty, "from 1e-6 to 1e6")
        for name in ("frequency_penalty", "presence_penalty"):
            _require(-100 <= getattr(self, name) <= 100, f"{prefix}{name}", getattr(self, name), "from -100 to 100")
        for token, bias in self.logit_bias:
            _require(-100 <= bias <= 100, f"{prefix}logit_bias[{token}]", bias, "from -100 to 100")
        for number, word in enumerate(self.bad_words):
            _require(len(word) > 0, f"{prefix}bad_words[{number}]", "without tokens", "of 1 token or more")
        return self


def _require(condition: bool, field: str, found: object, wanted: str) -> None:
    if not condition:
        raise InvalidInput(field, f"is {found}, but must be {wanted}.")

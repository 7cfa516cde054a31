"""May this model be served? Only if decoding in a batch is shown to equal reading alone, on this very model.

The slot cache gives each row its own positions and one mask for all layers. Models that take positions from
somewhere else (ALiBi built from a 2-D mask), or look back less far in some layers, would be silently wrong.
"""

from __future__ import annotations

import torch

from knnlm.errors import ModelError
from knnlm.model import HFLanguageModel
from knnlm_server.kv_cache import SlotCache

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
LENGTHS = (7, 11, 4)
SPLIT = 3


def check_servable(model: HFLanguageModel, context: int) -> None:
    """Raise :class:`ModelError`, naming the model type and the reason, for a model that can't be served safely."""
    kind = model.config.model_type
    if model.attention not in ("sdpa", "eager"):
        raise ModelError(f"Serving needs sdpa or eager attention, but {kind} runs with {model.attention}.")
    window = model.attention_window
    if window is not None and window < context:
        raise ModelError(
            f"{kind} looks back only {window} tokens in some layers, so it is served up to that context: use --max-context {window}."
        )
    try:
        error = batched_key_error(model)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failure:
        raise ModelError(f"{kind} can't be served: its attention does not take a slot cache ({type(failure).__name__}).") from failure
    if not error <= TOLERANCE[model.dtype]:
        raise ModelError(
            f"{kind} can't be served: its keys in a batch differ from those alone by {error:.2g} of the largest "
            f"(at most {TOLERANCE[model.dtype]:g} is allowed). Building and comparing work; --allow-unproven serves it anyway."
        )


@torch.inference_mode()
def batched_key_error(model: HFLanguageModel) -> float:
    """Largest difference between keys decoded in a batch and read alone, relative to the largest key.

    Three sequences of unequal length are read in two chunks, then the rest token by token, from one slot cache.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, model.vocabulary_size, (length,), generator=generator) for length in LENGTHS]
    alone = [model.forward(text[None].to(model.device), logits=False).keys[0] for text in texts]
    cache = SlotCache(model.layers, len(texts), max(LENGTHS))
    worst = 0.0
    for first in (0, SPLIT, *range(2 * SPLIT, max(LENGTHS))):
        last = first + SPLIT if first < 2 * SPLIT else first + 1
        rows = [text[first:last] for text in texts]
        rows = rows[: next((i for i, row in enumerate(rows) if not len(row)), len(rows))]
        if not rows:
            break
        starts, counts = torch.full((len(rows),), first, device=model.device), torch.tensor([len(row) for row in rows], device=model.device)
        positions, mask = cache.place(0, starts, counts)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        found = model.forward(tokens, logits=False, positions=positions, attention_mask=model.attention_mask(mask), cache=cache).keys
        for row, (keys, reference) in enumerate(zip(found, alone, strict=False)):
            count = int(counts[row])
            worst = max(worst, float((keys[:count] - reference[first : first + count]).abs().max() / reference.abs().max()))
    return worst

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
# New tokens of each of three rows, pass by pass: rows that start together and apart, bring one token or many, are filled up or not.
CHUNKS = ((1, 6, 3), (5, 1, 1), (1, 5, 2), (1, 1, 1))
STILL_WORKS = "Building and comparing work with it"


def check_servable(model: HFLanguageModel, context: int) -> None:
    """Raise :class:`ModelError`, naming the model type and the reason, for a model that can't be served safely."""
    kind = model.config.model_type
    if model.attention not in ("sdpa", "eager"):
        raise ModelError(f"{kind} can't be served with {model.attention} attention, only with sdpa or eager. {STILL_WORKS}.")
    try:
        error = batched_key_error(model)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failure:
        raise ModelError(
            f"{kind} can't be served: its attention does not take a slot cache ({type(failure).__name__}). {STILL_WORKS}."
        ) from failure
    if not error <= TOLERANCE[model.dtype]:
        raise ModelError(
            f"{kind} can't be served: its keys in a batch differ from those alone by {error:.2g} of the largest "
            f"(at most {TOLERANCE[model.dtype]:g} is allowed). {STILL_WORKS}; --allow-unproven serves it anyway."
        )
    window = model.attention_window
    if window is not None and window < context:
        raise ModelError(
            f"{kind} looks back only {window} tokens in some layers, so it is served up to that context: use --max-context {window}."
        )


@torch.inference_mode()
def batched_key_error(model: HFLanguageModel) -> float:
    """Largest difference between keys decoded in a batch and read alone, relative to the largest key.

    Three sequences of unequal length are read from one slot cache in the passes of :data:`CHUNKS`.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(counts) for counts in zip(*CHUNKS, strict=True)]
    texts = [torch.randint(0, model.vocabulary_size, (length,), generator=generator) for length in lengths]
    alone = [model.forward(text[None].to(model.device), logits=False).keys[0] for text in texts]
    cache = SlotCache(model.layers, len(texts), max(lengths))
    starts, errors = [0] * len(texts), []
    for counts in CHUNKS:
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        rows = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
        positions, mask = cache.place(0, torch.tensor(starts, device=model.device), torch.tensor(counts, device=model.device))
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        found = model.forward(tokens, logits=False, positions=positions, attention_mask=model.attention_mask(mask), cache=cache).keys
        for keys, reference, start, end in zip(found, alone, starts, ends, strict=True):
            errors.append((keys[: end - start] - reference[start:end]).abs().max() / reference.abs().max())
        starts = ends
    return float(torch.stack(errors).max())

"""Encoding against bare forward passes over the same windows, and against what public kNN-LM scripts do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoded import Part, first_part
from benchmarks.precision import run as run_precision
from benchmarks.reports import print_facts
from benchmarks.rounds import Timing, interleave
from benchmarks.session import Session
from knnlm.model import HFLanguageModel
from knnlm.windows import PlacedWindow

TOKENS = 16_384
BARE, BUILD, HEAD, PUBLIC = "bare forward, no head", "build", "head over every position, keys copied out", "as public scripts, with loss"
BFLOAT16 = ", bfloat16"
NOT_SCORED = -100


def run(session: Session) -> None:
    """Speed of float32 and bfloat16; then what bfloat16 does to distributions."""
    inputs, folder = session.inputs, session.folder / "building"
    half = HFLanguageModel.load(inputs.source, dtype="bfloat16")
    part = first_part(inputs, TOKENS, folder)
    print_facts(f"building: entries/s, of {part.entries:,}", _speed(inputs.model, half, part, session.options.rounds, folder))
    run_precision(inputs, half, session.options.entries, folder / "precision")


def _speed(model: HFLanguageModel, half: HFLanguageModel, part: Part, rounds: int, folder: Path) -> dict[str, float | str]:
    contestants: dict[str, Callable[[], object]] = {
        BARE: _bare(model, part),
        BUILD: lambda: part.encode(model, "float32"),
        HEAD: _head(model, part),
        PUBLIC: _public(model, part, folder / "public.npy"),
        BARE + BFLOAT16: _bare(half, part),
        BUILD + BFLOAT16: lambda: part.encode(half, "bfloat16"),
    }
    timings = interleave(contestants, rounds)

    def ratio(fast: str, slow: str) -> str:
        one, other = timings[fast], timings[slow]
        return f"{other.wall / one.wall:.2f} (CPU {other.cpu / one.cpu:.2f})"

    return {
        **{name: _rate(part.entries, timing) for name, timing in timings.items()},
        "build over bare forward (asked: 0.9)": ratio(BUILD, BARE),
        "build over head at every position": ratio(BUILD, HEAD),
        "build over public scripts (asked: 2)": ratio(BUILD, PUBLIC),
        "build over bare forward, bfloat16": ratio(BUILD + BFLOAT16, BARE + BFLOAT16),
        "build, bfloat16 over float32": ratio(BUILD + BFLOAT16, BUILD),
    }


def _rate(entries: int, timing: Timing) -> str:
    return f"{entries / timing.wall:,.0f} ({entries / timing.cpu:,.0f} a CPU-s)"


def _bare(model: HFLanguageModel, part: Part) -> Callable[[], None]:
    """A forward pass of the base model and nothing else."""
    batches, base = part.batches(), model._model.base_model

    @torch.inference_mode()
    def forward() -> None:
        for _, tokens in batches:
            base(input_ids=tokens, use_cache=False)

    return forward


def _head(model: HFLanguageModel, part: Part) -> Callable[[], None]:
    """The whole model for every window; its logits are thrown away, keys are copied out."""
    batches, kept = part.batches(), np.empty((part.entries, model.key_dimension), np.float16)

    def save() -> None:
        for placed, tokens in batches:
            for item, keys in zip(placed, model.forward(tokens).keys, strict=True):
                kept[item.row : item.row + item.window.target_count] = keys[-item.window.target_count :].numpy()

    return save


def _public(model: HFLanguageModel, part: Part, path: Path) -> Callable[[], None]:
    """The same as an evaluation loop runs it: with attention mask, labels and loss; keys go through a mask to a file."""
    batches, whole = [(tokens, _scored(placed, tokens)) for placed, tokens in part.batches()], model._model

    @torch.inference_mode()
    def save() -> None:
        kept = np.memmap(path, np.float16, "w+", shape=(part.entries, model.key_dimension))
        row = 0
        for tokens, scored in batches:
            with model._extractor.capture() as captured:
                labels = torch.where(scored, tokens, NOT_SCORED)
                whole(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False)
            keys = captured[0].view(*tokens.shape, -1)[scored].numpy().astype(np.float16)
            kept[row : row + len(keys)] = keys
            row += len(keys)

    return save


def _scored(placed: list[PlacedWindow], tokens: Tensor) -> Tensor:
    """Columns whose keys are kept: [windows, length] bool."""
    counts = torch.tensor([item.window.target_count for item in placed])
    return torch.arange(tokens.shape[1]) >= tokens.shape[1] - counts[:, None]

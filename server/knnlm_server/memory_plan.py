"""How many sequences of what length fit into memory: planned at start, with the numbers, and not hoped for.

Counted are the model's weights, the attention keys and values of all slots and of kept prompts, and the logits of one step
and of one batch of scoring. Datastores are read through memory maps, which the system takes back when it needs the memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from knnlm.console import size
from knnlm.errors import InvalidInput
from knnlm.model import HFLanguageModel
from knnlm_server.kv_cache import SlotCache
from knnlm_server.scheduler import STEP_TOKENS
from knnlm_server.scorings import SCORE_BATCH_TOKENS

MOST_SLOTS = 32
LEAST_CONTEXT = 256
# Of what is free: on a GPU the engine is alone; the pages of datastores want some of the machine's own memory.
SHARE = {"cpu": 0.5, "cuda": 0.9}
PREFIX_SHARE = 8
MOST_PREFIX_BYTES = 2 * 2**30
# Float32 copies of a batch's logits that live at once: 2 in scoring and 1 in a step, as a test measures on a CPU; the rest is room
# for devices and models whose softmax takes copies of its own.
COPIES = 5


@dataclass(frozen=True)
class ModelCosts:
    """Bytes of the weights, and of attention keys and values of one token in all layers; size of the vocabulary; most tokens of a text."""

    weight_bytes: int
    token_bytes: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class MemoryPlan:
    """What memory goes to: ``slots`` sequences of ``context`` tokens, in ``budget`` bytes all in all."""

    costs: ModelCosts
    budget: int
    slots: int
    context: int
    prefix_bytes: int
    step_tokens: int = STEP_TOKENS

    @property
    def cache_bytes(self) -> int:
        """The slot cache; each row has a column that takes padding."""
        return self.slots * (self.context + 1) * self.costs.token_bytes

    @property
    def logit_bytes(self) -> int:
        """The logits of a step or of a batch of scoring; the two come one after the other.

        Rows whose prompts end in one step have the logits of all of their last columns.
        """
        rows = max(min(self.slots**2, 2 * self.step_tokens), self.slots, SCORE_BATCH_TOKENS)
        return COPIES * 4 * rows * self.costs.vocabulary

    @property
    def needed(self) -> int:
        """All of it."""
        return self.costs.weight_bytes + self.cache_bytes + self.prefix_bytes + self.logit_bytes

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget."""
        return self.needed <= self.budget

    def describe(self) -> list[str]:
        """Lines for people, with all numbers."""
        costs = self.costs
        return [
            f"memory: {size(self.needed)} of {size(self.budget)} planned",
            f"  model {size(costs.weight_bytes)}, logits {size(self.logit_bytes)}, kept prompts {size(self.prefix_bytes)}",
            f"  cache {size(self.cache_bytes)}: {self.slots} sequences of {self.context} tokens, {size(costs.token_bytes)} a token",
        ]


def plan_memory(
    costs: ModelCosts,
    free: int,
    share: float,
    *,
    budget: int | None = None,
    slots: int | None = None,
    context: int | None = None,
    prefix_bytes: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> MemoryPlan:
    """Slots and context that fit into ``budget`` bytes (None: the model and a ``share`` of what is ``free`` beside it).

    What is given is taken as it is; what is None is as large as fits: up to the model's context and :data:`MOST_SLOTS`, the
    context before the slots; kept prompts get a part. Raises :class:`InvalidInput` with the numbers for what does not fit.
    """
    available = costs.weight_bytes + int(share * free) if budget is None else budget
    if budget is not None and budget > costs.weight_bytes + free:
        raise InvalidInput(
            "memory", f"is {size(budget)}, but the model has {size(costs.weight_bytes)} and only {size(free)} are free beside it."
        )
    least = MemoryPlan(costs, available, slots or 1, context or min(costs.context, LEAST_CONTEXT), prefix_bytes or 0, step_tokens)
    if not least.fits:
        raise InvalidInput("memory", _too_much(least, free, slots, context))
    if prefix_bytes is None:
        part = (available - costs.weight_bytes) // PREFIX_SHARE
        least = replace(least, prefix_bytes=min(MOST_PREFIX_BYTES, part, available - least.needed))
    longest = least if context else _largest(lambda n: replace(least, context=n), least.context, costs.context)
    return longest if slots else _largest(lambda n: replace(longest, slots=n), 1, MOST_SLOTS)


def _largest(plan: Callable[[int], MemoryPlan], low: int, high: int) -> MemoryPlan:
    """The plan of the largest number from ``low`` (which fits) to ``high`` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(middle).fits else (low, middle - 1)
    return plan(low)


def _too_much(plan: MemoryPlan, free: int, slots: int | None, context: int | None) -> str:
    asked = [name for name, value in (("--max-concurrent", slots), ("--max-context", context)) if value is not None]
    lower = f"lower {' or '.join(asked)}, or give" if asked else "give"
    return (
        f"is {size(plan.budget)}, but {size(plan.needed)} are needed: {size(plan.costs.weight_bytes)} for the model, "
        f"{size(plan.cache_bytes)} for {plan.slots} sequences of {plan.context} tokens, {size(plan.prefix_bytes)} for kept prompts "
        f"and {size(plan.logit_bytes)} for logits; {lower} more with --memory ({size(free)} are free beside the model)."
    )


def measured_costs(model: HFLanguageModel) -> ModelCosts:
    """What a model costs, its cache by looking at one: whatever its layers, heads and dtype."""
    cache = SlotCache(model.layers, 1, 1)
    positions, mask = cache.place(0, torch.tensor([0], device=model.device), torch.tensor([1], device=model.device))
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model.forward(tokens, logits=False, positions=positions, attention_mask=model.attention_mask(mask), cache=cache)
    return ModelCosts(model.weight_bytes, cache.token_bytes, model.vocabulary_size, model.context)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the machine's memory, what the container around this process leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS: what is free is not told apart from what can be freed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = [int(lines["MemAvailable"].split()[0]) * 1024]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free.append(int(most) - int(used.read_text()))
    return max(0, min(free))

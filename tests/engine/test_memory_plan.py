"""The memory plan: never more than the budget, as much as fits, and refused with numbers what does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput
from knnlm_server.kv_cache import SlotCache
from knnlm_server.memory_plan import COPIES, MOST_SLOTS, MemoryPlan, ModelCosts, free_memory, measured_costs, plan_memory
from tests.engine.harness import Parts, complete, make_engine, random_prompt, request
from tests.stores import environment

COSTS = ModelCosts(weight_bytes=20_000_000, token_bytes=8192, vocabulary=1000, context=1024)
BUDGETS = st.one_of(st.none(), st.integers(1, 10**9))
SOME = st.one_of(st.none(), st.integers(1, 64))


@given(st.integers(0, 10**9), BUDGETS, SOME, st.one_of(st.none(), st.integers(2, 1024)), st.one_of(st.none(), st.integers(0, 10**8)))
def test_a_plan_keeps_to_its_budget_and_to_what_was_asked_for(
    free: int, budget: int | None, slots: int | None, context: int | None, prefix_bytes: int | None
) -> None:
    most = COSTS.weight_bytes + (free // 2 if budget is None else budget - COSTS.weight_bytes)
    given: dict[str, Any] = {"budget": budget, "slots": slots, "context": context, "prefix_bytes": prefix_bytes}
    smallest = MemoryPlan(COSTS, most, slots or 1, context or 256, prefix_bytes or 0)
    if not smallest.fits or (budget is not None and budget > COSTS.weight_bytes + free):
        with pytest.raises(InvalidInput, match="memory: is"):
            plan_memory(COSTS, free, 0.5, **given)
        return
    plan = plan_memory(COSTS, free, 0.5, **given)
    assert plan.needed <= plan.budget == most
    assert plan.slots == (slots or plan.slots)
    assert plan.context == (context or plan.context) <= COSTS.context
    assert plan.prefix_bytes >= 0
    assert prefix_bytes is None or plan.prefix_bytes == prefix_bytes
    if slots is None and plan.slots < MOST_SLOTS:
        assert MemoryPlan(COSTS, most, plan.slots + 1, plan.context, plan.prefix_bytes).needed > most, "one more would fit"
    if context is None and plan.context < COSTS.context:
        assert MemoryPlan(COSTS, most, plan.slots, plan.context + 1, plan.prefix_bytes).needed > most, "a token more would fit"


def test_the_lines_say_where_the_memory_goes() -> None:
    plan = plan_memory(COSTS, 10**9, 0.5, slots=4, prefix_bytes=1_000_000)
    assert plan.describe() == [
        "memory: 75.1 MB of 520.0 MB planned",
        "  model 20.0 MB, logits 20.5 MB, kept prompts 1.0 MB",
        "  cache 33.6 MB: 4 sequences of 1024 tokens, 8.2 kB a token",
    ]


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidInput) as caught:
        plan_memory(COSTS, 10**9, 0.5, budget=50_000_000, slots=16, context=1024)
    for part in ("memory: is 50.0 MB", "20.0 MB for the model", "134.3 MB for 16 sequences of 1024 tokens", "lower --max-concurrent"):
        assert part in str(caught.value)


def test_a_budget_above_what_is_free_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"memory: is 900.0 MB, but the model has 20.0 MB and only 500.0 MB are free"):
        plan_memory(COSTS, 500_000_000, 0.5, budget=900_000_000)


def test_costs_are_those_of_the_cache_that_runs(parts: Parts) -> None:
    costs = measured_costs(parts.model)
    engine = make_engine(parts, options={"prefix_bytes": 0}, max_concurrent=3)
    complete(engine, request("a", random_prompt(4, 1), max_new_tokens=1))
    held = sum(store.numel() * store.element_size() for store in engine._cache._stores())
    assert MemoryPlan(costs, 0, 3, parts.model.context, 0).cache_bytes == held
    assert costs.weight_bytes == sum(
        p.numel() * p.element_size() for p in (*parts.model._model.parameters(), *parts.model._model.buffers())
    )
    assert SlotCache(2, 1, 1).token_bytes == 0


def test_memory_of_this_machine_is_free() -> None:
    assert 0 < free_memory(torch.device("cpu")) < 2**50


def _peak_is_told() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _peak_is_told(), reason="the peak of resident memory is read from Linux's /proc")
def test_a_batchs_logits_take_no_more_copies_than_are_planned(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.engine.logit_peak", str(tmp_path), "float32"]
    # What is freed goes back to the system at once, so that what was used before hides nothing.
    settings = {**environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300, env=settings)
    assert done.returncode == 0, done.stderr
    scoring, steps = map(float, done.stdout.split()[-2:])
    assert 1 < scoring <= COPIES
    assert 0.9 < steps <= COPIES

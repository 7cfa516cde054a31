"""Kept beginnings of prompts: they are found for the same tenant and text alone, within their bounds, and change no result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_server.prefix_blocks import PrefixBlocks
from knnlm_server.sequence import GenerationRequest
from tests.engine.harness import Parts, RecordingEngine, complete, make_engine, random_prompt, request

BLOCK = 8
TEXTS = st.lists(st.integers(0, 1), max_size=9)


@given(st.integers(0, 5), st.lists(st.tuples(st.booleans(), TEXTS, st.sampled_from(["a", "b"])), max_size=40))
def test_blocks_are_those_of_the_very_text_and_never_too_many(capacity: int, calls: list[tuple[bool, list[int], str]]) -> None:
    """Against a pool that remembers whose text each place holds: what is found was put there for just this beginning."""
    blocks, pool = PrefixBlocks(capacity, 2), dict[int, tuple[str, tuple[int, ...]]]()
    for adds, text, tenant in calls:
        beginnings = [(tenant, tuple(text[:end])) for end in range(2, len(text) + 1, 2)]
        if adds:
            known, places = blocks.add(text, tenant)
            pool.update(zip(places, beginnings[known:], strict=False))
            assert known + len(places) == min(len(beginnings), capacity) or known + len(places) <= len(beginnings) <= capacity
            assert len(set(places)) == len(places)
        found = blocks.find(text, tenant)
        assert [pool[place] for place in found] == beginnings[: len(found)]
        if adds:
            assert len(found) == min(len(beginnings), capacity), "what was just added is there, as far as there is room"
        assert len(blocks) <= capacity
        assert all(0 <= place < capacity for place in found)


def test_the_blocks_not_used_for_longest_make_room() -> None:
    blocks = PrefixBlocks(3, 1)
    for text in ([1], [2], [3]):
        blocks.add(text, "a")
    blocks.find([1], "a")
    blocks.add([4], "a")
    assert [len(blocks.find(text, "a")) for text in ([1], [2], [3], [4])] == [1, 0, 1, 1]


def test_a_block_goes_before_the_one_it_stands_on() -> None:
    blocks = PrefixBlocks(3, 1)
    blocks.add([1, 2, 3], "a")
    blocks.add([9], "a")
    assert len(blocks.find([1, 2, 3], "a")) == 2


def sharing_engine(parts: Parts, max_concurrent: int = 4, prefix_bytes: int = 2**20) -> RecordingEngine:
    return make_engine(parts, options={"prefix_bytes": prefix_bytes, "block_tokens": BLOCK}, max_concurrent=max_concurrent)


def shared_requests(count: int, **given: object) -> list[GenerationRequest]:
    """Requests whose prompts share their first 22 tokens, and end differently."""
    beginning = random_prompt(22, 1)
    made = [request(f"r{n}", [*beginning, *random_prompt(5, 10 + n)], max_new_tokens=6, ignore_eos=True) for n in range(count)]
    return [replace(one, **given) for one in made]  # type: ignore[arg-type]


def computed_tokens(engine: RecordingEngine, *requests: GenerationRequest) -> int:
    """Prompt tokens that the engine computes to answer ``requests`` together."""
    before = engine.observed.prompt_tokens
    complete(engine, *requests)
    return engine.observed.prompt_tokens - before


def test_a_shared_beginning_is_computed_once_and_the_tokens_are_the_same(parts: Parts) -> None:
    asked = shared_requests(4)
    engine = sharing_engine(parts)
    answers = complete(engine, *asked)
    assert engine.observed.prompt_tokens == 27 + 3 * (27 - 2 * BLOCK), "two blocks of 8 are taken over by three of four"
    assert sorted(engine.observed.reused.values()) == [0, 16, 16, 16]
    plain = complete(sharing_engine(parts, prefix_bytes=0), *asked)
    assert {n: a.tokens for n, a in answers.items()} == {n: a.tokens for n, a in plain.items()}


def test_a_beginning_outlives_its_request(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2, max_concurrent=1)
    first, second = shared_requests(2)
    assert computed_tokens(engine, first) == 27
    assert computed_tokens(engine, second) == 27 - 16


def test_tenants_share_nothing(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2)
    first, second = shared_requests(2)
    assert computed_tokens(engine, replace(first, tenant="a"), replace(second, tenant="b")) == 54
    assert computed_tokens(engine, replace(first, tenant="b")) == 27 - 16


def test_the_same_prompt_again_computes_its_last_token(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2, max_concurrent=1)
    whole = request("a", random_prompt(2 * BLOCK, 3), max_new_tokens=2, ignore_eos=True)
    assert computed_tokens(engine, whole) == 16
    assert computed_tokens(engine, replace(whole, request_id="b")) == 8, "the last token's key and logits exist, so its block is read"
    assert torch.allclose(engine.keys["a"][0], engine.keys["b"][0], atol=1e-6)


def test_a_conversation_takes_over_what_was_said_before(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2, max_concurrent=1)
    first = request("a", random_prompt(8, 3), max_new_tokens=20, ignore_eos=True)
    said = complete(engine, first)["a"].tokens
    second = request("b", [*first.prompt, *said, 5, 6], max_new_tokens=3, ignore_eos=True)
    assert computed_tokens(engine, second) == 30 - 24
    plain = complete(sharing_engine(gpt2, prefix_bytes=0), second)["b"]
    assert complete(engine, replace(second, request_id="c"))["c"].tokens == plain.tokens


def test_a_pool_too_small_for_a_prompt_keeps_its_beginning(gpt2: Parts) -> None:
    block_bytes = BLOCK * bytes_per_token(gpt2)
    engine = sharing_engine(gpt2, 1, block_bytes + 5)
    first, second = shared_requests(2)
    assert computed_tokens(engine, first) == 27
    assert computed_tokens(engine, second) == 27 - 8


def test_nobody_waits_for_what_a_pool_smaller_than_a_block_can_not_keep(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2, prefix_bytes=BLOCK * bytes_per_token(gpt2) - 1)
    complete(engine, request("warm", [5], max_new_tokens=1))
    for asked in shared_requests(3):
        engine.add(asked)
    engine.step()
    assert len(engine.rows_of_steps) == 2, "no prompt was read"
    assert engine.rows_of_steps[-1] == 3, "the others wait for the first one's prompt, which they can't take over"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_a_pool_takes_memory_as_it_is_used() -> None:
    code = """
import torch
from pathlib import Path
from knnlm_server.prefix_cache import PrefixCache

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

cache = PrefixCache(1 << 30)
stores = [torch.zeros(1, 4, 64, 256) for _ in range(4)]
cache.save(stores, 0, list(range(32)), "")
before = resident()
cache.save(stores, 0, list(range(100, 164)), "")
print(resident() - before, before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    grown, before = map(int, done.stdout.split())
    assert before < 900 * 2**20, "the pool of 1 GiB is resident though one block of it is used"
    assert grown < 64 * 2**20


def test_samples_of_a_request_read_its_prompt_once(gpt2: Parts) -> None:
    (asked,) = shared_requests(1, samples=4)
    engine = sharing_engine(gpt2)
    answers = complete(engine, asked)
    assert engine.observed.prompt_tokens == 27 + 3 * (27 - 24), "its last token is in no full block"
    assert engine.observed.reused == {"r0": 0}, "a request is told of once"
    assert {tuple(answer.tokens) for answer in answers.values()} == {tuple(answers["r0"].tokens)}, "greedy samples are the same"


def test_rows_that_took_something_over_are_empty_when_they_are_free(gpt2: Parts) -> None:
    engine = sharing_engine(gpt2)
    complete(engine, *shared_requests(4))
    assert sum(engine.observed.reused.values()) >= 3 * 16
    for store in engine._cache._stores():
        assert bool((store[:, :, :-1] == 0).all()), "a masked NaN left over would reach the next request"


def bytes_per_token(parts: Parts) -> int:
    config = parts.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return int(2 * parts.model.layers * heads * (config.hidden_size // config.num_attention_heads) * 8)

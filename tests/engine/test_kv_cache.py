"""The slot cache against the cache of transformers, and what lies beyond a row's length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from knnlm.model import HFLanguageModel
from knnlm_server.kv_cache import SlotCache
from tests.engine.harness import Parts, random_prompt

# LLaMA's eager attention takes its softmax in float32 even in a float64 model; a wrong mask is off by 1.
ATTENTIONS_DIFFER = 1e-4
CAPACITY = 40


def read(model: HFLanguageModel, cache: SlotCache, first_row: int, rows: list[tuple[list[int], int]]) -> list[tuple[Tensor, Tensor]]:
    """Bring new tokens to rows from ``first_row`` on: for each (tokens, tokens already there) its (logits, keys)."""
    counts = torch.tensor([len(tokens) for tokens, _ in rows])
    positions, mask = cache.place(first_row, torch.tensor([start for _, start in rows]), counts)
    filled = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
    out = model.forward(filled, positions=positions, attention_mask=model.attention_mask(mask), cache=cache)
    assert out.logits is not None
    return [(out.logits[i, : len(tokens)], out.keys[i, : len(tokens)]) for i, (tokens, _) in enumerate(rows)]


def alone(model: HFLanguageModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    out = model.forward(torch.tensor([tokens]))
    assert out.logits is not None
    return out.logits[0], out.keys[0]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def stores(cache: SlotCache) -> list[Tensor]:
    return cache._stores()


def test_one_row_reads_like_a_dynamic_cache(parts: Parts) -> None:
    model, tokens = parts.model, random_prompt(20, 0)
    slots, dynamic = SlotCache(model.layers, 3, CAPACITY), DynamicCache()
    for first, last in ((0, 7), (7, 8), (8, 9), (9, 20)):
        ((logits, keys),) = read(model, slots, 1, [(tokens[first:last], first)])
        expected = model.forward(torch.tensor([tokens[first:last]]), cache=dynamic)
        assert expected.logits is not None
        assert_same((logits, keys), (expected.logits[0], expected.keys[0]))


def test_rows_of_any_length_and_any_number_of_new_tokens_share_a_pass(parts: Parts) -> None:
    model = parts.model
    texts = [random_prompt(length, length) for length in (23, 9, 12)]
    expected = [alone(model, text) for text in texts]
    cache = SlotCache(model.layers, 3, CAPACITY)
    starts = [0, 0, 0]
    for counts in ((10, 1, 5), (1, 6, 1), (12, 2, 6)):
        found = read(model, cache, 0, [(t[s : s + c], s) for t, s, c in zip(texts, starts, counts, strict=True)])
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            assert_same(found[row], (expected[row][0][start : start + count], expected[row][1][start : start + count]))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


def test_tokens_taken_back_leave_no_trace(parts: Parts) -> None:
    """Going back is only a shorter length: what was written beyond is overwritten or masked."""
    model, tokens, drafted = parts.model, random_prompt(12, 3), random_prompt(5, 4)
    cache = SlotCache(model.layers, 1, CAPACITY)
    read(model, cache, 0, [(tokens[:6], 0)])
    read(model, cache, 0, [(drafted, 6)])
    (found,) = read(model, cache, 0, [(tokens[6:8], 6)])
    assert_same(found, tuple(part[6:8] for part in alone(model, tokens)))


def test_the_filling_of_short_rows_is_never_read(parts: Parts) -> None:
    model = parts.model
    long, short = random_prompt(15, 5), random_prompt(6, 6)
    cache = SlotCache(model.layers, 2, 15)
    read(model, cache, 0, [(long[:10], 0), (short[:2], 0)])
    with torch.inference_mode():
        for store in stores(cache):
            assert bool((store[1, :, 2:15] == 0).all()), "filling was written into the row"
            store[:, :, 15] = torch.nan
    found = read(model, cache, 0, [(long[10:], 10), (short[2:], 2)])
    assert_same(found[0], tuple(part[10:] for part in alone(model, long)))
    assert_same(found[1], tuple(part[2:] for part in alone(model, short)))


def test_a_nan_in_a_freed_row_does_not_reach_the_next_request(parts: Parts) -> None:
    model = parts.model
    broken, other, late = random_prompt(12, 7), random_prompt(14, 8), random_prompt(5, 9)

    def next_request(*, cleared: bool) -> tuple[Tensor, Tensor]:
        cache = SlotCache(model.layers, 2, CAPACITY)
        read(model, cache, 0, [(other, 0), (broken, 0)])
        with torch.inference_mode():
            for store in stores(cache):
                store[1, :, : len(broken)] = torch.nan
        if cleared:
            cache.clear(1, len(broken))
        return read(model, cache, 0, [([1], len(other)), (late, 0)])[1]

    assert bool(next_request(cleared=False)[1].isnan().any()), "this test can't fail: a masked NaN harms nothing"
    assert_same(next_request(cleared=True), alone(model, late))


def test_swapped_rows_go_on_where_they_were(parts: Parts) -> None:
    model = parts.model
    one, two = random_prompt(16, 10), random_prompt(9, 11)
    cache = SlotCache(model.layers, 3, CAPACITY)
    read(model, cache, 0, [(one[:14], 0), (two[:4], 0)])
    cache.swap(0, 2, 14)
    found = read(model, cache, 1, [(two[4:], 4), (one[14:], 14)])
    assert_same(found[0], tuple(part[4:] for part in alone(model, two)))
    assert_same(found[1], tuple(part[14:] for part in alone(model, one)))
    for store in stores(cache):
        assert bool((store[0, :, :CAPACITY] == 0).all())


def test_clear_touches_its_own_row_alone(gpt2: Parts) -> None:
    cache = SlotCache(gpt2.model.layers, 3, CAPACITY)
    read(gpt2.model, cache, 0, [(random_prompt(8, row), 0) for row in range(3)])
    before = [store.clone() for store in stores(cache)]
    cache.clear(1, 8)
    for store, old in zip(stores(cache), before, strict=True):
        assert torch.equal(store[[0, 2]], old[[0, 2]])
        assert bool((store[1, :, :CAPACITY] == 0).all())


def test_moving_rows_of_an_unused_cache_does_nothing() -> None:
    cache = SlotCache(2, 2, 8)
    cache.swap(0, 1, 0)
    cache.clear(0, 0)


@pytest.mark.parametrize("path", ["tiny_gpt2_path", "tiny_llama_path"])
def test_the_mask_is_added_in_eager_attention_and_in_sdpa(path: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(path)
    texts = [random_prompt(13, 20), random_prompt(6, 21)]
    results = {}
    for attention in ("sdpa", "eager"):
        model = HFLanguageModel.load(folder, dtype="float64", attention=attention)
        assert model.attention == attention
        visible = torch.tensor([[[[True, False]]]])
        assert model.attention_mask(visible).tolist() == [[[[0.0, torch.finfo(torch.float64).min]]]]
        cache = SlotCache(model.layers, 2, CAPACITY)
        read(model, cache, 0, [(texts[0][:9], 0), (texts[1][:3], 0)])
        results[attention] = read(model, cache, 0, [(texts[0][9:], 9), (texts[1][3:], 3)])
        for found, text, start in zip(results[attention], texts, (9, 3), strict=True):
            assert_same(found, tuple(part[start:] for part in alone(model, text)))
    for one, other in zip(results["sdpa"], results["eager"], strict=True):
        assert_same(one, other, ATTENTIONS_DIFFER)

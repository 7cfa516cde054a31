"""All rows of a step drawn at once: each as if it were alone, with an error of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from knnlm.drawing import draw, sample
from knnlm.errors import ModelError
from knnlm.sampling import SamplingParams
from knnlm_server.row_sampling import ROWS_AT_ONCE, RowDraw, draw_rows

VOCABULARY = 50
TOKENS = st.lists(st.integers(0, 5), max_size=6)
PARAMS = st.sampled_from(
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=3, seed=4),
        SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=0.5),
        SamplingParams(seed=1),
        SamplingParams(seed=2),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.8),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.5),
        SamplingParams(top_p=0.8, min_p=0.01, typical_p=0.9),
        SamplingParams(bad_words=((1,), (2, 3)), logit_bias=((7, 5.0),)),
    ]
)


@st.composite
def row_draws(any_of: st.DrawFn) -> RowDraw:
    tokens = any_of(TOKENS)
    ends = any_of(st.sampled_from([(), (0, 9), tuple(range(49))]))
    return RowDraw(any_of(PARAMS), tokens, any_of(st.integers(0, len(tokens))), any_of(st.floats(0, 1, exclude_max=True)), ends)


def distributions(seed: int, rows: int) -> Tensor:
    """Random ones in float32, of which every third knows few tokens."""
    scores = 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    scores[::3, 10:] = -math.inf
    return scores.log_softmax(-1)


@given(st.integers(0, 1000), st.lists(row_draws(), min_size=1, max_size=3 * ROWS_AT_ONCE), st.randoms(use_true_random=False))
def test_every_row_draws_what_it_draws_alone_in_any_company(seed: int, rows: list[RowDraw], chance: object) -> None:
    said, base = distributions(seed, len(rows)), distributions(seed + 1, len(rows))
    alone = [draw_rows(said[i : i + 1], base[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert all(isinstance(token, int) for token in alone)
    assert draw_rows(said, base, rows) == alone
    order = list(range(len(rows)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert draw_rows(said[order], base[order], [rows[i] for i in order]) == [alone[i] for i in order]


@given(st.integers(0, 1000), PARAMS, TOKENS, st.floats(0, 1, exclude_max=True))
def test_a_row_draws_what_the_plain_loop_samples(seed: int, params: SamplingParams, tokens: list[int], uniform: float) -> None:
    said, base = distributions(seed, 1), distributions(seed + 1, 1)
    expected = sample(said[0], params, tokens, uniform, generated=len(tokens) // 2, base=base[0])
    assert draw_rows(said, base, [RowDraw(params, tokens, len(tokens) // 2, uniform)]) == [expected]


def test_ends_are_drawn_by_no_row_that_must_not_end() -> None:
    said = torch.log(torch.tensor([[0.7, 0.2, 0.1]] * 3))
    greedy = SamplingParams(temperature=0)
    rows = [RowDraw(greedy, (), 0, 0.5, ends) for ends in ((), (0,), (0, 1))]
    assert draw_rows(said, said, rows) == [0, 1, 2]


def test_where_all_neighbours_say_that_the_text_ends_the_base_model_goes_on() -> None:
    said = torch.tensor([[0.0, -math.inf, -math.inf]])
    base = torch.log(torch.tensor([[0.5, 0.1, 0.4]]))
    assert draw_rows(said, base, [RowDraw(SamplingParams(temperature=0), (), 0, 0.5, (0,))]) == [2]


class TestFailures:
    GOOD = RowDraw(SamplingParams(temperature=0.9, repetition_penalty=1.2), [1, 2], 1, 0.4)

    def test_an_exception_in_one_row_is_that_rows_alone(self) -> None:
        bad = RowDraw(SamplingParams(temperature=0.9, logit_bias=((VOCABULARY, 1.0),)), [1], 0, 0.4)
        rows = [self.GOOD, bad, self.GOOD, bad, self.GOOD]
        said = distributions(3, 5)
        drawn = draw_rows(said, said, rows)
        expected = [draw_rows(said[i : i + 1], said[i : i + 1], [self.GOOD])[0] for i in (0, 2, 4)]
        assert [drawn[i] for i in (0, 2, 4)] == expected
        assert all(isinstance(drawn[i], ValueError) for i in (1, 3))

    def test_a_draw_that_breaks_for_several_is_tried_for_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fragile(scores: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
            if bool((scores[:, 0] == 0).any()):
                raise RuntimeError("broken")
            return draw(scores, params, uniforms)

        monkeypatch.setattr("knnlm_server.row_sampling.draw", fragile)
        said = distributions(3, 4)
        said[2] = torch.full((VOCABULARY,), -math.inf).index_fill(0, torch.tensor([0]), 0.0)
        drawn = draw_rows(said, said, [self.GOOD] * 4)
        assert isinstance(drawn[2], RuntimeError)
        assert all(isinstance(drawn[i], int) for i in (0, 1, 3))

    @pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(bad_words=((3,),))])
    def test_log_probabilities_that_are_no_numbers_fail_their_row(self, params: SamplingParams) -> None:
        said = distributions(3, 3)
        said[1, 7] = math.nan
        drawn = draw_rows(said, said, [RowDraw(params, (), 0, 0.5)] * 3)
        assert isinstance(drawn[1], ModelError)
        assert isinstance(drawn[0], int)
        assert isinstance(drawn[2], int)

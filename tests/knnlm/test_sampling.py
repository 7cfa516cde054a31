"""Sampling against an obvious NumPy version, against ``generate`` of transformers, and refusals that name the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from knnlm import drawing
from knnlm.drawing import draw, sample, truncate
from knnlm.errors import InvalidInput, ModelError
from knnlm.penalties import allowed_scores, forbid, penalize
from knnlm.sampling import SamplingParams
from tests.knnlm import sampling_reference as obvious
from tests.tiny import VOCABULARY as TINY_VOCABULARY
from tests.tiny import tiny_gpt2

VOCABULARY = 40
GREEDY = SamplingParams(temperature=0)
TOKENS = st.integers(0, VOCABULARY - 1)
PARAMS = st.builds(
    SamplingParams,
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.0, 30.0]), max_size=4).map(lambda found: tuple(found.items())),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.8, 100.0]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.2]),
    bad_words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=4, unique=True).map(tuple),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 39, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
)
HISTORIES = st.lists(st.integers(0, 4), max_size=8)
UNIFORMS = st.one_of(st.sampled_from([0.0, 5e-324, 1e-12, 0.5, math.nextafter(1.0, 0.0)]), st.floats(0, 1, exclude_max=True))


def log_probs(seed: int, impossible: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """A random distribution in float64 in which the last ``impossible`` tokens have probability 0."""
    scores = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if impossible:
        scores[-impossible:] = -math.inf
    return scores.log_softmax(-1)


@given(st.integers(0, 10_000), PARAMS, HISTORIES, st.integers(0, 8), UNIFORMS, st.sampled_from([0, 10]))
def test_a_token_is_that_of_the_obvious_version(
    seed: int, params: SamplingParams, tokens: list[int], generated: int, uniform: float, impossible: int
) -> None:
    said, generated = log_probs(seed, impossible), min(generated, len(tokens))
    scores = obvious.penalized(said.numpy(), params, tokens, generated)
    scores[list(obvious.forbidden(params, tokens, ()))] = -math.inf
    assert sample(said, params, tokens, uniform, generated=generated) == obvious.draw(scores, params, uniform)


@given(st.integers(0, 10_000), PARAMS, HISTORIES, UNIFORMS)
def test_a_row_among_others_draws_what_it_draws_alone_bit_for_bit(
    seed: int, params: SamplingParams, tokens: list[int], uniform: float
) -> None:
    # Coarse scores, so that many are equal.
    rows = torch.stack([(2 * log_probs(seed + i)).round() / 2 for i in range(7)]).float().log_softmax(-1)
    numbers = torch.tensor([uniform, 0.1, 0.2, 0.3, 0.7, 0.9, uniform], dtype=torch.float64)
    together = draw(rows, params, numbers)
    assert together.tolist() == [int(draw(rows[i : i + 1], params, numbers[i : i + 1])) for i in range(7)]


class TestLargeVocabulary:
    """Tokens are looked for among the most probable ones first, which may not show."""

    @pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99, 0.999999])
    @pytest.mark.parametrize("peak", [0.3, 2.0, 6.0])
    def test_the_nucleus_is_that_of_the_sorted_vocabulary(self, top_p: float, peak: float) -> None:
        said = (peak * log_probs(5, vocabulary=12_000) / 3).log_softmax(-1)
        params = SamplingParams(top_p=top_p)
        for uniform in (0.0, 0.2, 0.5, 0.8, math.nextafter(1, 0)):
            assert sample(said, params, (), uniform) == obvious.draw(said.numpy(), params, uniform)

    @pytest.mark.parametrize("params", [SamplingParams(top_p=0.9), SamplingParams(top_p=0.9, min_p=0.01, typical_p=0.9)])
    def test_a_nucleus_that_is_not_in_the_list_is_found_in_the_whole_vocabulary(self, params: SamplingParams) -> None:
        flat = torch.zeros(20_000, dtype=torch.float64).log_softmax(-1)
        flat[:100] += 1.0
        assert sample(flat.log_softmax(-1), params, (), 0.9999) > drawing.SHORTLIST

    @pytest.mark.parametrize("vocabulary", [50, 10_000])
    @pytest.mark.parametrize("params", [SamplingParams(top_k=10), SamplingParams(top_p=0.6), SamplingParams(top_k=10, top_p=0.99)])
    def test_tokens_as_probable_as_the_last_one_that_stays_stay(self, vocabulary: int, params: SamplingParams) -> None:
        said = (
            torch.full((vocabulary,), -20.0)
            .index_fill(0, torch.arange(7, 35), 0.0)
            .index_fill(0, torch.tensor([9, 30]), 1.0)
            .log_softmax(-1)
        )
        drawn = {sample(said, params, (), uniform) for uniform in np.linspace(0, 1, 400, endpoint=False)}
        assert drawn == set(range(7, 35))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_rows_of_a_real_width_do_not_depend_on_their_batch(self, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            rows = torch.stack([log_probs(i, vocabulary=50_257) for i in range(6)]).float()
            rows[3:] = ((4 * rows[3:]).round() / 4).log_softmax(-1)
            numbers = torch.linspace(0.01, 0.99, 6, dtype=torch.float64)
            for params in (SamplingParams(), SamplingParams(top_p=0.7), SamplingParams(top_k=60, top_p=0.9), SamplingParams(typical_p=0.6)):
                alone = [int(draw(rows[i : i + 1], params, numbers[i : i + 1])) for i in range(6)]
                assert draw(rows, params, numbers).tolist() == alone
        finally:
            torch.set_num_threads(before)


class TestGenerate:
    """Token for token, and score for score, what ``generate`` of transformers does with normalised logits."""

    @staticmethod
    def model() -> Any:
        model = tiny_gpt2(seed=3)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0

        def normalize(_module: Any, _inputs: Any, output: Any) -> Any:
            output.logits = output.logits.log_softmax(-1)
            return output

        model.register_forward_hook(normalize)
        return model

    def followed(self, params: SamplingParams, prompt: Sequence[int], **options: Any) -> tuple[list[int], list[tuple[Any, Any]]]:
        """The completion of ``generate``, and for each token the log-probabilities and its scores after all processors."""
        out = self.model().generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, return_dict_in_generate=True,
            output_scores=True, output_logits=True, logits_processor=LogitsProcessorList(), **options,
        )  # fmt: skip
        pairs = [(logits[0], scores[0]) for logits, scores in zip(out.logits, out.scores, strict=True)]
        return out.sequences[0, len(prompt) :].tolist(), pairs

    @pytest.mark.parametrize(
        ("params", "options"),
        [
            (GREEDY, {}),
            (replace(GREEDY, repetition_penalty=1.6), {"repetition_penalty": 1.6}),
            (replace(GREEDY, repetition_penalty=0.8), {"repetition_penalty": 0.8}),
            (replace(GREEDY, logit_bias=((5, 9.0), (11, 8.5), (80, -50.0))), {"sequence_bias": [[[5], 9.0], [[11], 8.5], [[80], -50.0]]}),
            (
                replace(GREEDY, logit_bias=((5, 9.0), (11, 8.5)), repetition_penalty=1.8, bad_words=((5,), (11, 11), (1, 2, 11))),
                {"sequence_bias": [[[5], 9.0], [[11], 8.5]], "repetition_penalty": 1.8, "bad_words_ids": [[5], [11, 11], [1, 2, 11]]},
            ),
        ],
    )  # fmt: skip
    def test_greedy(self, params: SamplingParams, options: dict[str, Any]) -> None:
        prompt = [9, 1, 2]
        expected, steps = self.followed(params, prompt, do_sample=False, **options)
        tokens = list(prompt)
        for logits, _ in steps:
            tokens.append(sample(logits, params, tokens, 0.5, generated=len(tokens) - len(prompt)))
        assert tokens[len(prompt) :] == expected
        assert (params == GREEDY) == (expected == self.followed(GREEDY, prompt, do_sample=False)[0])

    @pytest.mark.parametrize(
        ("params", "options"),
        [
            (SamplingParams(), {}),
            (SamplingParams(temperature=0.6), {"temperature": 0.6}),
            (SamplingParams(top_k=12), {"top_k": 12}),
            (SamplingParams(top_p=0.8), {"top_p": 0.8}),
            (SamplingParams(min_p=0.2), {"min_p": 0.2}),
            (SamplingParams(typical_p=0.6), {"typical_p": 0.6}),
            (
                SamplingParams(
                    logit_bias=((7, 3.0),), repetition_penalty=1.3, bad_words=((7, 7), (3,)), temperature=1.4, top_k=40, top_p=0.9,
                    min_p=0.02, typical_p=0.9,
                ),
                {
                    "sequence_bias": [[[7], 3.0]], "repetition_penalty": 1.3, "bad_words_ids": [[7, 7], [3]], "temperature": 1.4,
                    "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9,
                },
            ),
        ],
    )  # fmt: skip
    def test_scores_that_are_drawn_from(self, params: SamplingParams, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        prompt = [9, 1, 2]
        completion, steps = self.followed(params, prompt, do_sample=True, **{"top_k": 0, **options})
        tokens = list(prompt)
        for token, (logits, expected) in zip(completion, steps, strict=True):
            scores = allowed_scores(logits, logits, params, tokens, len(tokens) - len(prompt), ends=())
            found = truncate(scores[None] / params.temperature, params)[0]
            assert found.equal(expected)
            tokens.append(token)
        assert bool((expected == -math.inf).any()) == (params not in (SamplingParams(), SamplingParams(temperature=0.6)))
        assert len(expected) == TINY_VOCABULARY


class TestForbidden:
    def test_a_bad_word_is_forbidden_where_its_beginning_stands_and_nowhere_else(self) -> None:
        said = log_probs(1)
        for tokens, gone in (([1, 2], {3}), ([2, 1], set()), ([2], set()), ([], set())):
            scores = forbid(said, ((1, 2, 3),), tokens, ())
            assert set((scores == -math.inf).nonzero()[:, 0].tolist()) == gone
            assert scores[scores > -math.inf].equal(said[scores > -math.inf])

    def test_ends_are_forbidden(self) -> None:
        assert forbid(log_probs(1), (), [], {4, 6}).isneginf().nonzero()[:, 0].tolist() == [4, 6]

    def test_the_base_model_speaks_where_nothing_is_left_of_the_mixture_with_the_same_penalties(self) -> None:
        mixture = torch.full((5,), -math.inf).index_fill(0, torch.tensor([2]), 0.0)
        base = torch.tensor([0.1, 0.2, 0.3, 0.35, 0.05]).log()
        params = replace(GREEDY, bad_words=((2,),), logit_bias=((4, 9.0),))
        assert sample(mixture, params, (), 0.5, base=base) == 4
        assert sample(mixture, replace(params, bad_words=()), (), 0.5, base=base) == 2

    def test_bad_words_that_cover_the_vocabulary_are_let_pass_before_ends(self) -> None:
        said = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        params = replace(GREEDY, bad_words=((0,), (1,), (2,), (3,)))
        assert sample(said, params, (), 0.5) == 3
        assert allowed_scores(said, said, params, (), 0, {3}).tolist() == [*said[:3].tolist(), -math.inf]
        assert allowed_scores(said, said, params, (), 0, range(4)).equal(said)


def test_frequency_and_presence_count_the_completion_only() -> None:
    said = log_probs(0)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    found = said - penalize(said, params, [3, 3, 8, 5, 5, 8], generated=3)
    expected = np.zeros(VOCABULARY)
    expected[[5, 8]] = [2 * 0.5 + 0.25, 0.5 + 0.25]
    assert found.numpy() == pytest.approx(expected, abs=1e-12)
    assert penalize(said, params, [3, 3, 8], generated=0).equal(said)


@given(st.integers(0, 10_000), HISTORIES, UNIFORMS)
def test_temperature_0_takes_the_most_probable_token_whatever_else_is_set(seed: int, tokens: list[int], uniform: float) -> None:
    said = log_probs(seed)
    for params in (GREEDY, SamplingParams(temperature=0, top_k=3, top_p=0.2, min_p=0.9, typical_p=0.1)):
        assert sample(said, params, tokens, uniform) == int(said.argmax())


def test_temperature_0_breaks_ties_by_the_smaller_id() -> None:
    assert sample(torch.log(torch.tensor([0.1, 0.3, 0.3, 0.3])), GREEDY, [], 0.9) == 1
    wide = torch.zeros(3, 50_257).index_fill(1, torch.tensor([20_000, 40_000]), 1.0)
    assert draw(wide, GREEDY, torch.zeros(3, dtype=torch.float64)).tolist() == [20_000] * 3


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    said = torch.log(torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64))
    expected = [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.7501, 3), (math.nextafter(1, 0), 3)]
    assert [sample(said, SamplingParams(), [], u) for u, _ in expected] == [token for _, token in expected]


def test_draws_follow_the_distribution() -> None:
    said = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    draws = [sample(said, SamplingParams(), [], (i + 0.5) / 1000) for i in range(1000)]
    assert [draws.count(token) for token in range(4)] == [100, 200, 300, 400]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-5), SamplingParams(temperature=1e-3), SamplingParams(temperature=1e5),
        SamplingParams(repetition_penalty=1e6, temperature=1e-6), SamplingParams(repetition_penalty=1e-6, logit_bias=((3, 100.0),)),
        SamplingParams(frequency_penalty=100.0, presence_penalty=100.0, temperature=1e-6), SamplingParams(top_p=1e-300, typical_p=1e-300),
    ],
)  # fmt: skip
def test_extreme_values_that_are_accepted_draw_a_possible_token(params: SamplingParams) -> None:
    said = log_probs(2, impossible=10).float()
    for uniform in (0.0, 0.5, math.nextafter(1, 0)):
        token = sample(said, params.validate(), [*range(VOCABULARY)] * 3, uniform, generated=2 * VOCABULARY)
        assert said[token] > -math.inf


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e40, 1e300])
def test_temperatures_that_leave_no_token_in_float32_are_refused(temperature: float) -> None:
    with pytest.raises(InvalidInput) as refused:
        SamplingParams(temperature=temperature).validate()
    assert refused.value.field == "temperature"


def test_a_certain_token_survives_everything() -> None:
    said = torch.full((5,), -math.inf)
    said[3] = 0.0
    for params in (
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.01),
        SamplingParams(min_p=1.0),
        SamplingParams(typical_p=0.01),
        SamplingParams(temperature=0.01),
    ):
        assert sample(said, params, [3, 1], 0.999) == 3


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1)]
)
def test_log_probabilities_that_are_none_are_an_error_and_no_token(value: float, params: SamplingParams) -> None:
    with pytest.raises(ModelError, match="No token can be drawn"):
        sample(torch.full((9,), value), params, (), 0.5)


def test_one_value_that_is_no_number_spoils_its_row_alone() -> None:
    rows = torch.stack([log_probs(0), log_probs(1), log_probs(2)])
    rows[1, 4] = math.nan
    numbers = torch.full((3,), 0.4, dtype=torch.float64)
    for params in (GREEDY, SamplingParams(), SamplingParams(top_k=5, top_p=0.9), SamplingParams(top_p=0.9), SamplingParams(typical_p=0.5)):
        drawn = draw(rows, params, numbers).tolist()
        assert drawn[1] == -1
        assert [drawn[0], drawn[2]] == [sample(rows[i], params, (), 0.4) for i in (0, 2)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01),
        ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan), ("repetition_penalty", 1e-7), ("typical_p", 0.0), ("typical_p", 1.5), ("typical_p", math.nan),
        ("frequency_penalty", 101.0), ("frequency_penalty", math.nan), ("presence_penalty", -101.0), ("presence_penalty", math.inf),
    ],
)  # fmt: skip
def test_out_of_range_values_are_refused_by_field_with_the_callers_prefix(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=str(value).replace("-", "\\-")) as refused:
        replace(SamplingParams(), **{field: value}).validate("sampling.")  # type: ignore[arg-type]
    assert refused.value.field == f"sampling.{field}"


def test_parts_of_lists_are_refused_by_their_place() -> None:
    with pytest.raises(InvalidInput) as refused:
        SamplingParams(bad_words=((1,), ())).validate("sampling.")
    assert refused.value.field == "sampling.bad_words[1]"
    with pytest.raises(InvalidInput) as refused:
        SamplingParams(logit_bias=((5, 1.0), (7, math.nan))).validate()
    assert refused.value.field == "logit_bias[7]"


@given(PARAMS)
def test_validate_returns_what_it_accepts(params: SamplingParams) -> None:
    assert params.validate() is params

"""As a Hugging Face model the mixture is the same mixture: generate, beams, batches, loss and pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from knnlm.errors import InvalidInput
from knnlm.hf import KNNLMForCausalLM
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

MIXTURE = Mixture(k=8, temperature=5.0, weight=0.4)
PROMPTS = ("Once upon a time", "The little")


@pytest.fixture(scope="module")
def store(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    build(text_folder(folder / "corpus", tiny_corpus(6)), folder / "store", gpt2, index="Flat", keys="float32", max_length=32)
    return folder / "store"


@pytest.fixture(scope="module")
def opened(store: Path) -> OpenedKNNLM:
    """In float64: equal is equal to the last token."""
    return open_store(store, dtype="float64")


@pytest.fixture(scope="module")
def model(opened: OpenedKNNLM) -> KNNLMForCausalLM:
    return KNNLMForCausalLM(opened, MIXTURE)


def encoded(model: KNNLMForCausalLM, prompt: str) -> torch.Tensor:
    return torch.tensor([model.opened.knn_lm.tokenizer.encode(prompt)])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation_is_that_of_the_plain_loop(model: KNNLMForCausalLM, prompt: str) -> None:
    ids = encoded(model, prompt)
    found = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    expected = model.opened.generate(prompt, max_new_tokens=12, mixture=MIXTURE)
    assert model.opened.knn_lm.tokenizer.decode(found) == expected
    assert expected


def test_log_probs_are_those_of_the_mixture(model: KNNLMForCausalLM) -> None:
    ids = encoded(model, PROMPTS[0])
    every = model(ids).logits
    torch.testing.assert_close(every.logsumexp(-1), torch.zeros(every.shape[:2], dtype=every.dtype), atol=1e-6, rtol=0)
    for column in range(ids.shape[1]):
        expected = model.opened.knn_lm.next_token(ids[0, : column + 1].tolist(), MIXTURE).log_probs[0]
        torch.testing.assert_close(every[0, column].float(), expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


def test_a_padded_batch_is_each_prompt_alone(model: KNNLMForCausalLM) -> None:
    alone = [model.generate(encoded(model, prompt), max_new_tokens=8, do_sample=False)[0] for prompt in PROMPTS]
    rows = [encoded(model, prompt)[0] for prompt in PROMPTS]
    widest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(widest - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.arange(widest) >= widest - len(row) for row in rows]).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, expected, found in zip(rows, alone, together, strict=True):
        count = len(expected) - len(row)
        assert found[widest : widest + count].tolist() == expected[len(row) :].tolist()


def test_beams_are_scored_by_the_mixture(model: KNNLMForCausalLM) -> None:
    ids = encoded(model, PROMPTS[0])
    found = model.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        eos_token_id=None,
    )  # fmt: skip
    sequence = found.sequences[0]
    log_probs = model(sequence[None]).logits[0].log_softmax(-1)
    total = sum(float(log_probs[at - 1, sequence[at]]) for at in range(ids.shape[1], len(sequence)))
    assert float(found.sequences_scores[0]) == pytest.approx(total, abs=1e-4)
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    of_greedy = model(greedy[None]).logits[0].log_softmax(-1)
    assert total >= sum(float(of_greedy[at - 1, greedy[at]]) for at in range(ids.shape[1], len(greedy))) - 1e-6


def test_the_loss_is_the_mean_over_the_mixture(model: KNNLMForCausalLM) -> None:
    ids = encoded(model, "Once upon a time there was a little cat.")
    out = model(ids, labels=ids)
    taken = out.logits[0, :-1].gather(1, ids[0, 1:, None])
    assert float(out.loss) == pytest.approx(-float(taken.mean()), abs=1e-6)


def test_weight_zero_is_the_base_model(opened: OpenedKNNLM) -> None:
    model = KNNLMForCausalLM(opened, Mixture(weight=0.0))
    ids = encoded(model, PROMPTS[0])
    expected = opened.model.hf_model.generate(ids, max_new_tokens=10, do_sample=False)
    assert model.generate(ids, max_new_tokens=10, do_sample=False).tolist() == expected.tolist()


def test_a_pipeline_runs_on_it(store: Path) -> None:
    model = KNNLMForCausalLM.from_store(store, mixture=MIXTURE)
    run = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    (said,) = run(PROMPTS[0], max_new_tokens=6, do_sample=False, return_full_text=False)
    assert said["generated_text"] == model.opened.generate(PROMPTS[0], max_new_tokens=6, mixture=MIXTURE)


def test_seeded_sampling_repeats_itself(model: KNNLMForCausalLM) -> None:
    ids = encoded(model, PROMPTS[1])

    def drawn() -> list[int]:
        torch.manual_seed(3)
        found: list[int] = model.generate(ids, max_new_tokens=10, do_sample=True, top_k=5)[0].tolist()
        return found

    assert drawn() == drawn()


def test_embeddings_have_no_keys(model: KNNLMForCausalLM) -> None:
    with pytest.raises(InvalidInput, match="inputs_embeds can't be used"):
        model(input_ids=None)


def test_settings_that_are_no_mixture_are_refused(opened: OpenedKNNLM) -> None:
    with pytest.raises(InvalidInput, match="weight"):
        KNNLMForCausalLM(opened, Mixture(weight=float(np.nan)))

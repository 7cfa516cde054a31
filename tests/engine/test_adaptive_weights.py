"""A datastore with a gate, served: the same tokens and weights as the library's own loop and as a Hugging Face model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm.evaluation.scoring import score
from knnlm.gate import Gate
from knnlm.gated import StoreGate
from knnlm.hf import KNNLMForCausalLM
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.mixture import Mixture
from knnlm.opening import OpenedKNNLM
from knnlm_server.datastores import Datastores
from knnlm_server.sequence import DatastoreChoice, DetailParams, GenerationRequest, RetrievalParams, RetrieveRequest, ScoreRequest
from tests.engine.harness import GREEDY, LM_ALONE, CountingIndex, Parts, complete, drive, make_engine, random_prompt, request
from tests.gates import constant_gate, tiny_gate

GATE = tiny_gate(2)
DETAIL = DetailParams(log_probs=True, alternatives=3, neighbors=2, evidence=True)
STEPS = 14


def asking(parts: Parts) -> RetrievalParams:
    """What a request that sets nothing asks for."""
    found: RetrievalParams = parts.datastores().info[0].default_retrieval
    assert found.adaptive
    return found


def prompts(parts: Parts) -> list[list[int]]:
    """Beginnings of the datastore's own documents, which are followed, and tokens by chance."""
    starts = parts.store.documents.token_starts[:3].tolist()
    own = [parts.store.tokens.slice(start, start + 12 + start % 5).tolist() for start in starts]
    return [*own, random_prompt(5, 1), random_prompt(1, 2), random_prompt(20, 3)]


def asked(name: str, prompt: Sequence[int], retrieval: RetrievalParams) -> GenerationRequest:
    return request(name, prompt, GREEDY, retrieval, DETAIL, max_new_tokens=STEPS, ignore_eos=True)


def plain_loop(knn_lm: KNNLanguageModel, prompt: Sequence[int]) -> tuple[list[int], list[Mixed]]:
    """Greedy, reading everything anew for each token."""
    tokens, steps = list(prompt), []
    for _ in range(STEPS):
        steps.append(knn_lm.next_token(tokens))
        tokens.append(int(steps[-1].log_probs.argmax()))
    return tokens[len(prompt) :], steps


@pytest.fixture(scope="module", params=[2, 6, 11])
def gated(request: pytest.FixtureRequest, gpt2: Parts) -> Parts:
    return gpt2.gated(tiny_gate(request.param))


def test_engine_and_hugging_face_model_equal_the_plain_loop_token_for_token(gated: Parts) -> None:
    hf = KNNLMForCausalLM(OpenedKNNLM(gated.knn_lm, gated.searchable, gated.model))
    every = prompts(gated)
    answers = complete(make_engine(gated), *(asked(str(n), prompt, asking(gated)) for n, prompt in enumerate(every)))
    for number, prompt in enumerate(every):
        expected, steps = plain_loop(gated.knn_lm, prompt)
        answer = answers[str(number)]
        assert answer.tokens == expected
        assert [event.interpolation_weight for event in answer.events] == pytest.approx([float(s.weight[0]) for s in steps], abs=1e-5)
        assert [event.knn_log_prob is not None for event in answer.events] == [bool(s.searched[0]) for s in steps]
        for event, step in zip(answer.events, steps, strict=True):
            assert event.log_prob == pytest.approx(float(step.log_probs[0, event.token_id]), abs=1e-5)
            assert bool(event.neighbors) == bool(step.searched[0])
        assert answer.finish is not None
        assert answer.finish.evidence is not None
        assert answer.finish.evidence.searched_tokens == sum(bool(step.searched[0]) for step in steps)
        said = hf.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        assert said[0, len(prompt) :].tolist() == expected


def test_what_is_tested_here_follows_documents_skips_and_mixes(gpt2: Parts) -> None:
    """With a context of its own last token alone, a gate says something else: contexts matter, and so these tests can fail."""
    parts, differences, weights = gpt2.gated(GATE), 0, []
    for prompt in prompts(parts):
        weight = parts.knn_lm.next_token(prompt).weight
        ids = torch.tensor([prompt])
        out = parts.model.forward(ids)
        assert out.logits is not None
        short = torch.cat([torch.full((1, 15), -1), ids[:, -1:]], dim=1)
        blind = parts.knn_lm.mix_all(out.logits[:, -1].float().log_softmax(-1), out.keys[:, -1], None, short)
        differences += not torch.equal(blind.weight, weight)
        weights += [float(step.weight[0]) for step in plain_loop(parts.knn_lm, prompt)[1]]
    assert differences, weights
    assert 0.2 < np.mean(np.array(weights) > 0) < 0.95
    assert len(set(weights)) > 10


def test_a_hugging_face_model_reads_columns_batches_and_beams_alike(gpt2: Parts) -> None:
    gated = gpt2.gated(GATE)
    hf = KNNLMForCausalLM(OpenedKNNLM(gated.knn_lm, gated.searchable, gated.model))
    ids = torch.tensor([prompts(gated)[0]])
    every = hf(ids).logits
    for column in range(ids.shape[1]):
        expected = gated.knn_lm.next_token(ids[0, : column + 1].tolist()).log_probs[0]
        torch.testing.assert_close(every[0, column], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(hf(ids, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(hf(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])
    rows = prompts(gated)[:4]
    widest = max(map(len, rows))
    padded = torch.tensor([[0] * (widest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in rows])
    together = hf.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    for row, found in zip(rows, together, strict=True):
        assert found[widest:].tolist() == plain_loop(gated.knn_lm, row)[0][:8]
    beams = hf.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        eos_token_id=None,
    )  # fmt: skip
    sequence = beams.sequences[0]
    log_probs = hf(sequence[None]).logits[0]
    total = sum(float(log_probs[at - 1, sequence[at]]) for at in range(ids.shape[1], len(sequence)))
    assert float(beams.sequences_scores[0]) == pytest.approx(total, abs=1e-4)


def test_generating_for_one_prompt_is_the_plain_loop(gpt2: Parts) -> None:
    gated = gpt2.gated(GATE)
    opened = OpenedKNNLM(gated.knn_lm, gated.searchable, gated.model)
    decode, prompt = gated.knn_lm.tokenizer.decode, "Story 1\nThe farmer"
    expected = plain_loop(gated.knn_lm, gated.knn_lm.tokenizer.encode(prompt))[0]
    eos = next((at for at, token in enumerate(expected) if token in gated.model.eos_ids), STEPS)
    assert opened.generate(prompt, max_new_tokens=STEPS) == decode(expected[:eos])


def test_rows_that_are_skipped_are_not_searched_and_counted_as_such(gpt2: Parts) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)  # type: ignore[attr-defined]
    gated = gpt2.searched_by(index).gated(GATE)
    engine = make_engine(gated)
    requests = [asked(str(n), prompt, asking(gated)) for n, prompt in enumerate(prompts(gated))]
    fixed = asked("fixed", random_prompt(4, 4), replace(asking(gated), adaptive=False))
    off = asked("off", random_prompt(4, 4), LM_ALONE)
    answers = complete(engine, *requests, fixed, off)
    searched = sum(report.searched_rows for report in engine.observed.steps)
    skipped = sum(report.skipped_rows for report in engine.observed.steps)
    told = [event.knn_log_prob is not None for answer in answers.values() for event in answer.events]
    assert (searched, skipped) == (sum(told), len(told) - sum(told))
    assert index.queries == searched
    assert STEPS < searched < STEPS * (len(requests) + 1)
    for event in answers["off"].events:
        assert event.log_prob == event.lm_log_prob
    assert {event.interpolation_weight for event in answers["fixed"].events} == {gated.knn_lm.mixture.weight}
    for report in engine.observed.steps:
        assert report.searched_rows or report.retrieval_seconds == 0


def test_what_is_not_searched_is_the_base_model_bit_for_bit(gpt2: Parts) -> None:
    gated = gpt2.gated(GATE)
    answers = complete(make_engine(gated), *(asked(str(n), p, asking(gated)) for n, p in enumerate(prompts(gated))))
    without = [event for answer in answers.values() for event in answer.events if event.interpolation_weight == 0]
    assert without
    for event in without:
        assert event.log_prob == event.lm_log_prob
        assert event.knn_share == 0
        assert all(alternative.log_prob == alternative.lm_log_prob for alternative in event.alternatives)


@pytest.mark.parametrize("length", [2, 40, 300])
def test_scores_are_the_evaluations_own(gpt2: Parts, length: int) -> None:
    gated = gpt2.gated(GATE)
    tokens = tuple(random_prompt(length, 31))
    engine = make_engine(gated)
    engine.add_score(ScoreRequest("s", tokens, asking(gated)))
    scores = drive(engine)["s"].scores
    assert scores is not None
    weights = torch.empty(length - 1, dtype=torch.float64)
    expected = {name: torch.empty(length - 1) for name in ("log_probs", "lm_log_probs", "knn_log_probs")}
    for batch in score(gated.knn_lm, [np.array(tokens)], gated.store.manifest.windowing, batch_tokens=1024):
        weights[batch.rows] = batch.weight
        for name, values in expected.items():
            values[batch.rows] = getattr(batch, name)
    assert length < 40 or 0 < float((weights > 0).double().mean()) < 1
    for name, values in expected.items():
        assert list(getattr(scores, name)) == values.tolist()


def test_a_context_that_is_looked_up_is_always_searched(gpt2: Parts) -> None:
    parts = gpt2.gated(constant_gate(0.0))
    engine = make_engine(parts)
    engine.add_retrieve(RetrieveRequest("r", (5, 6, 7), replace(asking(parts), weight=1.0, adaptive=False), 4))
    found = drive(engine)["r"].neighbors
    assert found is not None
    assert len(found.neighbors) == 4


def test_a_gate_with_a_fixed_weight_of_0_beside_it_searches(gpt2: Parts) -> None:
    gated = gpt2.gated(constant_gate(0.7))
    gated.knn_lm.mixture = Mixture(8, 10.0, 0.0)
    (answer,) = complete(make_engine(gated), asked("a", random_prompt(4, 4), asking(gated))).values()
    assert {event.interpolation_weight for event in answer.events} == {0.7}


def served(gated: Parts, gates: dict[str, Gate | None], **mixture: Any) -> Datastores:
    stores = Datastores(gated.model, gated.knn_lm.tokenizer)
    for name, gate in gates.items():
        stores.serve(name, replace(gated.searchable, gate=gate, mixture=replace(gated.knn_lm.mixture, **mixture)))
    return stores


def test_rows_of_several_datastores_each_have_their_own_gate(gpt2: Parts) -> None:
    stores = served(gpt2, {"plain": None, "half": constant_gate(0.5), "little": constant_gate(0.25)})
    defaults = {info.name: info.default_retrieval for info in stores.info}
    assert {name: retrieval.adaptive for name, retrieval in defaults.items()} == {"plain": False, "half": True, "little": True}
    requests = [
        asked(name, random_prompt(4, n), replace(retrieval, datastores=(DatastoreChoice(name),)))
        for n, (name, retrieval) in enumerate(defaults.items())
    ]
    answers = complete(make_engine(gpt2, datastores=stores), *requests)
    weights = {name: {event.interpolation_weight for event in answer.events} for name, answer in answers.items()}
    assert weights == {"plain": {0.3}, "half": {0.5}, "little": {0.25}}


@pytest.mark.parametrize("change", [{"k": 9}, {"temperature": 11.0}])
def test_a_gate_belongs_to_its_own_settings(gpt2: Parts, change: dict[str, Any]) -> None:
    """A request was read, then its datastore was opened again with another profile: its weight is the one that it came with."""
    before = asking(gpt2.gated(GATE))
    stores = served(gpt2, {"default": constant_gate(0.9)}, **change)
    answer = complete(make_engine(gpt2, datastores=stores), asked("a", random_prompt(4, 4), before))["a"]
    assert {event.interpolation_weight for event in answer.events} == {before.weight}
    assert stores.choose(before).gate is None
    assert stores.choose(stores.info[0].default_retrieval).gate == StoreGate(constant_gate(0.9), gpt2.store)


def test_a_mix_of_several_has_one_weight(gpt2: Parts) -> None:
    stores = served(gpt2, {"one": constant_gate(0.9), "two": constant_gate(0.8)})
    both = replace(stores.info[0].default_retrieval, datastores=(DatastoreChoice("one"), DatastoreChoice("two")))
    assert stores.choose(both).gate is None


def test_the_store_that_is_served_keeps_its_files(gpt2_store: Path) -> None:
    assert not (gpt2_store / "profile.json").exists()

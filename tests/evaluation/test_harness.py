"""lm-evaluation-harness runs on a kNN-LM: local tasks from beginning to end, and figures that are those of knnlm itself."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knnlm.corpus import Document
from knnlm.datastore.profile import Profile
from knnlm.errors import InvalidInput
from knnlm.evaluation.compare import compare
from knnlm.harness import KNNLM
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.sampling import SamplingParams
from knnlm.tokenized import TokenizedDocument, tokenize
from tests.gates import tiny_gate
from tests.stores import build, environment, text_folder
from tests.tiny import CONTEXT, tiny_corpus

HELD = tiny_corpus(4, seed=9)
CHOICES = [" near the river.", " in the village.", " behind the mill."]
QUESTIONS = [
    {"question": text.split(".")[0].split("\n")[1].rsplit(" ", 3)[0], "choices": CHOICES, "answer": n % 3} for n, text in enumerate(HELD)
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's tokenizer adds no BOS, LLaMA's does."""
    model: HFLanguageModel = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp(f"harness-{request.param}")
    build(text_folder(folder / "corpus", tiny_corpus(8)), folder / "store", model, index="Flat", keys="float32", max_length=32)
    return folder / "store"


@pytest.fixture(scope="module")
def opened(store: Path) -> OpenedKNNLM:
    return open_store(store, k=8, temperature=5.0, weight=0.4)


@pytest.fixture(scope="module")
def lm(opened: OpenedKNNLM) -> KNNLM:
    return KNNLM(opened)


def tasks(folder: Path) -> tuple[list[str], TaskManager]:
    """Three tasks over files in ``folder``: perplexity, multiple choice, generation."""
    folder.mkdir()
    rows = {"texts": [{"text": text} for text in HELD], "questions": QUESTIONS}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def task(name: str, source: str, **settings: Any) -> str:
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{source}.jsonl")}}}
        data["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **settings}))
        return name

    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    names = [
        task("tiny_text", "texts", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=metrics),
        task(
            "tiny_choice", "questions", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
            doc_to_target="answer", target_delimiter="", metric_list=[{"metric": "acc"}],
        ),
        task(
            "tiny_words", "questions", output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{choices[answer]}}",
            generation_kwargs={"until": ["."], "max_gen_toks": 12}, metric_list=[{"metric": "exact_match"}],
        ),
    ]  # fmt: skip
    return names, TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(lm: Any, folder: Path, **options: Any) -> dict[str, Any]:
    names, manager = tasks(folder)
    found: dict[str, Any] = simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    return found


def words(text: str) -> int:
    """As the harness counts them: what follows the last space is one too, though it is empty."""
    return len(re.split(r"\s+", text))


def documents(opened: OpenedKNNLM) -> list[TokenizedDocument]:
    held = [Document(str(number), "", text, None, {}) for number, text in enumerate(HELD)]
    return list(tokenize(held, opened.knn_lm.tokenizer, opened.model.vocabulary_size))


def slow(opened: OpenedKNNLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One step for each token."""
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        read = [*context, *continuation[:place]]
        log_probs = opened.knn_lm.next_token(read).log_probs[0]
        total, greedy = total + float(log_probs[token]), greedy and int(log_probs.argmax()) == token
    return total, greedy


def test_local_tasks_run_from_beginning_to_end_and_equal_compare(opened: OpenedKNNLM, tmp_path: Path) -> None:
    found = evaluated(KNNLM(opened, windows="knnlm"), tmp_path / "tasks")
    per_token = compare(opened.knn_lm, opened.store, documents(opened)).per_token
    loss = -float(per_token.logprob.sum(dtype=np.float64))
    text = found["results"]["tiny_text"]
    assert text["word_perplexity,none"] == pytest.approx(math.exp(loss / sum(words(t) for t in HELD)), rel=1e-5)
    assert text["bits_per_byte,none"] == pytest.approx(loss / sum(len(t.encode()) for t in HELD) / math.log(2), rel=1e-5)
    assert text["byte_perplexity,none"] == pytest.approx(2 ** text["bits_per_byte,none"])

    encode = opened.knn_lm.tokenizer
    for sample, question in zip(found["samples"]["tiny_choice"], QUESTIONS, strict=True):
        context = encode.encode(str(question["question"]))
        scores = [slow(opened, context, encode.encode(question["question"] + choice)[len(context) :]) for choice in CHOICES]
        for (score, greedy), (expected, expected_greedy) in zip(sample["filtered_resps"], scores, strict=True):
            assert score == pytest.approx(expected, abs=1e-4)
            assert greedy is expected_greedy
        right = int(np.argmax([score for score, _ in scores])) == question["answer"]
        assert sample["acc"] == float(right)

    for sample, question in zip(found["samples"]["tiny_words"], QUESTIONS, strict=True):
        expected_text = opened.generate(str(question["question"]), max_new_tokens=12)
        assert sample["resps"] == [[expected_text.split(".")[0]]]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]  # type: ignore[arg-type]


def test_the_windows_of_the_harness_are_those_of_its_own_models(opened: OpenedKNNLM, lm: KNNLM) -> None:
    """Disjoint pieces of the model's context; the first token is predicted from the prefix, whatever the store's BOS."""
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in HELD)), disable_tqdm=True)
    for text, total in zip(HELD, found, strict=True):
        ids = opened.knn_lm.tokenizer.encode_plain(text)
        windows = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 0, CONTEXT, 1)]
        assert sum(len(continuation) for _, continuation in windows) == len(ids)
        assert total == pytest.approx(sum(slow(opened, *pair)[0] for pair in windows), abs=1e-3)
    assert max(len(opened.knn_lm.tokenizer.encode_plain(text)) for text in HELD) > CONTEXT


@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_the_batch_changes_nothing(opened: OpenedKNNLM, lm: KNNLM, batch_tokens: int) -> None:
    pairs = [("The farmer", f" sold {choice}") for choice in CHOICES] + [("", "Story 3"), ("A sailor found", " seven"), ("x", "")]
    expected = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    found = KNNLM(opened, batch_tokens=batch_tokens).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1] == (0.0, True)


def test_what_greedy_decoding_gives_is_greedy(opened: OpenedKNNLM, lm: KNNLM) -> None:
    prompt = "The old king"
    ids = opened.knn_lm.tokenizer.encode(prompt)
    continuation: list[int] = []
    for _ in range(5):
        continuation.append(int(opened.knn_lm.next_token([*ids, *continuation]).log_probs[0].argmax()))
    other = [*continuation[:-1], (continuation[-1] + 1) % 300]
    (best, other_best) = lm._loglikelihood_tokens([(None, ids, continuation), (None, ids, other)], disable_tqdm=True)
    assert (best[1], other_best[1]) == (True, False)
    assert best[0] > other_best[0]


def test_a_context_that_is_too_long_loses_its_beginning_and_a_warning_says_so(
    opened: OpenedKNNLM, lm: KNNLM, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(HELD).rstrip()
    (found,) = lm.loglikelihood(instances("loglikelihood", (long, " village")), disable_tqdm=True)
    ids = opened.knn_lm.tokenizer.encode(long + " village")
    continuation = ids[len(opened.knn_lm.tokenizer.encode(long)) :]
    kept = ids[: -len(continuation)][-(CONTEXT - len(continuation) + 1) :]
    assert found[0] == pytest.approx(slow(opened, kept, continuation)[0], abs=1e-4)
    assert "1 contexts were cut at their beginning to the 64 tokens" in caplog.text
    with pytest.raises(InvalidInput, match="continuation: has"):
        lm.loglikelihood(instances("loglikelihood", ("a", long)), disable_tqdm=True)


def test_long_prompts_keep_their_end_and_stop_strings_end_completions(opened: OpenedKNNLM, lm: KNNLM) -> None:
    long = " ".join(HELD)
    whole, cut = lm.generate_until(
        instances("generate_until", (long, {"max_gen_toks": 10}), (long, {"max_gen_toks": 10, "until": ["", " "]})), disable_tqdm=True
    )
    ids = lm.tok_encode(long)[-(CONTEXT - 10) :]
    expected: list[int] = []
    for _ in range(10):
        token = int(opened.knn_lm.next_token([*ids, *expected]).log_probs[0].argmax())
        if token in opened.model.eos_ids:
            break
        expected.append(token)
    decode = opened.knn_lm.tokenizer.decode
    assert whole == decode([*ids, *expected])[len(decode(ids)) :]
    assert cut == whole.split(" ")[0]


def test_sampling_is_ours(opened: OpenedKNNLM, lm: KNNLM) -> None:
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_k": 5, "seed": 3}
    (found,) = lm.generate_until(instances("generate_until", ("A sailor", options)), disable_tqdm=True)
    assert found == opened.generate("A sailor", max_new_tokens=8, sampling=SamplingParams(temperature=0.7, top_k=5, seed=3))
    with pytest.raises(InvalidInput, match="generation_kwargs: has num_beams, but can have min_p"):
        lm.generate_until(instances("generate_until", ("A sailor", {"num_beams": 2})), disable_tqdm=True)
    with pytest.raises(InvalidInput, match="max_gen_toks: is 64, but the model's context is 64"):
        lm.generate_until(instances("generate_until", ("A sailor", {"max_gen_toks": 64})), disable_tqdm=True)


def test_the_adaptive_weight_of_a_profile_applies(store: Path, opened: OpenedKNNLM, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    Profile(opened.knn_lm.mixture, "exact", "valid.txt", gate=tiny_gate(3)).write(tmp_path / "store")
    gated = open_store(tmp_path / "store")
    ids = opened.knn_lm.tokenizer.encode("The miller painted the broken clock")
    pair = (None, ids[:4], ids[4:])
    ((found, _),) = KNNLM(gated)._loglikelihood_tokens([pair], disable_tqdm=True)
    assert found == pytest.approx(slow(gated, ids[:4], ids[4:])[0], abs=1e-4)
    ((fixed, _),) = KNNLM(opened)._loglikelihood_tokens([pair], disable_tqdm=True)
    assert abs(found - fixed) > 1e-3
    (total,) = KNNLM(gated, windows="knnlm").loglikelihood_rolling(instances("loglikelihood_rolling", (HELD[0],)), disable_tqdm=True)
    per_token = compare(gated.knn_lm, gated.store, documents(gated)[:1]).per_token
    assert total == pytest.approx(float(per_token.logprob.sum(dtype=np.float64)), abs=1e-4)


def test_bos_stands_once(opened: OpenedKNNLM, lm: KNNLM) -> None:
    bos = opened.knn_lm.tokenizer.bos_id
    plain = opened.knn_lm.tokenizer.encode_plain("A sailor")
    expected = plain if bos is None else [bos, *plain]
    assert lm.tok_encode("A sailor") == expected
    assert lm.tok_encode("A sailor", add_special_tokens=False) == plain
    if bos is not None:
        assert lm.tok_encode("<|endoftext|>A sailor") == expected


def test_conversations_are_written_by_the_models_own_template(lm: KNNLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    said = [{"role": "user", "content": "A sailor?"}]
    assert lm.apply_chat_template(said) == "[user] A sailor?\n[assistant]"
    assert lm.chat_template(True) == template
    assert "/" not in lm.tokenizer_name
    assert lm.opened.model.fingerprint.tokenizer in lm.tokenizer_name


def test_a_tokenizer_without_eos_is_refused(opened: OpenedKNNLM) -> None:
    lm = KNNLM(opened)
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    assert lm.prefix_token_id == lm.tokenizer.bos_token_id
    lm.tokenizer.bos_token = None
    assert lm.prefix_token_id == lm.tokenizer.eos_token_id
    lm.tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="tokenizer: has no EOS token, which the harness needs"):
        _ = lm.prefix_token_id


def test_the_registered_name_takes_the_options_of_open_store(store: Path, tmp_path: Path) -> None:
    found = evaluated(
        "knnlm", tmp_path / "tasks", model_args=f"store={store},windows=knnlm,k=4,temperature=3.0,weight=0.5", batch_size="auto"
    )
    other = open_store(store)
    per_token = compare(other.knn_lm, other.store, documents(other), mixture=Mixture(4, 3.0, 0.5)).per_token
    expected = -float(per_token.logprob.sum(dtype=np.float64)) / sum(len(t.encode()) for t in HELD) / math.log(2)
    assert found["results"]["tiny_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_its_command_line_runs_with_its_own_defaults(
    opened: OpenedKNNLM, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Among them a batch size of 1 and a CUDA device, whether there is one or not."""
    if opened.knn_lm.tokenizer.bos_id is not None:
        pytest.skip("one of the models is enough")
    tasks(tmp_path / "tasks")
    # Without the harness's own tasks, of which it would read thousands first.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    line = ["lm_eval", "run", "--model", "knnlm", "--model_args", f"store={store}", "--tasks", "tiny_choice"]
    monkeypatch.setattr(sys, "argv", [*line, "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")])
    cli_evaluate()
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny_choice"]["acc,none"] >= 0
    assert torch.cuda.is_available() or "running on the CPU" in caplog.text


def test_the_module_is_that_command() -> None:
    line = [sys.executable, "-m", "knnlm.harness", "run", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=120, check=True)
    assert "--model_args" in done.stdout


def test_what_can_not_be_is_refused(opened: OpenedKNNLM) -> None:
    with pytest.raises(InvalidInput, match="windows: is 'ours'"):
        KNNLM(opened, windows="ours")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="batch_size: is 8, but batches are counted in tokens; give batch_tokens"):
        KNNLM(opened, batch_size=8)
    with pytest.raises(InvalidInput, match="weight: is given, but the store is open already"):
        KNNLM(opened, weight=0.5)


def test_without_the_harness_a_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lm_eval.api.model'] = None\n"
        "from knnlm.errors import MissingDependency\n"
        "try:\n    import knnlm.harness\nexcept MissingDependency as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120, check=True)
    assert done.stdout.strip() == 'knnlm.harness needs lm-evaluation-harness; install it with: pip install "knnlm[harness]"'

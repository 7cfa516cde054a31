"""The whole main job in processes of their own: build, inspect, verify, compare, serve, generate; and each as it fails."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stores import command, environment, knnlm, text_folder
from tests.tiny import CONTEXT, save, tiny_corpus, tiny_llama, tiny_tokenizer

DOCUMENTS = 1_000
SECONDS = 120.0
Run = subprocess.CompletedProcess[str]

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) knnlm_server\.")


@dataclass(frozen=True)
class Job:
    """A folder with a model, a corpus of 1,000 documents, held-out text and the store that ``knnlm build`` made of them."""

    folder: Path
    built: Run

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def held(self) -> Path:
        return self.folder / "held.txt"


@pytest.fixture(scope="module")
def job(tiny_gpt2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    text_folder(folder / "corpus", tiny_corpus(DOCUMENTS))
    (folder / "held.txt").write_text("".join(tiny_corpus(5, seed=99)))
    flags = ["--index", "IVF64,SQ8", "--shard-tokens", "50000", "--batch-size", "8192", "--json"]
    return Job(folder, command("build", "corpus", "--model", tiny_gpt2_path, "--store", "store", *flags, cwd=folder))


def test_build(job: Job) -> None:
    assert job.built.returncode == 0, job.built.stderr
    said = json.loads(job.built.stdout)
    encode = tiny_tokenizer().encode
    tokens = sum(len(encode(text, add_special_tokens=False)) for text in tiny_corpus(DOCUMENTS))
    assert said["counts"] == {"documents": DOCUMENTS, "tokens": tokens, "entries": tokens - DOCUMENTS}
    assert said["shards"] == -(-tokens // 50_000)
    assert said["index"]["factory"] == "IVF64,SQ8"
    assert said["key"]["layer"] == {"kind": "last_ffn_input", "module": "transformer.h.1.mlp", "normalized": True}
    assert (said["key"]["dtype"], said["windowing"]["max_length"]) == ("float16", CONTEXT)
    # Progress stands on the other stream, a line at the end of each stage.
    for stage in ("reading", "encoding", "training the index", "filling the index"):
        assert stage in job.built.stderr
    assert "\x1b" not in job.built.stderr


def test_inspect(job: Job) -> None:
    done = command("inspect", "store", "--json", cwd=job.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(job.built.stdout)


def test_inspect_an_entry(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    text = (job.folder / "corpus" / "story-0000.txt").read_text()
    assert knnlm("inspect", job.store, "--entry", "0", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    first, second = tiny_tokenizer().encode(text, add_special_tokens=False)[:2]
    assert (said["document"]["id"], said["line"], said["token_id"], said["left_context"]) == ("story-0000.txt", 1, second, [first])
    assert text[slice(*said["characters"])] == tiny_tokenizer().decode([second])


def test_verify(job: Job) -> None:
    done = command("verify", job.store)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all as the manifest says" in done.stdout.replace("\n", " ")


def test_compare_finds_that_a_store_of_such_text_helps(job: Job) -> None:
    flags = ["--k", "16", "--knn-temperature", "20", "--weight", "0.5", "--per-token", str(job.folder / "scores.npz")]
    done = command("compare", "store", "--text", "held.txt", *flags, "--json", cwd=job.folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["stores"][0]
    # The model is random, so whatever the neighbours say is better.
    assert said["knn"]["value"] < said["base"]["value"] / 2
    assert said["change"] == pytest.approx(said["knn"]["value"] / said["base"]["value"] - 1)
    assert said["tokens"] > 500
    assert (job.folder / "scores.npz").exists()


@contextmanager
def serving(store: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address once it takes requests."""
    line = [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"listening on (\S+:\d+)\n", said)
        assert found, (said, process.communicate(timeout=SECONDS))
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(job: Job) -> Iterator[tuple[subprocess.Popen[str], str]]:
    assert job.built.returncode == 0
    with serving(job.store, "--weight", "0.5", "--k", "8", "--knn-temperature", "20") as running:
        yield running


@pytest.fixture
def generate(server: tuple[subprocess.Popen[str], str]) -> Callable[..., Run]:
    return lambda *arguments: command("generate", *arguments, "--target", server[1])


def test_generate(generate: Callable[..., Run]) -> None:
    done = generate("The farmer", "--max-new-tokens", "12", "--temperature", "0", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["completion_tokens"] == len(said["tokens"]) <= 12
    assert said["prompt_tokens"] == len(tiny_tokenizer().encode("The farmer", add_special_tokens=False))
    assert "".join(token["text"] for token in said["tokens"]) == said["text"]
    assert said["finish_reason"] in ("length", "eos")
    assert not any(token.get("neighbors") for token in said["tokens"])
    plain = generate("The farmer", "--max-new-tokens", "12", "--temperature", "0")
    assert plain.stdout.removesuffix("\n") == said["text"]


def test_generate_with_neighbors(generate: Callable[..., Run], job: Job) -> None:
    done = generate("The farmer", "--max-new-tokens", "6", "--temperature", "0", "--neighbors", "3", "--json")
    assert done.returncode == 0, done.stderr
    for token in json.loads(done.stdout)["tokens"]:
        assert 1 <= len(token["neighbors"]) <= 3
        for neighbor in token["neighbors"]:
            assert 0 <= neighbor["weight"] <= 1
            assert neighbor["distance"] >= 0
            text = (job.folder / "corpus" / neighbor["document_id"]).read_text()
            start, end = neighbor["character_start"], neighbor["character_end"]
            assert text[start:end] == neighbor["text"]
            assert neighbor["line"] == text[:start].count("\n") + 1
            assert text[:start].endswith(neighbor["left_context"])


def test_generate_without_retrieval_is_the_base_lm(generate: Callable[..., Run], tiny_gpt2_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = generate("The old king", "--max-new-tokens", "10", "--temperature", "0", "--no-retrieval", "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2_path)
    prompt = tokens = tiny_tokenizer()("The old king", return_tensors="pt", add_special_tokens=False)["input_ids"]
    for _ in range(10):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert [token["token_id"] for token in json.loads(done.stdout)["tokens"]] == tokens[0, prompt.shape[1] :].tolist()


def test_a_port_in_use_is_one_sentence(server: tuple[subprocess.Popen[str], str], job: Job) -> None:
    port = server[1].rsplit(":", 1)[1]
    failed = command("serve", job.store, "--port", port)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert one_sentence(failed.stderr) == f"error: Port {port} on 127.0.0.1 is in use; choose another with --port, or 0 for a free one."


def test_sigterm_ends_the_server_with_status_0(job: Job) -> None:
    with serving(job.store) as (process, target):
        done = command("generate", "A sailor", "--max-new-tokens", "2", "--target", target)
        assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failed = command("generate", "x", "--target", f"127.0.0.1:{port}")
    assert failed.returncode == 1
    assert str(port) in one_sentence(failed.stderr)


def one_sentence(said: str) -> str:
    """The one line on standard error that such a failure is to be, beside a server's log."""
    lines = [line for line in said.splitlines() if not LOG_LINE.match(line)]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: "), said
    return lines[0]


@pytest.fixture(scope="module")
def wrong(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Things that can't be used, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "no-model").mkdir()
    damaged = Path(shutil.copytree(job.store, folder / "damaged"))
    with (damaged / "shards" / "00000" / "keys.npy").open("r+b") as keys:
        keys.truncate(1000)
    return {
        "NOWHERE": str(folder / "nowhere"),
        "EMPTY": str(folder / "empty"),
        "DAMAGED": str(damaged),
        "NO_MODEL": str(folder / "no-model"),
        "OTHER": str(save(tiny_llama(), tiny_tokenizer(), folder / "other")),
        "NEW": str(folder / "new"),
        "STORE": str(job.store),
        "CORPUS": str(job.folder / "corpus"),
        "HELD": str(job.held),
    }


@pytest.mark.parametrize(
    ("line", "status", "named"),
    [
        ("build NOWHERE --model OTHER --store NEW", 1, "NOWHERE"),
        ("build CORPUS --model NO_MODEL --store NEW", 1, "NO_MODEL"),
        ("compare STORE --text EMPTY", 1, "EMPTY"),
        ("compare DAMAGED --text HELD", 1, "DAMAGED/shards/00000/keys.npy"),
        ("serve EMPTY --port 0", 1, "EMPTY"),
        ("serve STORE --port 0 --model OTHER", 1, "OTHER"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_a_status(line: str, status: int, named: str, wrong: dict[str, str]) -> None:
    failed = command(*filled(line, wrong).split())
    assert (failed.returncode, failed.stdout) == (status, "")
    assert filled(named, wrong) in one_sentence(failed.stderr)


@pytest.mark.parametrize(
    ("line", "status", "named"),
    [
        ("build EMPTY --model OTHER --store NEW", 1, "EMPTY"),
        ("build CORPUS --model NOWHERE --store NEW", 1, "NOWHERE"),
        ("build CORPUS --model OTHER --store STORE", 1, "STORE"),
        ("build CORPUS --model OTHER --store HELD", 1, "HELD"),
        ("build CORPUS --model OTHER --store NEW --max-length 100", 2, "--max-length"),
        ("build CORPUS --model OTHER --store NEW --index IVF1000000,Flat", 2, "--index"),
        ("build CORPUS --model OTHER --store NEW --batch-size 0", 2, "--batch-size"),
        ("build CORPUS --model OTHER --store NEW --bos maybe", 2, "--bos"),
        ("build CORPUS --model OTHER --store NEW --key-module mlp", 1, "mlp"),
        ("build CORPUS --model OTHER --store NEW --key-layer first", 2, "--key-layer"),
        ("inspect NOWHERE", 1, "NOWHERE"),
        ("inspect EMPTY", 1, "EMPTY"),
        ("inspect DAMAGED", 1, "DAMAGED/shards/00000/keys.npy"),
        ("inspect STORE --entry 99999999", 2, "--entry"),
        ("verify NOWHERE", 1, "NOWHERE"),
        ("compare NOWHERE --text HELD", 1, "NOWHERE"),
        ("compare STORE --text NOWHERE", 1, "NOWHERE"),
        ("compare STORE --text HELD --model OTHER", 1, "OTHER"),
        ("compare STORE --text HELD --model NOWHERE", 1, "NOWHERE"),
        ("serve NOWHERE --port 0", 1, "NOWHERE"),
        ("serve DAMAGED --port 0", 1, "DAMAGED/shards/00000/keys.npy"),
        ("serve STORE --port 0 --weight 2", 2, "--weight"),
    ],
)
def test_the_same_without_a_process_of_its_own(
    line: str, status: int, named: str, wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert knnlm(*filled(line, wrong).split()) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert filled(named, wrong) in one_sentence(said.err)


def filled(text: str, wrong: dict[str, str]) -> str:
    return re.sub(r"[A-Z_]{3,}", lambda name: wrong.get(name[0], name[0]), text)


def test_a_damaged_store_is_named_by_verify(wrong: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("verify", wrong["DAMAGED"], "--json") == 1
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(said["problems"]) == 1
    assert "keys.npy" in said["problems"][0]

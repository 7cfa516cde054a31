"""``knnlm generate`` against a real server: what it prints, what it asks for, and its exit status."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trustme
import typer
from rich.console import Console

import knnlm.cli
from knnlm_server import cli, display
from knnlm_server.sequence import CompletionEvidence, DatastoreChoice, DocumentWeight, FinishEvent, FinishReason, TokenEvent
from tests.server.conftest import RunningServer
from tests.server.fake_engine import NEIGHBOR, FakeEngine
from tests.server.scripted_server import Script, scripted
from tests.server.test_client import free_port
from tests.server.test_client_channel import server_credentials

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[[FakeEngine], RunningServer]
Invoke = Callable[..., "Ran"]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(["a", "\tb"])


@dataclass
class Ran:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def invoke(start_server: Start, engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> Invoke:
    target = start_server(engine).target

    def run(*arguments: str) -> Ran:
        return command(capsys, "generate", *arguments, "--target", target, "--max-new-tokens", "8")

    return run


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Run ``knnlm`` as its entry point does, with this package's subcommands alone."""
    app = typer.Typer(pretty_exceptions_enable=False)
    cli.register(app)
    status = knnlm.cli.run(app, list(arguments))
    return Ran(status, *capsys.readouterr())


def test_text_is_exactly_the_completion(invoke: Invoke) -> None:
    found = invoke("hi")
    assert (found.exit_code, found.stdout) == (0, "a\tb!\n")


def test_the_prompt_can_come_from_standard_input(invoke: Invoke, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert invoke("-").exit_code == 0
    assert bytes(engine.requests[0].prompt) == b"hello"


@pytest.mark.parametrize("name", ["generate", "retrieve"])
def test_bytes_on_standard_input_that_are_no_text_are_blamed_on_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    ran = command(capsys, name, "-", "--target", "localhost:1")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr == "error: standard input is not UTF-8: byte 2 is 0xff.\n"


def test_options_arrive(invoke: Invoke, engine: FakeEngine) -> None:
    options = "--temperature 0 --top-k 4 --top-p 0.5 --min-p 0.1 --repetition-penalty 1.5 --seed 3 --stop x --stop y"
    options += " --typical-p 0.7 --frequency-penalty 0.5 --presence-penalty -0.5 --max-seconds 9"
    mixture = "--weight 0.5 --k 2 --knn-temperature 3.5 --datastore other=2.5 --datastore main"
    found = invoke("hi", *options.split(), *mixture.split(), "--ignore-eos", "--bad-word", "x", "--best-of", "3")
    assert found.exit_code == 0, found.stderr
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 4, 0.5, 0.1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.typical_p) == (1.5, 3, 0.7)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert sampling.bad_words == ((120,), (32, 120))
    assert (request.stopping.max_seconds, request.samples) == (9, 3)
    assert request.retrieval.datastores == (DatastoreChoice("other", 2.5), DatastoreChoice("main", 1.0))
    assert (request.stopping.stop_strings, request.stopping.ignore_eos) == (("x", "y"), True)
    assert (request.retrieval.weight, request.retrieval.k, request.retrieval.temperature) == (0.5, 2, 3.5)
    assert not request.detail.log_probs


def test_no_retrieval(invoke: Invoke, engine: FakeEngine) -> None:
    invoke("hi", "--no-retrieval")
    assert engine.requests[0].retrieval.weight == 0


def test_neighbors_are_shown_with_their_place(invoke: Invoke) -> None:
    found = invoke("hi", "--neighbors", "1")
    assert found.stdout.startswith("a\tb!\n")
    row = next(line for line in found.stdout.splitlines() if line.strip().startswith("'a'"))
    assert row.split() == ["'a'", "0.607", "80%", "75%", "1.50", "d1:3", "before", "it", "'b'"]


def test_evidence_names_documents_and_the_verbatim_run(invoke: Invoke) -> None:
    found = invoke("hi", "--evidence")
    text, changed, head, first, second, run = found.stdout.splitlines()
    assert (text, changed) == ("a\tb!", "retrieval changed 50% of the tokens; searched for 2")
    assert head.split() == ["tokens", "datastore", "document", "source"]
    assert (first.split(), second.split()) == (["1.25", "main", "d1", "docs/a.txt"], ["0.50", "other", "d2"])
    assert run == "longest verbatim run: 2 tokens from main d1:3: 'ab'"


def test_samples_are_shown_under_their_numbers(invoke: Invoke) -> None:
    assert invoke("hi", "--samples", "2").stdout == "== sample 0\na\tb!\n== sample 1\na\tb!\n"
    assert invoke("hi", "--samples", "1", "--best-of", "3").stdout == "a\tb!\n"


def test_samples_in_json_are_a_list(invoke: Invoke) -> None:
    value = json.loads(invoke("hi", "--samples", "2", "--best-of", "3", "--evidence", "--json").stdout)
    assert [completion["sample"] for completion in value["completions"]] == [2, 1]
    assert value["completions"][0]["evidence"]["verbatim"]["text"] == "ab"


def test_retrieve_shows_places(capsys: pytest.CaptureFixture[str], start_server: Start, engine: FakeEngine) -> None:
    target = start_server(engine).target
    found = command(capsys, "retrieve", "hi", "--target", target, "--neighbors", "2", "--datastore", "other", "--k", "3")
    assert found.exit_code == 0, found.stderr
    head, *rows = found.stdout.splitlines()
    assert head.split() == ["weight", "distance", "where", "left", "context", "voted", "for"]
    assert [row.split() for row in rows] == [["75%", "1.50", "d1:3", "before", "it", "'b'"]] * 2
    assert (engine.retrieved[0].retrieval.k, engine.retrieved[0].retrieval.datastores) == (3, (DatastoreChoice("other"),))
    value = json.loads(command(capsys, "retrieve", "hi", "--target", target, "--json").stdout)
    assert value["token_ids"] == [104, 105]
    assert value["neighbors"][0]["metadata"] == NEIGHBOR.metadata


@pytest.mark.parametrize(
    ("args", "said"), [(["--neighbors", "0"], "--neighbors"), (["--datastore", "main=0"], "--datastore"), (["--k", "0"], "--k")]
)
def test_retrieve_names_options(capsys: pytest.CaptureFixture[str], start_server: Start, args: list[str], said: str) -> None:
    found = command(capsys, "retrieve", "hi", "--target", start_server(FakeEngine()).target, *args)
    assert (found.exit_code, found.stderr.split()[1]) == (2, said)
    assert "context" in command(capsys, "retrieve", "", "--target", start_server(FakeEngine()).target).stderr


@pytest.mark.parametrize("how", ["file", "environment"])
def test_a_token_goes_with_the_request(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    if how == "environment":
        monkeypatch.setenv("KNNLM_TOKEN", "t0ken")
    script = Script()
    with scripted(script) as target:
        arguments = ["--token-file", str(tmp_path / "token")] if how == "file" else []
        assert command(capsys, "generate", "hi", "--target", target, *arguments).exit_code == 0
    assert script.metadata[0]["authorization"] == "Bearer t0ken"


def test_tls_with_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with scripted(Script(), server_credentials(authority, "127.0.0.1")) as target:
        assert command(capsys, "generate", "hi", "--target", target, "--ca", str(tmp_path / "ca.pem")).stdout == "aa\n"
        found = command(capsys, "generate", "hi", "--target", target, "--ca", str(tmp_path / "none.pem"))
    assert (found.exit_code, found.stderr.startswith("error: --ca is ")) == (2, True)


def test_one_of_several_targets_answers(capsys: pytest.CaptureFixture[str], start_server: Start) -> None:
    targets = [f"127.0.0.1:{free_port()}", start_server(FakeEngine()).target]
    found = command(capsys, "generate", "hi", *(part for target in targets for part in ("--target", target)), "--max-new-tokens", "8")
    assert (found.exit_code, found.stdout) == (0, "ab!\n")


def test_json_is_one_object(invoke: Invoke) -> None:
    found = invoke("hi", "--neighbors", "1", "--json")
    value = json.loads(found.stdout)
    assert (value["text"], value["finish_reason"]) == ("a\tb!", "length")
    assert (value["prompt_tokens"], value["completion_tokens"]) == (2, 2)
    token = value["tokens"][0]
    assert (token["token_id"], token["knn_share"], token["knn_log_prob"]) == (97, 0.8, None)
    assert token["neighbors"][0]["document_id"] == NEIGHBOR.document_id


def test_json_has_log_probs_without_neighbors(invoke: Invoke) -> None:
    token = json.loads(invoke("hi", "--json").stdout)["tokens"][0]
    assert token["log_prob"] == -0.5
    assert token["neighbors"] == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--top-p", "0"], "--top-p"),
        (["--k", "100"], "--k"),
        (["--no-retrieval", "--k", "2"], "--no-retrieval"),
        (["--seed", str(2**70)], "--seed"),
        (["--datastore", "main=much"], "--datastore"),
        (["--datastore", "main=-1"], "--datastore"),
        (["--datastore", "main", "--datastore", "main"], "--datastore"),
        (["--bad-word", ""], "--bad-word"),
        (["--samples", "9"], "--samples"),
        (["--samples", "2", "--best-of", "1"], "--best-of"),
        (["--token-file", "no-such-file"], "--token-file is no-such-file, which can't be read: No such file or directory."),
    ],
)
def test_a_refused_option_is_bad_usage(invoke: Invoke, args: list[str], said: str) -> None:
    found = invoke("hi", *args)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"error: {said}")
    assert len(found.stderr.splitlines()) == 1


def test_out_of_range_options_are_bad_usage(invoke: Invoke) -> None:
    assert invoke("hi", "--weight", "1.5").exit_code == 2


def test_no_server_is_one_sentence_that_names_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{free_port()}"
    found = command(capsys, "generate", "hi", "--target", target)
    assert found.exit_code == 1
    assert found.stderr.startswith(f"error: No server answers at {target}")
    assert len(found.stderr.splitlines()) == 1


def test_on_a_terminal_shares_are_coloured_and_escape_sequences_disarmed() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", highlight=False, width=120)
    events: list[TokenEvent | FinishEvent] = [
        TokenEvent(0, 1, "sure", "sure", knn_share=0.9),
        TokenEvent(1, 2, "\x1b[2J", "\x1b[2J"),
        FinishEvent(FinishReason.EOS, "", 1, 2),
    ]
    display.show_stream("prompt ", events, console)
    shown = out.getvalue()
    assert "prompt" in shown
    assert "\x1b[1;32msure" in shown
    assert "\x1b[2J" not in shown
    assert "␛[2J" in shown


def test_control_characters_of_8_bits_have_no_power_over_a_terminal() -> None:
    out = io.StringIO()
    events: list[TokenEvent | FinishEvent] = [TokenEvent(0, 1, "a\x9b2J\x7f\u00a0é", "a"), FinishEvent(FinishReason.EOS, "", 1, 1)]
    display.show_stream("", events, Console(file=out, force_terminal=True, highlight=False))
    assert "a\ufffd2J␡\u00a0é" in out.getvalue()


def test_documents_with_next_to_no_part_are_counted_instead_of_listed() -> None:
    out = io.StringIO()
    documents = tuple(DocumentWeight("main", f"d{number}", "", weight) for number, weight in enumerate((1.5, 0.005, 0.004, 1e-9)))
    evidence = CompletionEvidence(changed_share=0.5, searched_tokens=2, documents=documents, verbatim=None)
    display.show_stream("", [FinishEvent(FinishReason.EOS, "", 1, 2, evidence=evidence)], Console(file=out, width=120))
    *_, first, second, few = out.getvalue().splitlines()
    assert (first.split(), second.split()[1:]) == (["1.50", "main", "d0"], ["main", "d1"])
    assert few == "less than 0.005 tokens each from 2 more, which --json lists"


def test_serve_refuses_a_port_in_use_in_one_sentence_before_it_reads_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = command(capsys, "serve", "no-such-store", "--port", str(port))
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == f"error: Port {port} on 127.0.0.1 is in use; choose another with --port, or 0 for a free one.\n"


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_shows_the_place_and_the_end_of_the_left_context_at_any_width(width: int) -> None:
    neighbor = replace(NEIGHBOR, left_context="word " * 50 + "end")
    token = TokenEvent(0, 1, "x", "long token", log_prob=-1.0, knn_share=0.5, neighbors=(neighbor,))
    out = io.StringIO()
    Console(file=out, width=width).print(display.neighbor_table([token], width))
    row = out.getvalue().splitlines()[1]
    assert "d1:3" in row
    assert "word end 'b'" in row


def test_help_needs_neither_torch_nor_grpc() -> None:
    program = (
        "import sys, typer, knnlm_server.cli as cli; app = typer.Typer(); cli.register(app)\n"
        "try: app(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'grpc', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT / "server")
    assert found.returncode == 0, found.stderr
    assert "--neighbors" in found.stdout

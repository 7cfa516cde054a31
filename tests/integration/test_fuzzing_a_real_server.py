"""Hostile messages and bytes for ``knnlm serve`` with a real model and datastore: right statuses, and the engine lives on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.model import HFLanguageModel
from knnlm_server.client import GenerationClient
from knnlm_server.pb import generation_pb2 as pb
from tests.hostile import ANSWERS, GENERATION, Attacker, Method, conversation, likely_requests, messages, throw
from tests.stores import build, environment, text_folder
from tests.tiny import tiny_corpus

PATIENCE = 120.0
EXAMPLES = settings(max_examples=25)
CALL = conversation(GENERATION[1], pb.StreamGenerateRequest(prompt=pb.Input(text="once")).SerializeToString())


@dataclass
class Served:
    """A server's address, who attacks it, and a client that means well and knows what it should get."""

    target: str
    attacker: Attacker
    client: GenerationClient
    expected: str

    def answers(self) -> None:
        """The server still does its work, and rightly."""
        assert generated(self.client) == self.expected


def generated(client: GenerationClient) -> str:
    return client.generate("once upon", max_new_tokens=3, temperature=0, timeout=PATIENCE).text


@pytest.fixture(scope="module")
def served(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzzed")
    store = folder / "store"
    build(text_folder(folder / "corpus", tiny_corpus(20)), store, gpt2)
    line = [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", "--datastore", f"other={store}"]
    log: Path = folder / "log"
    with log.open("w") as errors, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"listening on (\S+:\d+)\n", process.stdout.readline())
            assert found, log.read_text()
            with GenerationClient(found[1]) as client, closing(Attacker(found[1])) as attacker:
                yield Served(found[1], attacker, client, generated(client))
            assert process.poll() is None
        finally:
            process.terminate()
    assert process.returncode == 0
    assert "ERROR" not in log.read_text()


@pytest.mark.parametrize("method", GENERATION, ids=lambda method: method.path.rsplit("/", 1)[1])
@EXAMPLES
@given(data=st.data())
def test_any_message_gets_a_right_status(served: Served, method: Method, data: st.DataObject) -> None:
    message = data.draw(likely_requests(method.request) | messages(method.request))
    assert served.attacker.send(method, message.SerializeToString()) in ANSWERS
    served.answers()


@EXAMPLES
@given(end=st.integers(0, len(CALL)), rest=st.binary(max_size=20))
def test_a_call_that_breaks_off_or_goes_on_wrongly(served: Served, end: int, rest: bytes) -> None:
    throw(served.target, CALL[:end] + rest)
    served.answers()

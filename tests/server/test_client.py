"""Both clients against a real server: typed results, typed errors, deadlines and cancellation; and no torch."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from knnlm.errors import InvalidInput, KNNLMError
from knnlm.sampling import SamplingParams
from knnlm_server.client import AsyncGenerationClient, FieldsRefused, GenerationClient, RequestFailed, ServerUnavailable, Token
from knnlm_server.errors import QueueFull
from knnlm_server.sequence import DatastoreChoice, DetailParams, FinishEvent, FinishReason, RetrievalParams, StoppingParams, TokenEvent
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import DEFAULT_RETRIEVAL, EVIDENCE, INFO, NEIGHBOR, FakeEngine

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[[FakeEngine], RunningServer]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(["a", "b"])


@pytest.fixture
def client(start_server: Start, engine: FakeEngine) -> Iterator[GenerationClient]:
    with GenerationClient(start_server(engine).target) as client:
        yield client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_the_client_imports_no_torch() -> None:
    heavy = "torch", "transformers", "faiss", "pyarrow", "numpy"
    modules = "knnlm_server.client, knnlm_server.admin_client, knnlm_server.cli, knnlm_server.display"
    program = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "server")
    assert found.stdout.strip() == "[]"


def test_generate(client: GenerationClient, engine: FakeEngine) -> None:
    completion = client.generate("hi", max_new_tokens=8)
    assert (completion.text, completion.finish_reason) == ("ab!", FinishReason.LENGTH)
    assert (completion.prompt_tokens, completion.completion_tokens) == (2, 2)
    assert completion.tokens == (TokenEvent(0, 97, "a", "a"), TokenEvent(1, 98, "b", "b"))


def test_every_option_arrives(client: GenerationClient, engine: FakeEngine) -> None:
    client.generate(
        [1, 2, 3],
        temperature=0,
        top_k=4,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.25,
        logit_bias={5: -1.5},
        bad_words=["a", [7]],
        seed=0,
        max_new_tokens=9,
        min_new_tokens=2,
        stop_strings=["x"],
        stop_token_ids=[0],
        ignore_eos=True,
        max_seconds=9.5,
        best_of=3,
        weight=0.1,
        k=2,
        datastores={"other": 2.5, "main": 1},
        knn_temperature=3.5,
        log_probs=True,
        alternatives=1,
        neighbors=2,
        evidence=True,
        truncate_prompt=True,
        timeout=WAIT_SECONDS,
    )
    (request,) = engine.requests
    assert request.prompt == (1, 2, 3)
    assert request.sampling == SamplingParams(
        logit_bias=((5, -1.5),),
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.25,
        bad_words=((97,), (32, 97), (7,)),
        temperature=0,
        top_k=4,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        seed=0,
    )
    assert request.stopping == StoppingParams(9, 2, ("x",), (0,), True, 9.5)
    assert request.retrieval == RetrievalParams(0.1, 2, 3.5, (DatastoreChoice("other", 2.5), DatastoreChoice("main", 1.0)))
    assert request.detail == DetailParams(True, 1, 2, True)
    assert request.samples == 3


def test_none_is_the_servers_default(client: GenerationClient, engine: FakeEngine) -> None:
    client.generate("hi", max_new_tokens=8, temperature=None, weight=None, seed=None)
    assert engine.requests[0].sampling == SamplingParams()
    assert engine.requests[0].retrieval == DEFAULT_RETRIEVAL


@pytest.mark.parametrize(
    ("datastores", "chosen"),
    [("other", ["other"]), (["other", "main"], ["other", "main"]), ({"main": 0.5}, ["main"]), (None, []), ([], [])],
)
def test_datastores_are_named_in_any_handy_way(client: GenerationClient, engine: FakeEngine, datastores: Any, chosen: list[str]) -> None:
    client.generate("hi", max_new_tokens=8, datastores=datastores)
    assert [choice.name for choice in engine.requests[0].retrieval.datastores] == chosen


def test_samples_come_in_their_order_and_the_best_in_theirs(client: GenerationClient) -> None:
    assert [completion.sample for completion in client.samples("hi", 3, max_new_tokens=8)] == [0, 1, 2]
    # Of the fake engine's samples the later ones are better.
    assert [completion.sample for completion in client.samples("hi", 2, best_of=4, max_new_tokens=8)] == [3, 2]
    assert client.generate("hi", best_of=4, max_new_tokens=8).sample == 3


def test_streams_of_several_samples_end_once_for_each(client: GenerationClient) -> None:
    events = list(client.stream("hi", num_samples=2, max_new_tokens=8))
    assert sorted(event.sample for event in events if isinstance(event, FinishEvent)) == [0, 1]
    assert "".join(event.text for event in events if event.sample == 1) == "ab!"


def test_evidence_comes_with_the_end(client: GenerationClient) -> None:
    assert client.generate("hi", max_new_tokens=8).evidence is None
    assert client.generate("hi", max_new_tokens=8, evidence=True).evidence == EVIDENCE
    *_, finish = client.stream("hi", max_new_tokens=8, evidence=True)
    assert isinstance(finish, FinishEvent)
    assert finish.evidence == EVIDENCE


def test_retrieve(client: GenerationClient, engine: FakeEngine) -> None:
    found = client.retrieve("abc", k=2, knn_temperature=3.5, datastores=["other"], neighbors=2, truncate_context=True)
    assert (found.token_ids, found.neighbors) == ((97, 98, 99), (NEIGHBOR, NEIGHBOR))
    assert engine.retrieved[0].retrieval == RetrievalParams(1.0, 2, 3.5, (DatastoreChoice("other"),))
    with pytest.raises(TypeError, match="unexpected option 'weight'"):
        client.retrieve("abc", weight=0.5)  # type: ignore[call-arg]


def test_detokenize(client: GenerationClient) -> None:
    assert client.detokenize([104, 105]) == "hi"
    assert client.detokenize(()) == ""
    with pytest.raises(InvalidInput, match="token_ids"):
        client.detokenize([-1])


def test_retrieval_can_be_turned_off(client: GenerationClient, engine: FakeEngine) -> None:
    client.generate("hi", max_new_tokens=8, retrieval=False)
    assert engine.requests[0].retrieval.weight == 0


def test_stream_yields_tokens_then_the_finish(client: GenerationClient) -> None:
    *tokens, finish = client.stream("hi", max_new_tokens=8, neighbors=1, log_probs=True)
    assert [token.text for token in tokens] == ["a", "b"]
    assert isinstance(tokens[0], TokenEvent)
    assert tokens[0].neighbors == (NEIGHBOR,)
    assert tokens[0].knn_share == 0.8
    assert finish == FinishEvent(FinishReason.LENGTH, "!", 2, 2)


def test_closing_a_stream_cancels_the_request(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    with GenerationClient(start_server(engine).target) as client:
        events = client.stream("hi", max_new_tokens=8)
        next(events)
        events.close()
        assert engine.closed.wait(WAIT_SECONDS)


def test_score_tokenize_and_info(client: GenerationClient) -> None:
    scored = client.score("abc", weight=0.5)
    assert (scored.token_ids, scored.log_probs) == ((97, 98, 99), (-1.0, -1.0))
    assert client.score([5, 6], retrieval=False).knn_log_probs == ()
    assert client.tokenize("ab") == (Token(97, "a"), Token(98, "b"))
    assert client.server_info() == INFO


def test_refused_fields_are_named(client: GenerationClient) -> None:
    with pytest.raises(FieldsRefused, match="top_p") as caught:
        client.generate("hi", max_new_tokens=8, top_p=1.5)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = caught.value.violations
    assert violation.field == caught.value.field == "options.sampling.top_p"
    assert "1.5" in violation.problem
    assert isinstance(caught.value, InvalidInput)
    assert caught.value.reason == "INVALID_INPUT"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "options.sampling.top_k"),
        ({"k": 2**40}, "options.retrieval.k"),
        ({"max_new_tokens": "many"}, "options.stopping.max_new_tokens"),
        ({"stop_token_ids": [-1]}, "options.stopping.stop_token_ids"),
        ({"stop_strings": "end"}, "options.stopping.stop_strings"),
        ({"logit_bias": {-1: 1.0}}, "options.sampling.logit_bias"),
        ({"logit_bias": {1: "much"}}, "options.sampling.logit_bias"),
        ({"logit_bias": [(1, 1.0)]}, "options.sampling.logit_bias"),
        ({"bad_words": "end"}, "options.sampling.bad_words"),
        ({"bad_words": ["a", [-1]]}, "options.sampling.bad_words[1].token_ids.ids"),
        ({"datastores": {"main": "much"}}, "options.retrieval.datastores[0].weight"),
        ({"datastores": ["main", "main"]}, "options.retrieval.datastores"),
        ({"num_samples": -1}, "options.num_samples"),
    ],
)
def test_values_that_no_field_can_hold_are_refused_before_sending(client: GenerationClient, options: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.stream("hi", **options)  # type: ignore[misc]
    assert caught.value.field == field


def test_prompts_that_no_field_can_hold_are_refused_before_sending(client: GenerationClient) -> None:
    with pytest.raises(InvalidInput, match=r"prompt\.token_ids\.ids"):
        client.generate([-1])
    with pytest.raises(InvalidInput, match=r"prompt\.text"):
        client.generate("\ud800")


def test_an_empty_list_of_tokens_is_the_servers_to_refuse(client: GenerationClient) -> None:
    with pytest.raises(RequestFailed, match=r"prompt\.token_ids\.ids: has no tokens"):
        client.generate([], max_new_tokens=8)


def test_unknown_options_are_a_programming_error(client: GenerationClient) -> None:
    with pytest.raises(TypeError, match="unexpected option 'topp'"):
        client.generate("hi", topp=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected option 'seed'"):
        client.score("hi", seed=1)  # type: ignore[call-arg]


def test_a_full_queue_tells_when_to_come_again(start_server: Start) -> None:
    with GenerationClient(start_server(FakeEngine(failure=QueueFull("full"))).target) as client:
        with pytest.raises(RequestFailed) as caught:
            list(client.stream("fail", max_new_tokens=8))
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_seconds == 1


def test_a_failure_tells_the_id_under_which_it_was_logged(start_server: Start) -> None:
    with GenerationClient(start_server(FakeEngine(failure=ZeroDivisionError())).target) as client:
        with pytest.raises(RequestFailed) as caught:
            client.score("fail")
        assert caught.value.request_id is not None
        assert caught.value.request_id in caught.value.message


def test_a_timeout_is_a_deadline(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    with GenerationClient(start_server(engine).target) as client:
        with pytest.raises(RequestFailed) as caught:
            client.generate("hi", max_new_tokens=8, timeout=0.5)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert f"The call to {client.target} did not end within its timeout" in caught.value.message


def test_no_server_is_a_typed_error_that_names_the_target() -> None:
    target = f"127.0.0.1:{free_port()}"
    with GenerationClient(target) as client:
        with pytest.raises(ServerUnavailable, match=f"No server answers at {target}") as caught:
            client.generate("hi")
        assert isinstance(caught.value, KNNLMError)
        with pytest.raises(ServerUnavailable, match=f"No server was ready at {target} within 0.2 seconds"):
            client.wait_until_ready(timeout=0.2)


def test_wait_until_ready(client: GenerationClient) -> None:
    client.wait_until_ready(timeout=WAIT_SECONDS)


def test_the_async_client_does_the_same(start_server: Start) -> None:
    async def use(target: str) -> None:
        async with AsyncGenerationClient(target) as client:
            await client.wait_until_ready(WAIT_SECONDS)
            assert (await client.generate("hi", max_new_tokens=8)).text == "ab!"
            events = [event async for event in client.stream("hi", max_new_tokens=8)]
            assert [type(event) for event in events] == [TokenEvent, TokenEvent, FinishEvent]
            assert (await client.score([1, 2])).token_ids == (1, 2)
            assert await client.tokenize("a") == (Token(97, "a"),)
            assert await client.detokenize([97]) == "a"
            assert (await client.retrieve([1], neighbors=1)).neighbors == (NEIGHBOR,)
            assert [completion.sample for completion in await client.samples("hi", 2, max_new_tokens=8)] == [0, 1]
            assert await client.server_info() == INFO
            with pytest.raises(RequestFailed, match="top_p"):
                await client.generate("hi", max_new_tokens=8, top_p=2)
            with pytest.raises(RequestFailed, match="top_p"):
                await anext(client.stream("hi", max_new_tokens=8, top_p=2))

    asyncio.run(use(start_server(FakeEngine()).target))


def test_closing_an_async_stream_cancels_the_request(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)

    async def use(target: str) -> None:
        async with AsyncGenerationClient(target) as client, aclosing(client.stream("hi", max_new_tokens=8)) as events:
            await anext(events)

    asyncio.run(use(start_server(engine).target))
    assert engine.closed.wait(WAIT_SECONDS)


def test_the_async_client_waits_in_vain_without_a_server() -> None:
    async def use() -> None:
        async with AsyncGenerationClient(f"127.0.0.1:{free_port()}") as client:
            with pytest.raises(ServerUnavailable):
                await client.wait_until_ready(timeout=0.2)

    asyncio.run(use())

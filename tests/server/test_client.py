"""Both clients against a real server: typed results, typed errors, deadlines and cancellation; and no torch."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from knnlm.errors import InvalidInput, KNNLMError
from knnlm.sampling import SamplingParams
from knnlm_server.client import AsyncGenerationClient, FieldsRefused, GenerationClient, RequestFailed, ServerUnavailable, Token
from knnlm_server.errors import QueueFull
from knnlm_server.sequence import DetailParams, FinishEvent, FinishReason, StoppingParams, TokenEvent
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import DEFAULT_RETRIEVAL, INFO, LIMITS, NEIGHBOR, FakeEngine

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
    program = f"import sys, knnlm_server.client, knnlm_server.cli, knnlm_server.display; print([m for m in {heavy} if m in sys.modules])"
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
        repetition_penalty=1.5,
        seed=0,
        max_new_tokens=9,
        min_new_tokens=2,
        stop_strings=["x"],
        stop_token_ids=[0],
        ignore_eos=True,
        weight=0.1,
        k=2,
        knn_temperature=3.5,
        log_probs=True,
        alternatives=1,
        neighbors=2,
        truncate_prompt=True,
        timeout=WAIT_SECONDS,
    )
    (request,) = engine.requests
    assert request.prompt == (1, 2, 3)
    assert request.sampling == SamplingParams(repetition_penalty=1.5, temperature=0, top_k=4, top_p=0.5, min_p=0.1, seed=0)
    assert request.stopping == StoppingParams(9, 2, ("x",), (0,), True, LIMITS.max_seconds)
    assert (request.retrieval.weight, request.retrieval.k, request.retrieval.temperature) == (0.1, 2, 3.5)
    assert request.detail == DetailParams(True, 1, 2)


def test_none_is_the_servers_default(client: GenerationClient, engine: FakeEngine) -> None:
    client.generate("hi", max_new_tokens=8, temperature=None, weight=None, seed=None)
    assert engine.requests[0].sampling == SamplingParams()
    assert engine.requests[0].retrieval == DEFAULT_RETRIEVAL


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

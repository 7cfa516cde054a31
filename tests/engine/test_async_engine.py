"""The engine on its own thread: streams side by side, requests given up, failures and the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from operator import methodcaller
from typing import Any

import pytest

from knnlm.sampling import SamplingParams
from knnlm_server import engine_parts as engine_parts_module
from knnlm_server.async_engine import AsyncEngine
from knnlm_server.datastores import Datastores
from knnlm_server.engine_parts import EngineParts
from knnlm_server.errors import EngineFailed, QueueFull, ShuttingDown
from knnlm_server.sequence import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    RetrievalParams,
    ScoreRequest,
    ServerInfo,
    TokenEvent,
)
from knnlm_server.streaming_engine import StreamingEngine
from knnlm_server.telemetry import StepReport, Unobserved
from tests.engine.harness import LM_ALONE, CountingIndex, Parts, RecordingEngine, complete, make_engine, random_prompt, request

MIXED = RetrievalParams(0.5, 8, 10.0)
PATIENCE = 30.0


class Unmoved(StreamingEngine):
    """No engine at all: what it hands out is what a test tells."""

    def __init__(self) -> None:
        super().__init__()
        self._open = True

    @property
    def _limits(self) -> Limits:
        return Limits(context=64, max_concurrent=1)

    def _submit(self, request_id: str, command: methodcaller) -> None:
        pass

    def _forget(self, request_id: str) -> None:
        pass


def info(parts: Parts, **limits: int) -> ServerInfo:
    return ServerInfo(
        version="0", model="tiny", model_fingerprint="", tokenizer_fingerprint="", vocabulary_size=300, datastores=(),
        limits=parts.limits(**limits),
    )  # fmt: skip


def engine_of(parts: Parts, datastores: Datastores | None = None, **limits: int) -> AsyncEngine:
    return AsyncEngine(EngineParts(parts.model, parts.knn_lm.tokenizer, datastores or parts.datastores(), info(parts, **limits)))


class Running:
    """An engine that works, and the :class:`RecordingEngine` inside."""

    def __init__(self, outer: AsyncEngine, inner: RecordingEngine) -> None:
        self.outer, self.inner = outer, inner

    async def generate(self, asked: GenerationRequest) -> list[int]:
        """Tokens of the whole completion."""
        events = [event async for event in self.outer.generate(asked)]
        assert isinstance(events[-1], FinishEvent)
        return [event.token_id for event in events if isinstance(event, TokenEvent)]

    async def until_idle(self) -> None:
        while not self.inner.idle:
            await asyncio.sleep(0.005)


Start = Callable[..., Running]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start an engine around parts, with these limits; it is stopped at the end of the test."""
    made: list[RecordingEngine] = []

    def recording(*args: Any, **options: Any) -> RecordingEngine:
        made.append(RecordingEngine(*args, **options))
        return made[-1]

    monkeypatch.setattr(engine_parts_module, "DecodingEngine", recording)
    with ExitStack() as stack:

        def starting(parts: Parts, datastores: Datastores | None = None, **limits: int) -> Running:
            outer = engine_of(parts, datastores, **limits)
            stack.callback(outer.stop)
            outer.start()
            return Running(outer, made[-1])

        yield starting


def run(awaitable: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(awaitable, PATIENCE)

    return asyncio.run(bounded())


def endless(name: str) -> GenerationRequest:
    return request(name, random_prompt(3, 1), max_new_tokens=60, ignore_eos=True)


def some_requests(count: int) -> list[GenerationRequest]:
    mixtures = [LM_ALONE, MIXED]
    return [
        request(f"{n}", random_prompt(4 + 5 * n, n), SamplingParams(seed=n), mixtures[n % 2], max_new_tokens=6 + n, ignore_eos=True)
        for n in range(count)
    ]


def test_streams_side_by_side_are_each_alone(gpt2: Parts, start: Start) -> None:
    asked = some_requests(6)
    engine = start(gpt2, max_concurrent=4)

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*(engine.generate(one) for one in asked)))

    expected = [complete(make_engine(gpt2), one)[one.request_id].tokens for one in asked]
    assert run(all_of_them()) == expected
    assert max(engine.inner.rows_of_steps) > 1, "they did not run side by side, so this shows nothing"


def test_tokens_arrive_while_the_completion_goes_on(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2)

    async def first_event() -> int:
        stream = engine.outer.generate(endless("a"))
        await anext(stream)
        computed = len(engine.inner.keys["a"])
        await stream.aclose()
        return computed

    assert run(first_event()) < 60


def test_closing_a_stream_frees_its_row_for_the_next_step(gpt2: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(gpt2, max_concurrent=1)
    gate, step = threading.Semaphore(0), engine.inner.step

    def one_step_at_a_time() -> Any:
        gate.acquire()
        return step()

    monkeypatch.setattr(engine.inner, "step", one_step_at_a_time)

    async def give_up_and_ask_again() -> tuple[int, list[int]]:
        stream = engine.outer.generate(endless("given up"))
        gate.release()
        await anext(stream)
        await stream.aclose()
        # The step that may have begun already is the last one for it.
        gate.release(20)
        tokens = await engine.generate(some_requests(1)[0])
        return len(engine.inner.keys["given up"]), tokens

    try:
        steps, tokens = run(give_up_and_ask_again())
    finally:
        gate.release(1000)
    assert steps <= 2
    assert tokens == complete(make_engine(gpt2), some_requests(1)[0])["0"].tokens


def test_a_cancelled_task_cancels_its_request(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2)

    async def cancel_both() -> None:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(engine.generate(endless("a"))),
            asyncio.create_task(engine.outer.score(ScoreRequest("s", tuple(random_prompt(20_000, 1)), LM_ALONE))),
        ]
        while not engine.inner.keys["a"]:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        await engine.until_idle()

    run(cancel_both())
    assert len(engine.inner.keys["a"]) < 60


@pytest.mark.parametrize("fails", [False, True])
def test_the_observer_learns_that_nothing_runs_any_more(gpt2: Parts, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last request did not end in a step of its own, but was cancelled or failed with all the others."""
    running: list[int] = []

    class Observer(Unobserved):
        def step(self, report: StepReport) -> None:
            running.append(report.running)

    outer = AsyncEngine(EngineParts(gpt2.model, gpt2.knn_lm.tokenizer, gpt2.datastores(), info(gpt2)), Observer())
    outer.start()

    async def give_up() -> None:
        stream = outer.generate(endless("a"))
        await anext(stream)
        assert running[-1] == 1
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(gpt2.model, "forward", _failing)
                with pytest.raises(EngineFailed):
                    _ = [event async for event in stream]
        await stream.aclose()
        while running[-1]:
            await asyncio.sleep(0.005)

    try:
        run(give_up())
    finally:
        outer.stop()


def _failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no forward pass")


def test_score(gpt2: Parts, start: Start) -> None:
    asked = ScoreRequest("s", tuple(random_prompt(70, 3)), MIXED)
    alone = make_engine(gpt2)
    alone.add_score(asked)
    outputs = []
    while not alone.idle:
        outputs += alone.step()
    assert run(start(gpt2).outer.score(asked)) == outputs[-1].content


def test_stop_ends_running_requests_and_takes_no_new_ones(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2, max_concurrent=1)

    async def stopped() -> list[Any]:
        begun, waiting = engine.outer.generate(endless("begun")), engine.outer.generate(endless("waiting"))
        await anext(begun)
        task = asyncio.create_task(anext(waiting))
        scoring = asyncio.create_task(engine.outer.score(ScoreRequest("s", tuple(random_prompt(20_000, 1)), LM_ALONE)))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.outer.stop)

        async def rest() -> None:
            async for _ in begun:
                pass

        late = engine.generate(endless("late"))
        return list(await asyncio.gather(rest(), task, scoring, late, return_exceptions=True))

    assert [type(result) for result in run(stopped())] == [ShuttingDown] * 4
    engine.outer.stop()


def test_requests_that_come_while_the_engine_stops_are_all_answered(gpt2: Parts, start: Start) -> None:
    """None may slip in behind the last look at who is listening, and wait for ever."""
    engine = start(gpt2)

    async def storm() -> list[Any]:
        stopper = threading.Thread(target=engine.outer.stop)
        tasks = []
        for number in range(300):
            tasks.append(asyncio.create_task(engine.generate(request(f"{number}", [5], max_new_tokens=1))))
            if number == 100:
                stopper.start()
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        stopper.join()
        return list(results)

    results = run(storm())
    assert all(isinstance(result, list | ShuttingDown | QueueFull) for result in results)
    assert isinstance(results[-1], ShuttingDown)


def test_nothing_is_taken_before_the_start(gpt2: Parts) -> None:
    engine = engine_of(gpt2)
    with pytest.raises(ShuttingDown):
        run(anext(engine.generate(endless("a"))))
    engine.stop()


def test_an_error_of_the_warm_up_is_an_error_of_start(gpt2: Parts) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    index.failure = RuntimeError("no such GPU")
    engine = engine_of(gpt2.searched_by(index))
    with pytest.raises(RuntimeError, match="no such GPU"):
        engine.start()
    with pytest.raises(ShuttingDown):
        run(anext(engine.generate(endless("a"))))


def test_the_warm_up_leaves_nothing_behind(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2)
    assert engine.inner.idle
    assert len(engine.inner.keys["warm-up"]) == 2


def test_a_full_queue_refuses_and_the_others_go_on(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2, max_concurrent=1, max_waiting_requests=1)

    async def three() -> list[Any]:
        first = engine.outer.generate(endless("first"))
        await anext(first)
        second = asyncio.create_task(engine.generate(some_requests(1)[0]))
        await asyncio.sleep(0)
        third = asyncio.create_task(engine.generate(endless("third")))
        (refused,) = await asyncio.gather(third, return_exceptions=True)
        await first.aclose()
        return [refused, await second]

    refused, tokens = run(three())
    assert isinstance(refused, QueueFull)
    assert "1 requests are waiting, the limit is 1" in str(refused)
    assert tokens == complete(make_engine(gpt2), some_requests(1)[0])["0"].tokens


def test_a_step_that_fails_ends_what_runs_and_the_engine_serves_on(gpt2: Parts, start: Start) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    engine = start(gpt2.searched_by(index))

    async def fail_then_serve() -> tuple[list[Any], list[int]]:
        index.failure = RuntimeError("index lost")
        broken = await asyncio.gather(
            engine.generate(replace(endless("a"), retrieval=MIXED)),
            engine.outer.score(ScoreRequest("s", (5, 6, 7), MIXED)),
            return_exceptions=True,
        )
        index.failure = None
        return list(broken), await engine.generate(some_requests(2)[1])

    broken, tokens = run(fail_then_serve())
    assert [type(result) for result in broken] == [EngineFailed, EngineFailed]
    assert tokens == complete(make_engine(gpt2), some_requests(2)[1])["1"].tokens


def test_a_request_that_can_not_even_be_queued_ends_alone(gpt2: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(gpt2)
    bad = ScoreRequest("bad", (5, 2**40), LM_ALONE)

    async def both() -> list[Any]:
        return list(await asyncio.gather(engine.outer.score(bad), engine.generate(some_requests(1)[0]), return_exceptions=True))

    failed, tokens = run(both())
    assert isinstance(failed, EngineFailed)
    assert tokens == complete(make_engine(gpt2), some_requests(1)[0])["0"].tokens


def test_should_the_thread_ever_end_nobody_waits_for_it(gpt2: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(gpt2)

    def broken(*args: object) -> None:
        raise RuntimeError("beyond help")

    monkeypatch.setattr(engine.inner, "step", broken)
    monkeypatch.setattr(engine.inner, "fail_all", broken)

    async def ask_twice() -> list[Any]:
        first = await asyncio.gather(engine.generate(endless("a")), return_exceptions=True)
        second = await asyncio.gather(engine.generate(endless("b")), return_exceptions=True)
        return [*first, *second]

    assert [type(result) for result in run(ask_twice())] == [ShuttingDown, ShuttingDown]


def test_a_flood_of_commands_does_not_hold_up_what_runs(gpt2: Parts, start: Start) -> None:
    engine = start(gpt2)
    flooding = threading.Event()

    def another(_: object) -> None:
        if not flooding.is_set():
            engine.outer._submit("flood", another)

    async def one_that_ends() -> list[int]:
        engine.outer._submit("flood", another)
        return await engine.generate(request("a", [5, 6], max_new_tokens=4, ignore_eos=True))

    try:
        assert len(run(one_that_ends())) == 4
    finally:
        flooding.set()


def test_an_event_loop_that_closed_harms_nobody_else(gpt2: Parts, start: Start) -> None:
    # A model reads for one engine at a time, so what is expected is found before the other works.
    expected = complete(make_engine(gpt2), some_requests(1)[0])["0"].tokens
    engine = start(gpt2)
    loop = asyncio.new_event_loop()
    stream = engine.outer.generate(endless("abandoned"))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert run(engine.generate(some_requests(1)[0])) == expected
    run(stream.aclose())


def test_who_has_ended_is_not_ended_again() -> None:
    """The engine stops while a request's finish is on its way: it has its answer, and no error."""
    finish = FinishEvent(FinishReason.LENGTH, "", 1, 1)

    async def life() -> list[object]:
        engine = Unmoved()
        reading = asyncio.ensure_future(_all_of(engine, request("done", [1])))
        await asyncio.sleep(0)
        engine._tell([("done", finish)])
        engine._end_all(ShuttingDown("The server is being stopped."))
        return await reading

    assert run(life()) == [finish]


async def _all_of(engine: StreamingEngine, asked: GenerationRequest) -> list[object]:
    return [event async for event in engine.generate(asked)]

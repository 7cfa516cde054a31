"""Serving over gRPC: against ``generate`` of transformers, what retrieval and the transport add, what a shared prefix saves.

The server is a process of its own; its processor time counts as the client's does. Prompts are drawn anew for each round,
the same for all contestants of a round, so that none is remembered from the round before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from benchmarks import padded_batch
from benchmarks.engine_alone import EngineAlone
from benchmarks.reports import print_table, say
from benchmarks.rounds import Timing, interleave
from benchmarks.server_process import ServerProcess, serving
from benchmarks.session import Session
from benchmarks.streams import Answer, Streams, greedy

MOST_STREAMS = 32
NEW_TOKENS = 64
SHORT, LONG = (8, 50), (200, 400)
ASKED = {(SHORT, 1): 0.85, (SHORT, 8): 0.9, (SHORT, 32): 0.95, (LONG, 8): 1.2, (LONG, 32): 1.4}
STREAMS_WITH_RETRIEVAL = 8
USUAL_STEP_MS = 20.0
PREFIX_TOKENS, SUFFIX_TOKENS, PREFIX_NEW_TOKENS, PREFIX_STREAMS = 300, 20, 16, 8

Prompts = list[list[int]]


@dataclass(frozen=True)
class Bench:
    """What the parts of this benchmark share: a server and its clients, the same model here, and text for prompts."""

    session: Session
    server: ServerProcess
    streams: Streams
    runner: asyncio.Runner
    text: list[int]
    sources: Iterator[int] = field(default_factory=itertools.count)

    def prompts(self, lengths: tuple[int, int], count: int) -> Callable[[], Prompts]:
        """A source of prompts, another draw at each call: as long as those of any source of the same arguments, and of other text,
        so that a server has seen no beginning of them for whoever it was measured with before."""
        source, turns = next(self.sources), itertools.count()

        def draw() -> Prompts:
            chance = random.Random(f"{source} {next(turns)}")
            sizes = [round(lengths[0] + (lengths[1] - lengths[0]) * n / max(1, count - 1)) for n in range(count)]
            return [self.text[start : start + size] for size in sizes for start in [chance.randrange(len(self.text) - size)]]

        return draw

    def stream(self, prompts: Prompts, tokens: int = NEW_TOKENS, *, retrieval: bool = False) -> list[Answer]:
        """All prompts at once over gRPC, to their ends."""
        requests = [greedy(prompt, tokens, retrieval=retrieval) for prompt in prompts]
        answers = self.runner.run(self.streams.together(requests))
        assert [len(answer.ids) for answer in answers] == [tokens] * len(prompts), {answer.message for answer in answers}
        return answers

    def interleave(self, contestants: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        """Medians over the rounds; CPU-seconds are those of this process and the server's together."""
        clock = lambda: time.process_time() + self.server.cpu_seconds  # noqa: E731
        return interleave(contestants, self.session.options.rounds, cpu_seconds=clock)


def run(session: Session) -> None:
    """A table for each question of the module's first line."""
    opened = session.opened
    model = opened.model
    say(f"model {model.name}: {sum(p.numel() for p in model._model.parameters()):,} parameters, context {model.context}, {model.dtype}")
    say(f"datastore: {len(opened.store):,} entries, {opened.searchable.retriever.index.description}; {session.options.rounds} rounds")
    text = [token for document in session.inputs.held_out(20_000) for token in document.ids.tolist()]
    interval = session.options.stream_interval
    options = [] if interval is None else ["--stream-interval", str(interval)]
    say(f"seconds between messages of a stream, at least: {'as the server has it by default' if interval is None else interval}")
    with asyncio.Runner() as runner, serving(opened.store.path, "--max-concurrent", str(MOST_STREAMS), *options) as server:
        streams = Streams(server.address)
        bench = Bench(session, server, runner.run(streams.__aenter__()), runner, text)
        _against_generate(bench)
        alone = EngineAlone(opened, MOST_STREAMS)
        _retrieval(bench, alone)
        _transport(bench, alone)
        _shared_prefix(bench)
        runner.run(streams.__aexit__(None, None, None))


def _against_generate(bench: Bench) -> None:
    model = bench.session.opened.model
    rows = []
    for (kind, streams), asked in ASKED.items():
        lengths = _fitting(kind, model.context)
        there, here = bench.prompts(lengths, streams), bench.prompts(lengths, streams)
        timings = bench.interleave(
            {
                "generate": lambda draw=there: padded_batch.generate(model, draw(), NEW_TOKENS),  # type: ignore[misc]
                "gRPC": lambda draw=here: bench.stream(draw()),  # type: ignore[misc]
            }
        )
        rows.append([f"{lengths[0]}-{lengths[1]}", str(streams), *_compared(timings["generate"], timings["gRPC"], streams), str(asked)])
    print_table(
        f"weight 0 against generate on a padded batch, {NEW_TOKENS} tokens each; tokens/s (a CPU-s)",
        ["prompts", "streams", "generate", "gRPC", "ratio", "CPU", "asked"],
        rows,
    )


def _retrieval(bench: Bench, alone: EngineAlone) -> None:
    """Eight streams with and without neighbours, and the parts of a step with them."""
    count, mixture = STREAMS_WITH_RETRIEVAL, bench.session.opened.knn_lm.mixture
    draw_off, draw_on, draw_alone = (bench.prompts(SHORT, count) for _ in range(3))
    parts: list[dict[str, float]] = []

    def engine_alone() -> None:
        parts.append(alone.run(draw_alone(), NEW_TOKENS, retrieval=True))

    timings = bench.interleave(
        {
            "weight 0": lambda: bench.stream(draw_off()),
            "kNN": lambda: bench.stream(draw_on(), retrieval=True),
            "alone": engine_alone,
        }
    )
    row = _compared(timings["weight 0"], timings["kNN"], count)
    columns = ["weight 0", f"kNN, k={mixture.k}", "ratio", "CPU", "asked"]
    print_table(f"kNN on: {count} streams; tokens/s (a CPU-s)", columns, [[*row, "0.85"]])
    medians = {name: statistics.median(turn[name] for turn in parts[1:]) for name in parts[0]}
    medians["transport and service"] = timings["kNN"].wall - timings["alone"].wall
    step = timings["kNN"].wall / NEW_TOKENS * 1000
    print_table(
        f"where the time goes: {count} streams, kNN on; ms of a step of {step:.1f}, prompts included",
        ["part", "ms", "share"],
        [[name, f"{seconds / NEW_TOKENS * 1000:.2f}", f"{seconds / timings['kNN'].wall:.0%}"] for name, seconds in medians.items()],
    )


def _transport(bench: Bench, alone: EngineAlone) -> None:
    """What stands between the engine's own time and that of its clients."""
    draw_there, draw_here = (bench.prompts(SHORT, MOST_STREAMS) for _ in range(2))
    loop: list[float] = []

    def over_grpc() -> None:
        before = bench.server.event_loop_cpu_seconds
        bench.stream(draw_there())
        loop.append(bench.server.event_loop_cpu_seconds - before)

    timings = bench.interleave({"engine alone": lambda: alone.run(draw_here(), NEW_TOKENS, retrieval=False), "gRPC": over_grpc})
    bare, served = timings["engine alone"], timings["gRPC"]
    event_loop = statistics.median(loop[1:]) / NEW_TOKENS * 1000
    added = (served.wall - bare.wall) / NEW_TOKENS * 1000
    print_table(
        f"transport and service: {MOST_STREAMS} streams, weight 0, {NEW_TOKENS} tokens each; ms a step",
        ["", "wall", "CPU"],
        [
            [name, *(f"{seconds / NEW_TOKENS * 1000:.2f}" for seconds in (timing.wall, timing.cpu))]
            for name, timing in (("engine alone, in this process", bare), ("over gRPC, client included", served))
        ]
        + [
            ["share of transport and service (asked: < 15 %)", f"{1 - bare.wall / served.wall:.1%}", f"{1 - bare.cpu / served.cpu:.1%}"],
            [f"… if the engine's step took {USUAL_STEP_MS:.0f} ms", f"{added / (USUAL_STEP_MS + added):.1%}", ""],
            ["the server's event loop: service, gRPC", "", f"{event_loop:.2f}"],
            ["… share of the server's processor time", "", f"{event_loop / (bare.cpu / NEW_TOKENS * 1000 + event_loop):.1%}"],
        ],
    )


def _shared_prefix(bench: Bench) -> None:
    """The same beginning for all requests against beginnings of their own."""
    shared_tokens = min(PREFIX_TOKENS, bench.session.opened.model.context - SUFFIX_TOKENS - PREFIX_NEW_TOKENS)
    whole = shared_tokens + SUFFIX_TOKENS
    draw_shared, draw_own = (bench.prompts((whole, whole), PREFIX_STREAMS) for _ in range(2))
    prefix = bench.text[:shared_tokens]
    first: dict[str, list[float]] = {"own": [], "shared": []}

    def contestant(name: str, prompts: Callable[[], Prompts]) -> None:
        answers = bench.stream(prompts(), PREFIX_NEW_TOKENS)
        first[name].append(statistics.fmean(answer.first for answer in answers))

    timings = bench.interleave(
        {
            "own": partial(contestant, "own", draw_own),
            "shared": partial(contestant, "shared", lambda: [prefix + prompt[shared_tokens:] for prompt in draw_shared()]),
        }
    )
    firsts = {name: statistics.median(values[1:]) * 1000 for name, values in first.items()}
    speeds = {name: PREFIX_STREAMS * PREFIX_NEW_TOKENS / timing.wall for name, timing in timings.items()}
    print_table(
        f"prefix of {shared_tokens} tokens, {PREFIX_STREAMS} streams at once, {SUFFIX_TOKENS} tokens of their own, {PREFIX_NEW_TOKENS} new",
        ["", "prefixes of their own", "one prefix", "gain"],
        [
            ["mean time to first token, ms", firsts["own"], firsts["shared"], f"{firsts['own'] / firsts['shared']:.2f}x"],
            ["new tokens/s", speeds["own"], speeds["shared"], f"{speeds['shared'] / speeds['own']:.2f}x"],
        ],
    )


def _fitting(lengths: tuple[int, int], context: int) -> tuple[int, int]:
    """Lengths of prompts that leave room for the new tokens: as asked, or the longest half of what fits."""
    room = context - NEW_TOKENS
    return lengths if lengths[1] <= room else (room // 2, room)


def _compared(bare: Timing, product: Timing, streams: int) -> list[str]:
    """Speeds of both, and the ratios by the clock and in CPU-seconds."""
    tokens = streams * NEW_TOKENS

    def speed(timing: Timing) -> str:
        return f"{tokens / timing.wall:,.0f} ({tokens / timing.cpu:,.0f})"

    return [speed(bare), speed(product), f"{bare.wall / product.wall:.2f}", f"{bare.cpu / product.cpu:.2f}"]

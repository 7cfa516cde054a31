"""A server under load, seen from a process of its own: ``python -m benchmarks.load``; docs/benchmarks.md says what it does.

Exit status 1 if any request ended wrongly or the server kept something; each such thing is named in a line.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from benchmarks.load_report import Phase, print_ends, print_holdings, print_latencies
from benchmarks.reports import say
from benchmarks.server_process import Holdings, ServerProcess, serving
from benchmarks.session import Options, Session
from benchmarks.traffic import Clients, Ended, Mix, closed_loop, open_loop
from benchmarks.verdicts import wrong
from knnlm import console
from knnlm_server.client import GenerationClient
from knnlm_server.pb import admin_pb2
from knnlm_server.pb.admin_pb2_grpc import AdminServiceStub

LOADS = (0.5, 0.8, 1.2)
LOAD_OF_EVENTS = 0.8
QUIET_SECONDS = 10.0
# Sent so shortly before the signal, a request may arrive after it.
RACE_SECONDS = 0.5
LEFT = ("knnlm_requests_running", "knnlm_requests_waiting", "knnlm_waiting_tokens")
MOST_GROWTH, SPARE_BYTES, SPARE_FILES, SPARE_THREADS = 0.1, 64 << 20, 8, 8
SHOWN_PROBLEMS = 20
# Few, so that some of those who read slowly are found to.
UNREAD_EVENTS = 32


@dataclass(frozen=True)
class Plan:
    """What the command line says: how long each phase lasts, how long ``clients`` go on at the end, and with what."""

    seconds: float
    minutes: float
    clients: int
    rows: int
    waiting: int
    seed: int
    exact: bool


class ServerEnded(Exception):
    """The server ended though nobody asked it to."""


@dataclass
class Run:
    """A server under load, and what was seen so far."""

    server: ServerProcess
    plan: Plan
    mix: Mix
    datastores: Sequence[str]
    known: dict[int, list[int]] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stopping: float | None = None

    async def phase(self, name: str, load: Callable[[Clients], Awaitable[list[Ended]]], rate: float | None = None) -> Phase:
        """Put a load on the server, wait until it has nothing left to do, and judge how every request ended."""
        began = time.perf_counter()
        async with Clients(self.server.address) as clients:
            ends = await load(clients)
        seconds = time.perf_counter() - began
        ended = self.server.process.poll() is not None
        left = {} if ended else await self._quiet(name)
        holdings = None if ended else self.server.holdings
        phase = Phase(name, rate, seconds, ends, holdings, left)
        known = self.known if self.plan.exact else {}
        found = (wrong(end, known, self.stopping) for end in ends)
        self.problems += [f"{name}: a request ({end.wanted.kind.value}) {fault}" for end, fault in zip(ends, found, strict=True) if fault]
        self.phases.append(phase)
        say(f"{name}: {len(ends)} requests in {seconds:.0f} s")
        if ended and self.stopping is None:
            raise ServerEnded(f"{name}: the server ended with status {self.server.process.returncode}")
        return phase

    async def _quiet(self, name: str) -> dict[str, float]:
        """What the server still has to do some seconds after its clients left; it should be nothing."""
        end = time.monotonic() + QUIET_SECONDS
        while True:
            metrics = await asyncio.to_thread(self.server.metrics)
            left = {gauge: metrics[gauge] for gauge in LEFT if metrics[gauge]}
            if not left:
                return {}
            if time.monotonic() > end:
                self.problems.append(f"{name}: the server still has {left} {QUIET_SECONDS:.0f} s after its last client left")
                return left
            await asyncio.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all phases and print what was seen; the exit status."""
    store, model, plan = _parse(arguments)
    console.quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="knnlm-load-") as folder:
        if store is None:
            store = Session(Options(model, None, None, None, None, 1, None, 0, 0), Path(folder)).opened.store.path
        log = Path(folder) / "server.log"
        options = ["--max-concurrent", str(plan.rows), "--grace", "60", "--limit", f"max_waiting_requests={plan.waiting}"]
        options += ["--limit", f"max_unread_events={UNREAD_EVENTS}"]
        if plan.exact:
            options += ["--dtype", "float64"]
        with serving(store, *options, log=log) as server:
            run = _new_run(server, plan)
            try:
                asyncio.run(_phases(run))
            except ServerEnded as error:
                run.problems.append(str(error))
        run.problems += [f"the server's log has: {line}" for line in log.read_text().splitlines() if "Traceback" in line]
    return _report(run)


def _new_run(server: ServerProcess, plan: Plan) -> Run:
    with GenerationClient(server.address) as client:
        info = client.server_info(timeout=60)
    mix = Mix(info.vocabulary_size, info.limits.context, plan.seed)
    return Run(server, plan, mix, [store.name for store in info.datastores])


async def _phases(run: Run) -> None:
    """Capacity, loads, reloads, many clients, and the end."""
    plan = run.plan
    chance = random.Random(plan.seed)
    await run.phase("one at a time", partial(_one_by_one, run))
    capacity = await run.phase("capacity", lambda clients: closed_loop(clients, run.mix.draw, 2 * plan.rows, plan.seconds))
    most = len(capacity.ends) / capacity.seconds
    say(f"capacity: {most:.2f} requests/s with {2 * plan.rows} clients and {plan.rows} rows")
    for load in LOADS:
        rate = load * most
        await run.phase(f"{load:.0%} of it", lambda clients, rate=rate: open_loop(clients, run.mix, rate, plan.seconds, chance), rate)  # type: ignore[misc]
    rate = LOAD_OF_EVENTS * most
    reload = partial(_reload, run)
    await run.phase("reloads", lambda clients: open_loop(clients, run.mix, rate, plan.seconds, chance, [reload]), rate)
    if plan.minutes:
        seconds = 60 * plan.minutes
        await run.phase(f"{plan.clients} clients", lambda clients: closed_loop(clients, run.mix.draw, plan.clients, seconds))
    _look_for_growth(run)
    stop = partial(_stop, run, plan.seconds / 2)
    await run.phase("SIGTERM", lambda clients: open_loop(clients, run.mix, rate, plan.seconds, chance, [stop]), rate)


async def _one_by_one(run: Run, clients: Clients) -> list[Ended]:
    """The known prompts, each alone: what it is answered then, it must be answered in company."""
    ends = [await clients.ask(wanted) for wanted in run.mix.known]
    run.known = {number: end.answer.ids for number, end in enumerate(ends)}
    return ends


async def _reload(run: Run) -> None:
    """Open every datastore anew, again and again."""
    end = time.perf_counter() + run.plan.seconds
    async with grpc.aio.insecure_channel(run.server.admin_address) as channel:
        admin = AdminServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        while time.perf_counter() < end:
            for name in run.datastores:
                try:
                    await admin.ReloadDatastore(admin_pb2.ReloadDatastoreRequest(name=name))
                except grpc.aio.AioRpcError as error:
                    run.problems.append(f"reloads: {name} ended with {error.code().name}: {error.details()}")
            await asyncio.sleep(run.plan.seconds / 8)


async def _stop(run: Run, after: float) -> None:
    """SIGTERM; the server must end well once its requests have."""
    await asyncio.sleep(after)
    run.stopping = time.perf_counter() - RACE_SECONDS
    status = await asyncio.to_thread(run.server.stop)
    if status:
        run.problems.append(f"SIGTERM: the server ended with status {status}")


def _look_for_growth(run: Run) -> None:
    """Compare what the server holds with what it held after the capacity was measured, when everything was warm."""
    seen = [phase.holdings for phase in run.phases[1:] if phase.holdings is not None]
    before, after = seen[0], seen[-1]
    spare = Holdings(SPARE_BYTES, SPARE_BYTES, SPARE_FILES, SPARE_THREADS)
    for name in ("resident", "anonymous", "files", "threads"):
        first, last = getattr(before, name), getattr(after, name)
        if last > first * (1 + MOST_GROWTH) + getattr(spare, name):
            run.problems.append(f"the server grew: {name} from {first:,} to {last:,}")


def _report(run: Run) -> int:
    print_latencies(run.phases)
    print_ends(run.phases)
    print_holdings(run.phases)
    whole = [end for phase in run.phases[1:] for end in phase.ends if end.wanted.known is not None]
    same = sum(wrong(end, run.known, run.stopping) is None for end in whole)
    say(f"{same} of {len(whole)} answers to known prompts had the tokens that they have alone")
    for problem in run.problems[:SHOWN_PROBLEMS]:
        say(f"WRONG {problem}")
    total = sum(len(phase.ends) for phase in run.phases)
    say(f"{total} requests, {len(run.problems)} things wrong")
    return 1 if run.problems else 0


def _parse(arguments: Sequence[str] | None) -> tuple[Path | None, str | None, Plan]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="A server under load; docs/benchmarks.md.")
    parser.add_argument("--store", type=Path, help="datastore that is served (default: one built of the demo's text)")
    parser.add_argument("--model", help="Hugging Face causal LM for that (default: the demo's)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase (default 20)")
    parser.add_argument("--minutes", type=float, default=0.0, help="of many clients at once (default 0: left out)")
    parser.add_argument("--clients", type=int, default=64, help="how many those are (default 64)")
    parser.add_argument("--max-concurrent", type=int, default=8, help="the server's (default 8)")
    parser.add_argument("--max-waiting-requests", type=int, default=64, help="the server's (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, kinds and arrivals")
    parser.add_argument("--exact", action="store_true", help="serve in float64, where known prompts must get the tokens they get alone")
    found = parser.parse_args(arguments)
    plan = Plan(
        found.seconds, found.minutes, found.clients, found.max_concurrent, found.max_waiting_requests, found.seed, found.exact
    )  # fmt: skip
    return found.store, found.model, plan


if __name__ == "__main__":
    sys.exit(main())

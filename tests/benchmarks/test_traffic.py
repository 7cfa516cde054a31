"""The mix of requests: what fits the context, in the shares that are said; and arrivals that wait for nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.streams import Answer
from benchmarks.traffic import KNOWN_PROMPTS, KNOWN_SHARE, SHARES, Clients, Ended, Kind, Mix, Wanted, closed_loop, open_loop


@given(vocabulary=st.integers(1, 500), context=st.integers(8, 1000), seed=st.integers(0, 99))
def test_every_request_fits(vocabulary: int, context: int, seed: int) -> None:
    mix = Mix(vocabulary, context, seed)
    for wanted in [*mix.known, *(mix.draw() for _ in range(50))]:
        assert 1 <= len(wanted.prompt) <= context - wanted.tokens
        assert wanted.tokens >= 1
        assert max(wanted.prompt) < vocabulary
        assert wanted.manner.cancel_after is None or 1 <= wanted.manner.cancel_after <= wanted.tokens
        assert (wanted.manner.cancel_after is not None) == (wanted.kind is Kind.CANCELLED)
        assert (wanted.manner.deadline is not None) == (wanted.kind is Kind.HURRIED)
        assert (wanted.manner.pause is not None) == (wanted.kind is Kind.SLOW)
        if wanted.known is not None:
            assert (wanted.prompt, wanted.tokens) == (mix.known[wanted.known].prompt, mix.known[wanted.known].tokens)


def test_shares() -> None:
    mix = Mix(100, 400, seed=0)
    drawn = [mix.draw() for _ in range(4000)]
    counts = Counter(wanted.kind for wanted in drawn)
    for kind, share in {**SHARES, Kind.WHOLE: 1 - sum(SHARES.values())}.items():
        assert abs(counts[kind] / len(drawn) - share) < 0.03
    known = [wanted.known for wanted in drawn if wanted.known is not None]
    assert abs(len(known) / len(drawn) - KNOWN_SHARE) < 0.03
    assert set(known) == set(range(KNOWN_PROMPTS))


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = Mix(100, 400, 1), Mix(100, 400, 1), Mix(100, 400, 2)
    drawn = [first.draw() for _ in range(20)]
    assert drawn == [second.draw() for _ in range(20)]
    assert drawn != [other.draw() for _ in range(20)]


def test_arrivals_of_an_open_loop_wait_for_no_answer() -> None:
    many = 10

    async def run() -> list[Ended]:
        asked, released = 0, asyncio.Event()

        class Held:
            async def ask(self, wanted: Wanted) -> Ended:
                nonlocal asked
                asked += 1
                if asked == many:
                    released.set()
                # Nobody is answered until many have asked.
                await asyncio.wait_for(released.wait(), 60)
                return Ended(wanted, Answer(0.0))

        return await open_loop(cast(Clients, Held()), Mix(100, 400, 0), rate=1000, seconds=0.2, chance=random.Random(0))

    assert len(asyncio.run(run())) >= many


def test_clients_of_a_closed_loop_wait_for_theirs() -> None:
    running, most = 0, 0

    class Watched:
        async def ask(self, wanted: Wanted) -> Ended:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            return Ended(wanted, Answer(0.0))

    ends = asyncio.run(closed_loop(cast(Clients, Watched()), Mix(100, 400, 0).draw, 5, 0.1))
    assert most == 5
    assert len(ends) >= 5

"""Builds, appends, removals and compactions that crash, at seeded steps: the same command goes on and ends in the bytes of a
run that nothing disturbed, and whoever opens the store meanwhile sees it as it was."""

from __future__ import annotations

import random

import pytest

from tests.index_builder.crash_cases import CASES, NAMES, Cases, require_old_or_new, require_undisturbed
from tests.index_builder.crashing import CRASHED, Runner

FILES = ("open", "fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
CRASHES, ROWS, CRASHES_IN_A_ROW = 3, 1, 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--crashes N``, N times as many."""
    times: int = metafunc.config.getoption("crashes")
    for name, count in (("crash", CRASHES), ("row", ROWS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(count * times))


def steps_by_kind(steps: list[str]) -> dict[str, list[int]]:
    """Numbers of the steps, counted from 1, of each kind."""
    return {kind: [number for number, step in enumerate(steps, 1) if step == kind] for kind in sorted(set(steps))}


@pytest.mark.parametrize(("name", "keys"), CASES, ids=NAMES)
def test_after_a_crash_the_same_command_ends_in_the_same_bytes(name: str, keys: str, crash: int, cases: Cases, runner: Runner) -> None:
    """Kinds of steps are taken in turn, so that a frequent kind does not get all crashes."""
    case = cases[name, keys]
    kinds = list(steps_by_kind(case.steps).items())
    kind, numbers = kinds[(CRASHES * CASES.index((name, keys)) + crash) % len(kinds)]
    step = random.Random(f"{name} {keys} {crash}").choice(numbers)
    case.begin()
    crashed = runner.run(*case.arguments, crash_at=step)
    assert crashed.status == CRASHED, crashed.said
    require_old_or_new(case)
    again = runner.run(*case.arguments)
    assert again.status == 0, f"after a crash before {kind}, step {step}: {again.said}"
    require_undisturbed(case, f"after a crash before {kind}, step {step}")


@pytest.mark.parametrize(("name", "keys"), CASES, ids=NAMES)
def test_after_crashes_in_a_row_the_same_command_ends_in_the_same_bytes(
    name: str, keys: str, row: int, cases: Cases, runner: Runner
) -> None:
    case = cases[name, keys]
    chance = random.Random(f"{name} {keys} in a row {row}")
    case.begin()
    crashes = []
    for _ in range(CRASHES_IN_A_ROW):
        step = chance.randint(1, len(case.steps) // 2)
        ended = runner.run(*case.arguments, crash_at=step)
        if ended.status == 0:
            break
        assert ended.status == CRASHED, ended.said
        crashes.append(step)
        require_old_or_new(case)
    assert crashes
    ended = runner.run(*case.arguments)
    assert ended.status == 0, f"after crashes at {crashes}: {ended.said}"
    require_undisturbed(case, f"after crashes at {crashes}")


def test_every_kind_of_step_is_taken(cases: Cases) -> None:
    """Else the crashes would be fewer than they seem."""
    steps = {step for name, keys in CASES for step in cases[name, keys].steps}
    assert steps >= {"find_cells", "in_blocks", "write_index", "forward", "update", *FILES}

"""A disk that is full, or a file that can't grow: one sentence with the file's name, and the same command goes on when that is
mended."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.index_builder.crash_cases import CASES, NAMES, Cases, require_old_or_new, require_undisturbed
from tests.index_builder.crashing import Ended, Runner

PAGE = 4096


def refusal(ended: Ended, store: Path, problem: str) -> str:
    """The path within the store that a run's last words name; there must be one sentence, and no traceback."""
    assert ended.status == 1, ended
    sentences = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.said.splitlines()[-1:] == sentences, ended.said
    found = re.fullmatch(rf"error: {re.escape(str(store))}/?(\S*?)(: | can't be written \(){problem}.*\.", sentences[0])
    assert found, sentences
    return found[1]


@pytest.mark.parametrize(("name", "keys"), [("built", "float16"), ("built", "none"), ("compacted", "float16")])
def test_a_file_that_cannot_grow_is_named(name: str, keys: str, cases: Cases, runner: Runner) -> None:
    """Smaller files first, in reading as in indexing."""
    case = cases[name, keys]
    case.begin()
    named = []
    for limit in (int(600 * 1.6**power) for power in range(9)):
        ended = runner.run(*case.arguments, largest_file=limit)
        if ended.status == 0:
            break
        named.append(refusal(ended, case.store, "File too large"))
        require_old_or_new(case)
    assert ended.status == 0, ended
    assert len(set(named)) > 1
    require_undisturbed(case, f"after {len(named)} failures")


@pytest.fixture
def disk(cases: Cases) -> Iterator[Path]:
    """A disk of its own for the stores, to be made small."""
    shutil.rmtree(cases.store, ignore_errors=True)
    cases.store.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(cases.store)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        cases.store.rmdir()
        pytest.skip(f"can't mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield cases.store
    finally:
        subprocess.run(["umount", str(cases.store)], check=True)
        cases.store.rmdir()


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize(("name", "keys"), CASES, ids=NAMES)
def test_a_full_disk_is_said_and_the_command_goes_on_with_more_space(
    name: str, keys: str, cases: Cases, runner: Runner, disk: Path
) -> None:
    """The disk grows a little after each failure, so that every stage finds it full."""
    case = cases[name, keys]
    case.begin()
    named = []
    used = shutil.disk_usage(disk).used
    for size in range(used + PAGE, 1 << 20, 5 * PAGE):
        resize(disk, size)
        ended = runner.run(*case.arguments)
        if ended.status == 0:
            break
        named.append(refusal(ended, case.store, "No space left"))
        require_old_or_new(case)
    assert ended.status == 0, ended
    assert named
    require_undisturbed(case, f"after {len(named)} failures")

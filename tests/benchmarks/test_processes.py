"""Memory is seen by stage, in a real process that takes it in one and gives it back in another."""

from __future__ import annotations

import sys

import pytest

from benchmarks.processes import ENDING, watch

MIB = 1 << 20
SCRIPT = """
import sys, time
def say(text):
    time.sleep(0.2)
    print(text, file=sys.stderr)
    time.sleep(0.3)  # until then it is read, however busy the machine is
say("reading bytes: 1 of 2, 3/s")
held = bytearray({size})
held[::4096] = b"x" * len(held[::4096])
say("filling the index: 2 of 2")
del held
say("merging the index: 2 of 2")
say("a sentence that is no stage")
"""


def test_a_peak_belongs_to_the_stage_that_is_named_at_its_end() -> None:
    watched = watch([sys.executable, "-c", SCRIPT.format(size=64 * MIB)])
    assert list(watched.samples) == ["reading bytes", "filling the index", "merging the index", ENDING]
    before = watched.last("reading bytes")
    assert 64 * MIB <= watched.peak("filling the index") - before < 72 * MIB
    assert watched.last("merging the index") - before < 8 * MIB
    assert watched.peak() == watched.peak("filling the index")
    assert watched.peak_resident > watched.peak()


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: .*too bad"):
        watch([sys.executable, "-c", "import sys; print('too bad', file=sys.stderr); sys.exit(3)"])

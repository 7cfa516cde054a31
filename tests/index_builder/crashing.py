"""Runs of the command ``knnlm`` in processes that end at a chosen step, as a crash would: no ``finally`` runs, no buffer is written.

``python -m tests.index_builder.crashing`` loads everything once, forks for each run, and has :class:`FakeModel` for every
model. A step is a change of a folder under the store, a file opened to be written, a flush to disk, a forward pass, or
work of FAISS.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stores import environment

CRASHED = 137
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """Exit ``status`` of a run (negative: the signal that ended it), what it wrote to standard error, its steps in order."""

    status: int
    said: str
    steps: list[str]


class Runner:
    """The process that forks for each run; a context, which ends it."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.index_builder.crashing"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**environment(), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, *arguments: str | Path, crash_at: int | None = None, largest_file: int | None = None) -> Ended:
        """Run ``knnlm`` with ``arguments``.

        ``crash_at``: the step, counted from 1, before which the process ends. ``largest_file``: bytes beyond which no file
        grows; a write that would fails as one to a full disk does.
        """
        asked = {"arguments": list(map(str, arguments)), "crash_at": crash_at, "largest_file": largest_file, "scratch": str(self._scratch)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        steps = self._scratch / "steps"
        return Ended(status, (self._scratch / "said").read_text(), steps.read_text().split("\n") if steps.exists() else [])


class Steps:
    """Counts steps, and ends the process at one."""

    def __init__(self, store: str, crash_at: int | None) -> None:
        self._store, self._crash_at = store, crash_at
        self.names: list[str] = []

    def take(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._crash_at:
            os._exit(CRASHED)

    def before(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``call`` with a step before it."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.take(name)
            return call(*arguments, **options)

        return counted

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See ``sys.addaudithook``: Python says what it is about to do to files."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(self._store):
                self.take("open")
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and self._is_within(event, *arguments[:2]):
            self.take(event)

    def _is_within(self, event: str, path: Any, folder: Any) -> bool:
        # shutil.rmtree names files within a folder that it holds open.
        return str(path).startswith(self._store) or (event in ("os.remove", "os.rmdir") and folder != -1)


def _count(steps: Steps) -> None:
    """Make this process take ``steps``."""
    import faiss

    from knnlm.console import ProgressReporter
    from knnlm_index_builder import fill_index, train_index
    from tests.fake_model import FakeModel

    os.fsync = steps.before(os.fsync, "fsync")
    sys.addaudithook(steps.audit)
    for place, name in (
        (faiss, "write_index"), (train_index, "find_cells"), (fill_index, "in_blocks"), (FakeModel, "forward"),
        (ProgressReporter, "update"),
    ):  # fmt: skip
        setattr(place, name, steps.before(getattr(place, name), name))


def _run(asked: dict[str, Any]) -> None:
    """In the forked process."""
    from tests.stores import knnlm

    scratch = Path(asked["scratch"])
    (scratch / "steps").unlink(missing_ok=True)
    said = os.open(scratch / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    arguments = asked["arguments"]
    steps = Steps(arguments[arguments.index("--store") + 1] if "--store" in arguments else arguments[1], asked["crash_at"])
    _count(steps)
    if asked["largest_file"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"], resource.RLIM_INFINITY))
    status = knnlm(*arguments)
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (scratch / "steps").write_text("\n".join(steps.names))
    os._exit(status)


def _warm_up() -> None:
    """Load what a run needs, once for all."""
    from knnlm.model_source import ModelSource
    from tests.fake_model import FakeModel
    from tests.stores import knnlm, text_folder

    model = FakeModel()
    ModelSource.load = lambda self: model  # type: ignore[assignment,method-assign,return-value]
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        store, text = Path(name) / "store", text_folder(Path(name) / "text", ["A sailor sold it.", "The miller found it."])
        for arguments in (
            ("build", text, "--model", "fake", "--store", store), ("remove", store, "--document", "story-0001.txt"), ("compact", store)
        ):  # fmt: skip
            assert knnlm(*arguments) == 0


def main() -> None:
    """Fork for each line of standard input, and answer with the exit status."""
    _warm_up()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _run(json.loads(line))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

"""Who runs the shards of a build: this process, or several. Nothing outside of this module knows which.

A cluster engine is one more class with :meth:`Executor.run`: shards are pure functions of their descriptors, share
nothing but files, and may end in any order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from types import FrameType
from typing import Any, Protocol

import torch

from knnlm.console import quiet_transformers
from knnlm.errors import WorkerLost
from knnlm.model import LanguageModel
from knnlm_index_builder.encode import ShardDescriptor, ShardReceipt, build_shard

SECONDS_BETWEEN_LOOKS = 0.2


class Executor(Protocol):
    """Runs shards."""

    def run(self, descriptors: Sequence[ShardDescriptor], progress: Callable[[int], None]) -> Iterator[ShardReceipt]:
        """Make every shard, and yield its receipt when it is done, in any order.

        ``progress`` is called with entries as they are added. An error of one shard is raised, and ends the others.
        """


class SerialExecutor:
    """One shard after another in this process, with the model that is loaded already."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def run(self, descriptors: Sequence[ShardDescriptor], progress: Callable[[int], None]) -> Iterator[ShardReceipt]:
        """See :meth:`Executor.run`."""
        for descriptor in descriptors:
            yield build_shard(descriptor, self._model, progress)


class ProcessExecutor:
    """``workers`` processes, each with a model of its own from ``load`` (picklable) and its share of the cores.

    Workers end with this process, however it ends, so that no two builds ever write one shard.
    """

    def __init__(self, load: Callable[[], LanguageModel], workers: int) -> None:
        self._load, self._workers = load, workers

    def run(self, descriptors: Sequence[ShardDescriptor], progress: Callable[[int], None]) -> Iterator[ShardReceipt]:
        """See :meth:`Executor.run`."""
        if not descriptors:
            return
        context = multiprocessing.get_context("spawn")
        shared = _Shared(context.Value("q", 0), context.Event())
        workers = min(self._workers, len(descriptors))
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(self._load, threads, shared)) as pool:
            try:
                with _interrupts_held():
                    pending = {pool.submit(_work, descriptor) for descriptor in descriptors}
                yield from _results(pending, shared, progress)
            except BrokenProcessPool:
                raise WorkerLost(
                    "A worker process ended without a word (the system may have run out of memory); what is finished stays, and the "
                    "same command goes on from there. Try fewer --workers."
                ) from None
            finally:
                shared.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)


class _Shared:
    """What workers and the build tell each other: entries done, and that it is over."""

    def __init__(self, done: Any, stopped: Any) -> None:
        self.done, self.stopped = done, stopped


def _results(pending: set[Future[ShardReceipt]], shared: _Shared, progress: Callable[[int], None]) -> Iterator[ShardReceipt]:
    told = 0
    while pending:
        finished, pending = wait(pending, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        done = shared.done.value
        if done > told:
            progress(done - told)
            told = done
        for future in finished:
            yield future.result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile leave Ctrl-C to this one, from their first instruction on; one that comes meanwhile is
    dealt with afterwards.

    Blocking the signal is for them, who inherit that. Here it is not enough: another thread may receive it, and Python
    then interrupts the main thread all the same, which may be telling a new process what to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])


class _Stopped(Exception):
    """The build is over; what this worker has in hand is not wanted any more."""


_worker: tuple[LanguageModel, _Shared] | None = None


def _begin(load: Callable[[], LanguageModel], threads: int, shared: _Shared) -> None:
    """In a new worker: the model, and a watch over the build's process."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quiet_transformers()
    _worker = load(), shared


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([parent.sentinel])
    os._exit(1)


def _work(descriptor: ShardDescriptor) -> ShardReceipt:
    assert _worker is not None
    model, shared = _worker

    def progress(entries: int) -> None:
        if shared.stopped.is_set():
            raise _Stopped
        with shared.done.get_lock():
            shared.done.value += entries

    return build_shard(descriptor, model, progress)

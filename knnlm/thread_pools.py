"""The pools of threads of this process, and how they get in each other's way. Knows nothing of what runs in them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Threads:
    """Threads of torch and FAISS (None: not installed), the cores there are, and how waiting ones wait."""

    cores: int
    torch: int
    faiss: int | None
    wait_policy: str | None


def thread_facts() -> Threads:
    """The pools of this process."""
    try:
        import faiss
    except ImportError:
        found = None
    else:
        found = int(faiss.omp_get_max_threads())
    return Threads(len(os.sched_getaffinity(0)), torch.get_num_threads(), found, os.environ.get("OMP_WAIT_POLICY"))


def available_threads() -> int:
    """How many each pool may have: what OMP_NUM_THREADS says, else the cores that this process may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))


def size_thread_pools(threads: int) -> None:
    """Give torch and FAISS that many threads each. For the calling thread: FAISS counts them for each thread by itself."""
    torch.set_num_threads(threads)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(threads)


def thread_changes(threads: Threads) -> list[str]:
    """What to change about the pools; each of torch and FAISS has one of its own."""
    changes = []
    if max(threads.torch, threads.faiss or 0) > threads.cores:
        changes.append(f"there are more threads than the {threads.cores} cores; set: export OMP_NUM_THREADS={threads.cores}")
    if threads.faiss and threads.cores > 1 and (threads.wait_policy or "").upper() != "PASSIVE":
        changes.append("waiting threads of torch and FAISS take the cores from one another; set: export OMP_WAIT_POLICY=PASSIVE")
    return changes

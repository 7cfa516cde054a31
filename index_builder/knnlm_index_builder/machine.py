"""What this machine has: memory and disk, as far as this process may use them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from pathlib import Path

from knnlm.console import size

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> int:
    """Bytes of memory of the machine, or of the container around this process if that is less."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])


def peak_memory() -> int:
    """Bytes of memory that this process has held at most so far."""
    # In kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_disk(folder: Path) -> int:
    """Bytes that are free where ``folder`` is, or would be made."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def require_free(folder: Path, needed: int, what: str) -> None:
    """Raise OSError if the disk of ``folder`` has not ``needed`` bytes free for ``what``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left for {what}: it needs {size(needed)}, and {size(free)} are free", str(folder))

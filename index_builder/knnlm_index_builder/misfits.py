"""What of an estimate does not fit this machine, in sentences with numbers, and what to change. Knows no model and no corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from knnlm.console import size
from knnlm.errors import InvalidInput
from knnlm_index_builder.needs import KEY_BYTES, DiskNeed, MemoryNeed, Task, disk_need


def misfits(task: Task, disk: DiskNeed, memory: MemoryNeed, refused: InvalidInput | None, *, fixed: bool) -> list[str]:
    """A sentence for each thing that does not fit; none if all does.

    ``refused``: why the index can't be built within the memory allowed; ``fixed``: settings are those of a store, so only
    workers and batches can be changed.
    """
    found = []
    if disk.peak > disk.free:
        found.append(f"the disk has {size(disk.free)} free, but {size(disk.peak)} are needed; {_smaller(task, disk, fixed=fixed)}")
    if refused is not None:
        found.append(f"{refused.problem.removesuffix('.')} (--memory, --index)")
    if memory.peak > memory.total:
        advice = " or ".join(_lighter(task, memory, fixed=fixed))
        found.append(f"the machine has {size(memory.total)} of memory, but {size(memory.peak)} are needed; {advice}")
    if memory.device_peak is not None and memory.device_total is not None and memory.device_peak > memory.device_total:
        found.append(
            f"the GPU has {size(memory.device_total)} of memory, but {size(memory.device_peak)} are needed; use fewer --workers, "
            "a smaller --batch-size or --dtype bfloat16"
        )
    return found


def _smaller(task: Task, disk: DiskNeed, *, fixed: bool) -> str:
    """What takes less disk: the other ways to keep keys, with what they need."""
    if fixed:
        return "free some, or append less at a time"
    choices = [
        f"--keys {keys} needs {size(disk_need(replace(task, keys=keys), disk.free).peak)}"
        for keys in ("float16", "none")
        if KEY_BYTES[keys] < KEY_BYTES[task.keys] and (keys != "none" or task.plan.mergeable)
    ]
    return "; ".join(choices) + "; or choose another disk or an --index of smaller codes" if choices else _smaller(task, disk, fixed=True)


def _lighter(task: Task, memory: MemoryNeed, *, fixed: bool) -> Iterator[str]:
    """What takes less memory."""
    if memory.encoding > memory.total:
        yield "use fewer --workers" if task.workers > 1 else "use a smaller --batch-size, --dtype bfloat16 or a smaller model"
    if memory.process + max(memory.training, memory.filling) > memory.total:
        yield "append less at a time" if fixed else "give a smaller --memory, or an --index with fewer cells or smaller codes"

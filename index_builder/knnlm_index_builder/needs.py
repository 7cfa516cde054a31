"""Disk and memory that a build or an append needs at its peak, from the counts and the plan of its index. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from knnlm.datastore.manifest import Manifest
from knnlm_index_builder.corpus_size import CorpusSize
from knnlm_index_builder.plan_index import FLOAT_BYTES, IndexPlan

TOKEN_BYTES, SPAN_BYTES = 4, 8
KEY_BYTES = {"float16": 2, "float32": 4, "none": 0}
ARRAY_HEAD, SHARD_FACTS, STORE_FACTS = 128, 1_300, 2_500
SEARCH_FILE = 12_000
"""Bytes of measured search settings with their curve, where there is something to choose."""


@dataclass(frozen=True)
class Task:
    """What is to be done: ``new`` text in so many ``shards``, to a store that will hold ``entries``, its keys in ``keys``.

    ``workers``: processes that have a shard to make; ``spans``: whether characters of tokens are known; ``base``: of the
    store that is appended to.
    """

    new: CorpusSize
    entries: int
    shards: int
    shard_tokens: int
    workers: int
    keys: str
    dimension: int
    plan: IndexPlan
    spans: bool
    base: Manifest | None

    @property
    def part_entries(self) -> int:
        """Entries of the largest shard."""
        return min(self.new.entries, self.shard_tokens)


@dataclass(frozen=True)
class DiskNeed:
    """Bytes. ``keys``, ``tokens`` (ids, values, spans), ``documents`` and ``index`` as they are stored; ``store``: what the
    store grows by in all; ``peak``: what must be free, with scratch and with an old index that goes last; ``free``: what is."""

    keys: int
    tokens: int
    documents: int
    index: int
    store: int
    peak: int
    free: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes. ``process``: one with the model and a batch, measured; ``encoding``: all of them together; ``training`` and
    ``filling``: of the index alone, upper bounds, ``allowed`` for each; ``peak``: the most at a time; ``total``: of the machine.
    ``device_peak`` and ``device_total``: of the GPU, None without one."""

    process: int
    encoding: int
    training: int
    filling: int
    allowed: int
    peak: int
    total: int
    device_peak: int | None
    device_total: int | None


def disk_need(task: Task, free: int) -> DiskNeed:
    """What goes to the disk, at the end and at the peak; ``free`` bytes are there."""
    new, plan, shards = task.new, task.plan, task.shards
    span_bytes = SPAN_BYTES * new.tokens if task.spans else 0
    heads = shards * ARRAY_HEAD
    keys = KEY_BYTES[task.keys] * new.entries * task.dimension + (heads if task.keys != "none" else 0)
    tokens = TOKEN_BYTES * (new.tokens + new.entries) + span_bytes + 2 * heads + (heads if task.spans else 0)
    facts = shards * SHARD_FACTS + STORE_FACTS + (SEARCH_FILE if plan.factory not in ("Flat", "exact") else 0)
    made = keys + tokens + new.table_bytes + plan.disk_bytes + facts
    base = task.base
    replaced = sum(file.bytes for name, file in base.files.items() if name.startswith(f"{base.index}/")) if base else 0
    return DiskNeed(keys, tokens, new.table_bytes, plan.disk_bytes, made - replaced, _peak(task, made, span_bytes), free)


def _peak(task: Task, made: int, span_bytes: int) -> int:
    """The most at a time: while keys that are not stored wait to be coded, or when the index is merged of its parts."""
    new, plan = task.new, task.plan
    # Tokens, spans and documents are written before shards are made of them, and stay until the manifest is.
    stream = TOKEN_BYTES * new.tokens + span_bytes + new.table_bytes
    cells = plan.disk_bytes - task.entries * plan.entry_bytes
    parts = cells + new.entries * plan.entry_bytes if plan.mergeable else 0
    if task.keys != "none":
        return made + stream + parts
    row = FLOAT_BYTES * task.dimension
    sample = plan.training_points * row
    waiting = task.workers * task.part_entries * row
    return made + stream + parts + sample + max(0, waiting - plan.disk_bytes)


def memory_need(task: Task, *, loaded: int, process: int, allowed: int, total: int, device: tuple[int, int] | None) -> MemoryNeed:
    """The peak of memory. ``loaded``: bytes of a process with the model, ``process``: with a batch, too; ``device``: bytes
    that a process takes of the GPU, and those that it has."""
    plan, workers = task.plan, task.workers
    each = process + (plan.filling_bytes if task.keys == "none" else 0)
    # Several workers run beside the process that started them, which holds a model of its own.
    encoding = each if workers == 1 else loaded + workers * each
    peak = max(encoding, process + max(plan.training_bytes, plan.filling_bytes))
    on_device = (None, None) if device is None else (workers * device[0], device[1])
    return MemoryNeed(process, encoding, plan.training_bytes, plan.filling_bytes, allowed, peak, total, *on_device)

"""What a build or an append would take, before anything of it runs: tokens, index, disk, memory, time, and whether it fits.

Reads the corpus, or a sample of it, and runs the model for a few seconds. Writes nothing but a scratch folder of the
system's, which is gone at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.errors import InvalidInput, KeyOverflow
from knnlm.model import LanguageModel
from knnlm.windows import Windowing
from knnlm_index_builder.corpus_size import CorpusSize, measure_corpus
from knnlm_index_builder.index_work import index_work
from knnlm_index_builder.machine import free_disk, peak_memory, total_memory
from knnlm_index_builder.misfits import misfits
from knnlm_index_builder.needs import DiskNeed, MemoryNeed, Task, disk_need, memory_need
from knnlm_index_builder.plan_index import IndexPlan, plan_index
from knnlm_index_builder.progress import Progress
from knnlm_index_builder.settings import BuildSettings, Resources, with_advice
from knnlm_index_builder.speed import comparison_rate, encoding_rate
from knnlm_index_builder.train_index import choose_factory


@dataclass(frozen=True)
class Seconds:
    """How long each stage would take: ``encoding_rate`` in entries a second, all workers together, the rest in seconds."""

    encoding_rate: float
    reading: float
    encoding: float
    training: float
    filling: float
    choosing_search: float

    @property
    def total(self) -> float:
        """Of all stages."""
        return self.reading + self.encoding + self.training + self.filling + self.choosing_search


@dataclass(frozen=True)
class Estimate:
    """What it would take. ``entries`` and ``index`` are of the whole store, ``corpus`` of what is to be read.

    ``keys``: in what they would be stored. ``problems``: a sentence for each thing that does not fit, with what to change.
    """

    corpus: CorpusSize
    entries: int
    shards: int
    keys: str
    dimension: int
    index: IndexPlan
    disk: DiskNeed
    memory: MemoryNeed
    seconds: Seconds
    problems: list[str]

    @property
    def fits(self) -> bool:
        """Whether disk and memory suffice."""
        return not self.problems


def estimate_build(
    corpus: Corpus, store: Path, model: LanguageModel, settings: BuildSettings, progress: Progress, resources: Resources,
    *, workers: int = 1, base: Manifest | None = None,
) -> Estimate:  # fmt: skip
    """What :func:`build_datastore` with these arguments would take; with ``base`` (the store's manifest) what
    :func:`append_documents` would, ``settings`` being the store's.

    Raises what they raise before the model runs, and :class:`KeyOverflow` if float16 can't hold a key of the sample.
    """
    loaded = peak_memory()
    windowing = Windowing.for_context(model.context, settings.max_length, settings.stride)
    with TemporaryDirectory(prefix="knnlm-") as scratch:
        folder = Path(scratch)
        size = measure_corpus(corpus, model.tokenizer(settings.bos, settings.eos), model.vocabulary_size, folder, progress.update)
        entries = size.entries + (base.counts.entries if base else 0)
        plan, refused = _planned(entries, model, settings, resources.memory, extends=base is not None)
        shards = -(-size.tokens // settings.shard_tokens)
        used = min(workers, shards)
        progress.update("measuring the model", 0, None)
        keys, rate = _encoding(model, folder, windowing, settings, resources.batch(model), used, store if base else None)
    task = Task(
        size, entries, shards, settings.shard_tokens, used, keys, model.key_dimension, plan, spans=not corpus.pretokenized, base=base
    )
    disk = disk_need(task, free_disk(store))
    memory = memory_need(
        task, loaded=loaded, process=peak_memory(), allowed=resources.memory, total=total_memory(), device=_device_memory(model)
    )
    problems = misfits(task, disk, memory, refused, fixed=base is not None)
    return Estimate(size, entries, shards, keys, model.key_dimension, plan, disk, memory, _seconds(task, rate), problems)


def _planned(
    entries: int, model: LanguageModel, settings: BuildSettings, memory: int, *, extends: bool
) -> tuple[IndexPlan, InvalidInput | None]:
    """The index, and why it can't be built within ``memory``, if it can't; an append trains none and has no such limit."""
    device, stored = str(model.device), settings.keys != "none"
    factory = settings.index
    if factory == "auto":
        factory = choose_factory(entries, model.key_dimension, gpu=device != "cpu", keys_stored=stored)

    def planned(most: int | None) -> IndexPlan:
        return plan_index(
            factory, model.key_dimension, entries, device=device, memory=most, keys_stored=stored, part_entries=settings.shard_tokens
        )

    plan = planned(None)
    if extends:
        return replace(plan, training_points=0, training_bytes=0), None
    try:
        return planned(memory), None
    except InvalidInput as error:
        return plan, error


def _encoding(
    model: LanguageModel,
    folder: Path,
    windowing: Windowing,
    settings: BuildSettings,
    batch_tokens: int,
    workers: int,
    extended: Path | None,
) -> tuple[str, float]:
    """In what keys would be stored, and how many entries all workers encode in a second."""
    on_cpu = model.device.type == "cpu"
    threads = max(1, torch.get_num_threads() // workers)

    def rate(keys: str) -> float:
        one = encoding_rate(model, folder, windowing, keys, batch_tokens=batch_tokens, shard_tokens=settings.shard_tokens, threads=threads)
        # Processes that share a GPU wait for one another.
        return one * (workers if on_cpu else 1)

    try:
        return settings.keys, rate(settings.keys)
    except KeyOverflow as overflow:
        if settings.on_overflow == "stop":
            raise with_advice(overflow, extended) from None
        return settings.on_overflow, rate(settings.on_overflow)


def _device_memory(model: LanguageModel) -> tuple[int, int] | None:
    if model.device.type == "cpu":
        return None
    return torch.cuda.max_memory_reserved(model.device), torch.cuda.get_device_properties(model.device).total_memory


def _seconds(task: Task, rate: float) -> Seconds:
    work = index_work(task.plan, task.dimension, new=task.new.entries, entries=task.entries)
    speed = comparison_rate(task.dimension, task.plan.nlist or 1024)
    # Without stored keys, those that the index is trained on are encoded apart.
    sample = task.plan.training_points / rate if task.keys == "none" else 0
    return Seconds(
        encoding_rate=rate,
        reading=task.new.read_seconds,
        encoding=task.new.entries / rate,
        training=sample + work.training / speed,
        filling=work.filling / speed,
        choosing_search=work.searching / speed,
    )

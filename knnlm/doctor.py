"""What ``knnlm doctor`` finds: how far a store's searches are from exact search, what they cost here, what to change."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import replace_search, search_settings
from knnlm.errors import InvalidInput, KNNLMError, StoreError
from knnlm.index import EXACT, FaissIndex, NeighborIndex, open_index, read_index_facts
from knnlm.mixture import MOST_NEIGHBORS, Mixture
from knnlm.model_source import ModelSource
from knnlm.retrieval import Retriever
from knnlm.search_measurement import Searched, SearchMeasurement, recall, total_variation
from knnlm.search_positions import SEED, Positions, sample_entries, stored_positions, text_positions
from knnlm.search_settings import SearchPoint, SearchSettings, SearchTuning
from knnlm.search_tuning import KS, TARGET, compares_every_key, tuned
from knnlm.thread_pools import Threads, thread_changes, thread_facts
from knnlm.tokenized import tokenize

QUERIES = 256
BATCH = 32
ROUNDS = 7
MUCH_CHEAPER = 0.8
DOCTOR_SEED = SEED + 1
"""Other positions than those of the build, so that its settings are not judged by what they were chosen by."""


@dataclass(frozen=True)
class Options:
    """What to measure: settings for ``ks``, at ``queries`` positions of ``text`` (files and folders; none: at stored
    entries), which the store's model reads: it lies at ``model`` if it was moved, and runs on ``device``. ``apply``: put
    what is chosen in the place of the store's settings."""

    ks: tuple[int, ...] = KS
    queries: int = QUERIES
    text: tuple[Path, ...] = ()
    model: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    apply: bool = False

    def validate(self) -> Options:
        """Return self; raise :class:`InvalidInput` naming the field that is out of range."""
        if self.queries < 1:
            raise InvalidInput("queries", f"is {self.queries}, but must be 1 or more.")
        for k in self.ks:
            if not 1 <= k <= MOST_NEIGHBORS:
                raise InvalidInput("k", f"is {k}, but must be from 1 to {MOST_NEIGHBORS}.")
        return self

    def command(self, store: Path) -> str:
        """The command that measures the same and puts it in the place of the settings of ``store``."""
        words = ["knnlm", "doctor", str(store)]
        words += [part for path in self.text for part in ("--text", str(path))]
        words += ["--model", self.model] if self.model else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        words += ["--queries", str(self.queries)] if self.queries != QUERIES else []
        words += [part for k in self.ks if k not in KS for part in ("--k", str(k))]
        return shlex.join([*words, "--apply"])


@dataclass(frozen=True)
class Finding:
    """One k with the store's setting: what was measured, and milliseconds of search and re-ranking a query, for one
    query alone and for 32 together (medians, on this machine at this moment)."""

    point: SearchPoint
    milliseconds_alone: float
    milliseconds_in_batch: float


@dataclass(frozen=True)
class GPUFinding:
    """One k on the GPU against the CPU: mean share of the same neighbours, mean total variation."""

    k: int
    same: float
    total_variation: float


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found. ``settings_from``: ``measured`` or ``rule``; ``imbalance`` of the cells as FAISS computes
    it, 1 at best (None: no cells); ``gpu_note`` says why CPU and GPU were not compared; ``changes``: sentences that end in
    a command, if there is one; ``applied``: the new file of settings."""

    store: str
    index: str
    entries: int
    index_bytes: int
    open_seconds: float
    imbalance: float | None
    settings_from: str
    source: str
    queries: int
    temperature: float
    target: float
    healthy: bool
    findings: list[Finding]
    gpu: list[GPUFinding]
    gpu_note: str | None
    threads: Threads
    changes: list[str]
    applied: str | None


@dataclass(frozen=True)
class _Patient:
    """A store that was opened, with its index."""

    store: Datastore
    index: NeighborIndex
    open_seconds: float

    @classmethod
    def open(cls, path: Path) -> _Patient:
        started = time.perf_counter()
        store = Datastore.open(path)
        index = open_index(store.path / store.manifest.index, store.keys, len(store))
        return cls(store, index, time.perf_counter() - started)

    @property
    def temperature(self) -> float:
        """T as the store's profile has it, else the default."""
        return (self.store.profile.mixture if self.store.profile else Mixture()).temperature

    def searched(self) -> Searched:
        store, manifest = self.store, self.store.manifest
        index_bytes = sum(facts.bytes for name, facts in manifest.files.items() if name.startswith(f"{manifest.index}/"))
        return Searched(self.index, store.keys, store.values, store.allowed(), index_bytes, manifest.model.vocabulary_size)

    def positions(self, count: int) -> Positions:
        """Stored entries; raises :class:`InvalidInput` where their keys are not stored."""
        store = self.store
        if store.keys is None:
            raise InvalidInput("text", "is needed, since this datastore keeps no keys to ask with; give held-out text.")
        entries = sample_entries(len(store), store.allowed(), count, DOCTOR_SEED)
        rows = torch.from_numpy(entries)
        live = store.manifest.live_entries
        return stored_positions(
            entries, store.keys.gather(rows), store.values.gather(rows), store.documents, store.manifest.windowing, live
        )


def examine(path: Path, options: Options) -> Diagnosis:
    """Measure the settings of the store at ``path`` against exact search, and say what to change.

    Loads the store's model if there is text to read. Raises the errors of :mod:`knnlm.errors`.
    """
    threads = thread_facts()
    patient = _Patient.open(path)
    positions = _text_positions(patient.store, options) if options.text else patient.positions(options.queries)
    ks = sorted({*options.ks, *KS}) if options.apply else options.ks
    measurement = SearchMeasurement(patient.searched(), positions, ks, patient.temperature)
    if not measurement.ks:
        raise StoreError(f"{path} has too few entries to measure at: {measurement.searched.live_entries}.")
    tuning = None if compares_every_key(patient.index) else tuned(measurement)
    applied = None
    if options.apply and tuning is not None:
        applied = replace_search(path, patient.store.manifest, tuning).search
        patient = _Patient.open(path)
    return _diagnosis(patient, options, measurement, tuning, applied, threads)


def _text_positions(store: Datastore, options: Options) -> Positions:
    facts = store.manifest.text
    model = ModelSource.of(
        store.manifest, model=options.model, device=options.device, dtype=None, trust_remote_code=options.trust_remote_code
    ).load()
    tokenizer = model.tokenizer(facts.bos, facts.eos)  # type: ignore[arg-type]
    documents = [held.ids for held in tokenize(Corpus(options.text, facts.split_documents), tokenizer, model.vocabulary_size)]
    return text_positions(model, documents, store.manifest.windowing, options.queries, DOCTOR_SEED)


def _diagnosis(
    patient: _Patient,
    options: Options,
    measurement: SearchMeasurement,
    tuning: SearchTuning | None,
    applied: str | None,
    threads: Threads,
) -> Diagnosis:
    settings = search_settings(patient.store, patient.index)
    findings = [_finding(patient, settings, measurement, k) for k in measurement.ks]
    gpu, gpu_note = _gpu(patient, settings, measurement)
    searched = measurement.searched
    return Diagnosis(
        store=str(patient.store.path),
        index=patient.index.description,
        entries=searched.live_entries,
        index_bytes=searched.index_bytes,
        open_seconds=patient.open_seconds,
        imbalance=_imbalance(patient.index),
        settings_from="rule" if patient.store.search is None else "measured",
        source=f"{measurement.positions.source}; against {measurement.reference}",
        queries=len(measurement.positions),
        temperature=measurement.temperature,
        target=TARGET,
        healthy=all(finding.point.total_variation <= TARGET for finding in findings) and all(g.total_variation <= TARGET for g in gpu),
        findings=findings,
        gpu=gpu,
        gpu_note=gpu_note,
        threads=threads,
        changes=[*_search_changes(patient, options, findings, tuning), *thread_changes(threads)],
        applied=applied,
    )


def _finding(patient: _Patient, settings: SearchSettings, measurement: SearchMeasurement, k: int) -> Finding:
    allowed = measurement.searched.allowed
    setting = settings.for_k(k, None if allowed is None else allowed.allowed)
    point = measurement.at(setting.probes, math.ceil(k * setting.overfetch))(k, setting.overfetch)
    store = patient.store
    retriever = Retriever(patient.index, store.keys, store.values, settings, store.allowed)
    queries = measurement.positions.queries
    return Finding(point, *(_milliseconds(retriever, queries, k, batch) for batch in (1, min(BATCH, len(queries)))))


def _milliseconds(retriever: Retriever, queries: torch.Tensor, k: int, batch: int) -> float:
    """Median over some batches, each of other queries as long as there are any, the first one not counted."""
    times = []
    for number in range(ROUNDS + 1):
        rows = torch.arange(number * batch, (number + 1) * batch) % len(queries)
        started = time.perf_counter()
        retriever.retrieve(queries[rows], k)
        times.append(1000 * (time.perf_counter() - started) / batch)
    return statistics.median(times[1:])


def _imbalance(index: NeighborIndex) -> float | None:
    sizes = index.list_sizes() if isinstance(index, FaissIndex) else None
    return None if sizes is None else float(len(sizes) * sizes.double().square().sum() / sizes.sum().double().square())


def _gpu(patient: _Patient, settings: SearchSettings, measurement: SearchMeasurement) -> tuple[list[GPUFinding], str | None]:
    """The same queries on CPU and GPU; or why not."""
    if not torch.cuda.is_available():
        return [], "no GPU was found here, so CPU and GPU are not compared"
    store, queries = patient.store, measurement.positions.queries
    found = []
    try:
        on_gpu = open_index(store.path / store.manifest.index, store.keys, len(store), "cuda")
        for k in measurement.ks:
            cpu, gpu = (
                Retriever(index, store.keys, store.values, settings, store.allowed).retrieve(queries, k)
                for index in (patient.index, on_gpu)
            )
            variation = total_variation(gpu, cpu, measurement.temperature)
            found.append(GPUFinding(k, float(recall(gpu, cpu).mean()), float(variation.mean())))
    except KNNLMError as error:
        return found, f"CPU and GPU are not compared for every k: {error}"
    return found, None


def _search_changes(patient: _Patient, options: Options, findings: Sequence[Finding], tuning: SearchTuning | None) -> list[str]:
    """What to change about settings or index."""
    command = options.command(patient.store.path)
    missed = [finding.point.k for finding in findings if finding.point.total_variation > TARGET]
    if missed:
        ks = f"the target is missed for k of {', '.join(map(str, missed))}"
        if tuning is not None and tuning.met:
            return [f"{ks}; settings that meet it are set by: {command}"]
        return [f"{ks}, and no setting of this index meets it; {_other_index(patient.store.manifest, patient.store.path)}"]
    if tuning is None or options.apply:
        return []
    if patient.store.search is None:
        return [f"the settings come from a rule; measured ones are set by: {command}"]
    now = {finding.point.k: finding.point.bytes_read for finding in findings}
    cheaper = [s.k for s in tuning.settings if tuning.point(s).bytes_read < MUCH_CHEAPER * now[s.k]]
    return (
        [f"cheaper settings would do for k of {', '.join(map(str, cheaper))}; they are set by: {command}"] if cheaper and tuning.met else []
    )


def _other_index(manifest: Manifest, path: Path) -> str:
    facts = read_index_facts(path / manifest.index)
    factory = f"IVF{facts.nlist},SQ8" if facts.nlist and "SQ8" not in facts.factory else "Flat"
    if facts.factory in ("Flat", EXACT):
        return f"compare its files with their checksums: {shlex.join(['knnlm', 'verify', str(path)])}"
    if not manifest.key.stored:
        return f"finer codes do, which need the text again: build another datastore with --index {factory}, or with stored keys"
    return f"an index with finer codes does: {shlex.join(['knnlm', 'compact', str(path), '--index', factory])}"

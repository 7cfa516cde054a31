"""Building a datastore: stages in order, each with a marker, the manifest last.

Killed anywhere, the same call goes on from the last finished shard and ends in the same bytes. Other settings or
another corpus against a store that is there already are refused, naming the difference.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import knnlm
from knnlm.corpus import Corpus
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, sync_folder, write_atomically
from knnlm.datastore.manifest import (
    BUILD_FOLDER,
    MANIFEST,
    RECEIPT,
    Counts,
    KeyFacts,
    Manifest,
    ModelFacts,
    ShardFacts,
    TextFacts,
)
from knnlm.datastore.reader import KEYS, ShardedRows, check_files
from knnlm.errors import InvalidInput, KNNLMError, StoreError, StoreLocked, StoreMismatch
from knnlm.index import EXACT, build_index, choose_factory, import_faiss, require_buildable
from knnlm.model import HFLanguageModel
from knnlm.tokenization import BosMode
from knnlm.windows import Windowing
from knnlm_index_builder.encode import ShardDescriptor, ShardReceipt, build_shard, plan_shards, read_receipt
from knnlm_index_builder.ingest import DOCUMENTS, CorpusReceipt, IngestedCorpus, ingest

DOCUMENT_TABLE = "documents/00000.arrow"
INDEX_FOLDER = "index/00000"
SETTINGS = "settings.json"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32_768


@dataclass(frozen=True)
class BuildSettings:
    """What the bytes of a store depend on, beside model and corpus.

    ``index``: ``auto``, ``exact`` or a FAISS factory string; ``keys``: float16 or float32; ``max_length`` and
    ``stride`` of windows (None: the defaults of :class:`knnlm.windows.Windowing`); ``bos``, ``eos`` and
    ``split_documents`` as in :class:`knnlm.tokenization.TextTokenizer` and :class:`knnlm.corpus.Corpus`;
    ``shard_tokens``: tokens in a shard at most, the unit of work that a killed build does again.
    """

    index: str = "auto"
    keys: str = "float16"
    max_length: int | None = None
    stride: int | None = None
    bos: BosMode = "auto"
    eos: bool = False
    split_documents: str | None = None
    shard_tokens: int = 262_144

    def validate(self) -> BuildSettings:
        """Return self; raise :class:`InvalidInput` naming the field that is out of range."""
        if self.keys not in ("float16", "float32"):
            raise InvalidInput("keys", f"is {self.keys!r}, but must be float16 or float32.")
        if self.shard_tokens < 1:
            raise InvalidInput("shard_tokens", f"is {self.shard_tokens}, but must be 1 or more.")
        return self


class Progress(Protocol):
    """Told how far a stage is; ``total`` is None while it is not known."""

    def update(self, stage: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` tokens or entries of ``stage`` are finished."""


@dataclass(frozen=True)
class BuildResult:
    """``manifest`` of the store; ``already_complete`` if nothing had to be done; ``skipped`` binary files; ``empty``
    documents that had no token."""

    manifest: Manifest
    already_complete: bool
    skipped: list[str]
    empty: int


def build_datastore(
    inputs: Sequence[str | Path],
    store: Path,
    model: HFLanguageModel,
    settings: BuildSettings,
    progress: Progress,
    *,
    batch_tokens: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> BuildResult:
    """Build the datastore of ``inputs`` at ``store``, going on from where an earlier call was killed.

    ``batch_tokens``: tokens in one forward pass; it changes speed and memory, never a key (None: 2,048 on a CPU).
    Raises :class:`CorpusError`, :class:`NonFiniteKey`, :class:`StoreMismatch`, :class:`StoreLocked` and others.
    """
    settings.validate()
    corpus = Corpus(inputs, settings.split_documents)
    windowing = Windowing.for_context(model.context, settings.max_length, settings.stride)
    if settings.index != EXACT:
        import_faiss()
    with _locked(store):
        plan = _plan(corpus, model, settings, windowing)
        if (store / MANIFEST).exists():
            manifest = Manifest.read(store)
            check_files(store, manifest, verify=False)
            _require_same(json.loads((store / SETTINGS).read_text()), plan, f"{store} holds a datastore of another build")
            shutil.rmtree(store / BUILD_FOLDER, ignore_errors=True)
            return BuildResult(manifest, True, corpus.skipped, 0)
        build = _Build(store, model, settings, windowing, plan, batch_tokens or _default_batch(model))
        return build.run(corpus, progress, revision, trust_remote_code)


class _Meter:
    """Adds up what a stage has done."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0

    def advance(self, count: int) -> None:
        self._done += count
        self._progress.update(self._stage, self._done, self._total)


class _Build:
    """One run of the stages over one store."""

    def __init__(
        self, store: Path, model: HFLanguageModel, settings: BuildSettings, windowing: Windowing, plan: dict[str, Any], batch_tokens: int
    ) -> None:
        self._store, self._model, self._settings, self._windowing = store, model, settings, windowing
        self._plan, self._batch_tokens = plan, batch_tokens
        self._scratch = store / BUILD_FOLDER

    def run(self, corpus: Corpus, progress: Progress, revision: str | None, trust_remote_code: bool) -> BuildResult:
        self._claim()
        tokenizer = self._model.tokenizer(self._settings.bos, self._settings.eos)
        try:
            receipt = ingest(
                corpus, tokenizer, self._model.vocabulary_size, self._scratch, lambda done: progress.update("reading", done, None)
            )
            factory = self._factory(receipt.entries)
        except KNNLMError:
            # Nothing of worth was made yet, so the folder stays free for another corpus or index.
            shutil.rmtree(self._scratch)
            raise
        documents = DocumentTable([self._scratch / DOCUMENTS])
        stream = IngestedCorpus.open(self._scratch, pretokenized=corpus.pretokenized)
        receipts = self._encode(documents, stream, receipt, progress)
        self._index([r.facts for r in receipts], factory, progress)
        text = TextFacts(
            self._settings.bos, self._settings.eos, tokenizer.bos_id, tokenizer.eos_id, self._settings.split_documents, corpus.pretokenized
        )
        manifest = self._finish(receipts, receipt, text, revision, trust_remote_code)
        return BuildResult(manifest, False, corpus.skipped, receipt.empty)

    def _claim(self) -> None:
        """Note the settings on a new store, or compare them with those of the build that was interrupted."""
        path = self._scratch / SETTINGS
        if path.exists():
            _require_same(
                json.loads(path.read_text()), self._plan, f"{self._store} holds an unfinished build, to be removed if it is not wanted"
            )
            return
        others = [entry.name for entry in self._store.iterdir() if entry.name != BUILD_FOLDER]
        if others:
            raise StoreError(
                f"{self._store} is not empty and no datastore (it holds {', '.join(sorted(others)[:3])}); choose another --store."
            )
        self._scratch.mkdir(exist_ok=True)
        write_atomically(path, _json(self._plan))

    def _encode(self, documents: DocumentTable, stream: IngestedCorpus, corpus: CorpusReceipt, progress: Progress) -> list[ShardReceipt]:
        receipts = []
        meter = _Meter(progress, "encoding", corpus.entries)
        (self._store / "shards").mkdir(exist_ok=True)
        for facts in plan_shards(documents, self._windowing, self._settings.shard_tokens):
            folder = self._store / "shards" / facts.name
            receipt = read_receipt(folder)
            if receipt is None:
                descriptor = ShardDescriptor(facts, self._windowing, self._settings.keys)
                receipt = build_shard(
                    descriptor, stream, documents, self._model, folder,
                    batch_tokens=self._batch_tokens, dtype=self._model.dtype, progress=meter.advance,
                )  # fmt: skip
            else:
                meter.advance(facts.entries)
            receipts.append(receipt)
        return receipts

    def _factory(self, entries: int) -> str:
        """The index to build, known to be possible before the model runs."""
        dimension, factory = self._model.key_dimension, self._settings.index
        if factory == "auto":
            factory = choose_factory(entries, dimension, gpu=self._model.device.type == "cuda")
        require_buildable(factory, dimension, entries)
        return factory

    def _index(self, shards: list[ShardFacts], factory: str, progress: Progress) -> None:
        folder = self._store / INDEX_FOLDER
        if folder.exists():
            return
        arrays = [np.load(self._store / "shards" / shard.name / KEYS, mmap_mode="c") for shard in shards]
        keys = ShardedRows(arrays, [shard.entry_start for shard in shards])
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        for stage, done, total in build_index(keys, self._model.key_dimension, factory, aside):
            progress.update(stage, done, total)
        aside.rename(folder)
        sync_folder(folder.parent)

    def _finish(
        self, receipts: list[ShardReceipt], corpus: CorpusReceipt, text: TextFacts, revision: str | None, trust_remote_code: bool
    ) -> Manifest:
        table = self._store / DOCUMENT_TABLE
        table.parent.mkdir(exist_ok=True)
        write_atomically(table, (self._scratch / DOCUMENTS).read_bytes())
        write_atomically(self._store / SETTINGS, _json(self._plan))
        files: dict[str, FileFacts] = {DOCUMENT_TABLE: file_facts(table), SETTINGS: file_facts(self._store / SETTINGS)}
        for receipt in receipts:
            files |= {f"shards/{receipt.facts.name}/{name}": facts for name, facts in receipt.files.items()}
            files[f"shards/{receipt.facts.name}/{RECEIPT}"] = file_facts(self._store / "shards" / receipt.facts.name / RECEIPT)
        for path in sorted((self._store / INDEX_FOLDER).iterdir()):
            files[f"{INDEX_FOLDER}/{path.name}"] = file_facts(path)
        model = self._model
        manifest = Manifest(
            knnlm_version=knnlm.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            model=ModelFacts(model.name, revision, trust_remote_code, model.dtype, model.fingerprint, model.vocabulary_size),
            key=KeyFacts(model.key_layer, model.key_dimension, self._settings.keys),
            text=text,
            windowing=self._windowing,
            counts=Counts(corpus.documents, corpus.tokens, corpus.entries),
            shards=[receipt.facts for receipt in receipts],
            documents=[DOCUMENT_TABLE],
            next_serial=corpus.documents,
            index=INDEX_FOLDER,
            corpus_xxh3=self._plan["corpus"],
            files=files,
        )
        check_files(self._store, manifest, verify=False)
        manifest.write(self._store)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return manifest


def _plan(corpus: Corpus, model: HFLanguageModel, settings: BuildSettings, windowing: Windowing) -> dict[str, Any]:
    """Everything that the store's bytes depend on, flat, so that a difference can be named."""
    return {
        "corpus": corpus.digest(),
        **{f"model {part}": value for part, value in asdict(model.fingerprint).items()},
        "dtype": model.dtype,
        "key layer": f"{model.key_layer.kind} ({model.key_layer.module})",
        **asdict(settings),
        "max_length": windowing.max_length,
        "stride": windowing.stride,
    }


PLAN_NAMES = {"corpus": "the text (xxh3 of its content)"}


def _require_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    differences = [
        f"{PLAN_NAMES.get(name, name)} is {found.get(name)!r} there and {value!r} now"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise StoreMismatch(f"{what}: {'; '.join(differences)}. Choose another --store, or the same input and settings.")


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _default_batch(model: HFLanguageModel) -> int:
    return CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Hold the store's folder locked for one build. The system releases it when the process ends, however it ends."""
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; --store names a folder.")
    store.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(f"Another build is writing {store}; wait for it, or choose another --store.") from None
        yield
    finally:
        os.close(descriptor)
        # A build that was refused before it began leaves nothing behind; a folder that holds something stays.
        with suppress(OSError):
            store.rmdir()

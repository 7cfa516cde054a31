"""Building a datastore and appending to one: stages in order, each with a marker, the manifest last.

Killed anywhere, the same call goes on from the last finished shard and ends in the same bytes. Other settings or
another corpus against what is there already are refused, naming the difference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import knnlm
from knnlm.corpus import Corpus
from knnlm.datastore.audit import log_operation
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, write_atomically
from knnlm.datastore.manifest import Counts, KeyFacts, Manifest, ModelFacts, ShardFacts, TextFacts
from knnlm.datastore.reader import check_files, removed_serials
from knnlm.errors import CorpusError, KeyOverflow, KNNLMError, StoreMismatch
from knnlm.index import EXACT, import_faiss
from knnlm.model import LanguageModel
from knnlm.tokenization import TextTokenizer
from knnlm.windows import Windowing
from knnlm_index_builder.encode import ShardDescriptor, ShardReceipt, plan_shards, read_receipt
from knnlm_index_builder.index_stage import IndexStage
from knnlm_index_builder.ingest import DOCUMENTS, CorpusReceipt, IngestedCorpus, ingest, was_ingested
from knnlm_index_builder.plan import require_same
from knnlm_index_builder.progress import Meter, Progress
from knnlm_index_builder.search_stage import choose_search
from knnlm_index_builder.settings import BuildSettings, Resources, with_advice
from knnlm_index_builder.site import SETTINGS, Site, as_json, held, is_complete, next_name, now, shard_files

KEY_DTYPE = "key-dtype"


@dataclass(frozen=True)
class BuildResult:
    """``manifest`` of the store; ``already_complete`` if nothing had to be done; ``empty`` documents that had no token;
    ``warnings``: sentences for whoever ran the build."""

    manifest: Manifest
    already_complete: bool
    empty: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Work:
    """What is built: from which corpus, with which model and settings, at which site."""

    site: Site
    corpus: Corpus
    model: LanguageModel
    settings: BuildSettings
    windowing: Windowing
    resources: Resources
    progress: Progress
    tuning_text: Corpus | None


def build_datastore(
    inputs: Corpus | Sequence[str | Path], store: Path, model: LanguageModel, settings: BuildSettings, progress: Progress,
    resources: Resources | None = None,
    *, revision: str | None = None, trust_remote_code: bool = False, tuning_text: Corpus | None = None,
) -> BuildResult:  # fmt: skip
    """Build the datastore of ``inputs`` (a corpus, or paths) at ``store``, going on from where an earlier call was killed.

    ``tuning_text``: held-out text on which search settings are chosen (None: on stored entries). Raises
    :class:`CorpusError`, :class:`NonFiniteKey`, :class:`StoreMismatch`, :class:`StoreLocked` and others.
    """
    settings.validate()
    corpus = inputs if isinstance(inputs, Corpus) else Corpus(inputs, settings.split_documents)
    resources = resources or Resources()
    windowing = Windowing.for_context(model.context, settings.max_length, settings.stride)
    if settings.index != EXACT:
        import_faiss()
    with held(store):
        plan = {"operation": "build", **settings.plan(model, windowing)}
        if tuning_text is not None:
            plan["text"] = tuning_text.read_digest()
        if is_complete(store):
            return _complete(store, corpus, plan)
        site = Site(store)
        site.claim(plan)
        facts = ModelFacts(model.name, revision, trust_remote_code, model.dtype, model.fingerprint, model.vocabulary_size)
        extension = _Extension(_Work(site, corpus, model, settings, windowing, resources, progress, tuning_text))
        return extension.run(lambda made: _first_manifest(made, facts, plan))


def append_documents(
    corpus: Corpus, store: Path, model: LanguageModel, progress: Progress, resources: Resources | None = None,
    *, tuning_text: Corpus | None = None,
) -> BuildResult:  # fmt: skip
    """Add the documents of ``corpus`` to a complete store: new shards, and the index with their entries; no rebuild.

    ``model`` must be the store's; all settings come from there. Killed anywhere, the same call goes on, and until it is
    done every reader sees the store as it was. Raises :class:`CorpusError` for a document whose id is there already.
    """
    with held(store):
        base = Manifest.read(store)
        check_files(store, base, verify=False)
        base.require_model(model)
        if model.dtype != base.model.dtype:
            raise StoreMismatch(f"The keys of {store} were computed in {base.model.dtype}, but the model computes in {model.dtype}.")
        site = Site(store, base)
        settings = settings_of(store, base)
        require_same_kind(corpus, store, base)
        digest = corpus.read_digest()
        if digest in base.appended:
            if site.begun() is None:
                site.clean_up(base)
            return BuildResult(base, True)
        plan = {"operation": "append", "corpus": digest, "documents": base.documents, "entries": base.counts.entries, "index": base.index}
        site.claim(plan)
        work = _Work(site, corpus, model, settings, base.windowing, resources or Resources(), progress, tuning_text)
        return _Extension(work).run(lambda made: _next_manifest(made, base, store))


def settings_of(store: Path, base: Manifest) -> BuildSettings:
    """Those that the store of the manifest ``base`` was built with; what is appended to it is made with them."""
    known = json.loads((store / SETTINGS).read_bytes())
    return BuildSettings(
        index=known["index"], keys=base.key.dtype, max_length=base.windowing.max_length,
        stride=base.windowing.stride, bos=base.text.bos, eos=base.text.eos,  # type: ignore[arg-type]
        split_documents=base.text.split_documents, shard_tokens=known["shard_tokens"],
    )  # fmt: skip


def require_same_kind(corpus: Corpus, store: Path, base: Manifest) -> None:
    """Raise :class:`StoreMismatch` for text that would be appended to token arrays, or the other way round."""
    if corpus.pretokenized != base.text.pretokenized:
        kinds = ("text", "token arrays")
        raise StoreMismatch(
            f"{store} holds {kinds[base.text.pretokenized]}, but the input is {kinds[corpus.pretokenized]}; build another datastore of it."
        )


def _complete(store: Path, corpus: Corpus, plan: dict[str, Any]) -> BuildResult:
    """Nothing to do, if the store is what was asked for."""
    manifest = Manifest.read(store)
    check_files(store, manifest, verify=False)
    site = Site(store, manifest)
    found = {"operation": "build", "on_overflow": "stop", **json.loads((store / SETTINGS).read_bytes())}
    require_same(found, {"corpus": corpus.read_digest(), **plan}, f"{store} holds a datastore of another build")
    if site.begun() is None:
        site.clean_up(manifest)
    return BuildResult(manifest, True)


@dataclass(frozen=True)
class _Made:
    """What an operation has made: new shards and files, and the facts that a manifest is written from."""

    work: _Work
    corpus: CorpusReceipt
    tokenizer: TextTokenizer
    shards: list[ShardReceipt]
    key_dtype: str
    segment: str
    index: str
    files: dict[str, FileFacts]


class _Extension:
    """One run of the stages: everything that a corpus adds to what a store holds, which may be nothing."""

    def __init__(self, work: _Work) -> None:
        self._work, self._site, base = work, work.site, work.site.base
        self._scratch = work.site.scratch
        self._documents_before = base.documents if base else []
        self._tokens_before = base.counts.tokens if base else 0
        self._serial = base.next_serial if base else 0

    def run(self, manifest_of: Callable[[_Made], Manifest]) -> BuildResult:
        """Read, encode, index, measure, commit."""
        work, store = self._work, self._site.store
        tokenizer = work.model.tokenizer(work.settings.bos, work.settings.eos)
        receipt, index = self._read(tokenizer)
        shards, key_dtype = self._encode_and_fall_back(index, receipt)
        index.build(shards)
        segment = f"documents/{next_name(self._documents_before[-1] if self._documents_before else None)}.arrow"
        self._site.place(self._scratch / DOCUMENTS, segment)
        files = {segment: file_facts(store / segment), **shard_files(shards, store), **index.files()}
        manifest = manifest_of(_Made(work, receipt, tokenizer, shards, key_dtype, segment, index.name, files))
        manifest = choose_search(self._site, manifest, index, work.progress, model=work.model, text=work.tuning_text)
        check_files(store, manifest, verify=False)
        self._site.commit(manifest)
        return BuildResult(manifest, False, receipt.empty, tuple(index.warnings))

    def _read(self, tokenizer: TextTokenizer) -> tuple[CorpusReceipt, IndexStage]:
        work, site = self._work, self._site
        anew = not was_ingested(self._scratch)
        try:
            receipt = ingest(
                work.corpus, tokenizer, work.model.vocabulary_size, self._scratch, work.progress.update,
                first_token=self._tokens_before, first_serial=self._serial,
            )  # fmt: skip
            self._paths = (*(site.store / name for name in self._documents_before), self._scratch / DOCUMENTS)
            self._stream = IngestedCorpus(self._scratch, self._tokens_before, work.corpus.pretokenized)
            self._documents = DocumentTable(self._paths)
            self._require_new_ids(self._documents)
            entries = receipt.entries + (site.base.counts.entries if site.base else 0)
            index = IndexStage(
                site, work.settings.index, work.model.key_dimension, entries, work.resources, work.progress,
                keys_stored=work.settings.keys != "none", part_entries=work.settings.shard_tokens, device=str(work.model.device),
                extends=site.base is not None,
            )  # fmt: skip
            index.require_possible()
        except KNNLMError:
            # Where nothing of worth was made yet, the folder stays free for another corpus or index.
            if anew:
                site.abandon()
            raise
        return receipt, index

    def _require_new_ids(self, documents: DocumentTable) -> None:
        """An id names one document that is not removed."""
        base = self._site.base
        if base is None:
            return
        clash = documents.clash(base.counts.documents, removed_serials(self._site.store, base))
        if clash is not None:
            raise CorpusError(
                f"The document id {clash!r} is in {self._site.store} already; remove it first (knnlm remove), or leave it out."
            )

    def _encode_and_fall_back(self, index: IndexStage, receipt: CorpusReceipt) -> tuple[list[ShardReceipt], str]:
        """Shards, and the dtype of their keys: the one asked for, unless a key overflowed and another was allowed."""
        settings, marker = self._work.settings, self._scratch / KEY_DTYPE
        key_dtype = marker.read_text() if marker.exists() else settings.keys
        try:
            return self._encode(index, key_dtype, receipt), key_dtype
        except KeyOverflow as overflow:
            if settings.on_overflow == "stop":
                raise with_advice(overflow, self._site.store if self._site.base else None) from None
        write_atomically(marker, settings.on_overflow.encode())
        return self._encode(index, settings.on_overflow, receipt), settings.on_overflow

    def _encode(self, index: IndexStage, key_dtype: str, corpus: CorpusReceipt) -> list[ShardReceipt]:
        work, folder = self._work, self._site.store / "shards"
        trained = None
        if key_dtype == "none":
            trained = index.train_before_encoding(self._stream, self._documents, work.windowing, work.model)
        meter = Meter(work.progress, "encoding", corpus.entries)
        receipts, missing = [], []
        folder.mkdir(exist_ok=True)
        for facts in self._planned():
            receipt = read_receipt(folder / facts.name)
            if receipt is not None and receipt.key_dtype == key_dtype and (trained is None or index.part(facts).exists()):
                receipts.append(receipt)
                meter.advance(facts.entries)
                continue
            shutil.rmtree(folder / facts.name, ignore_errors=True)
            missing.append(
                ShardDescriptor(
                    facts,
                    self._stream,
                    self._paths,
                    folder / facts.name,
                    work.windowing,
                    key_dtype,
                    work.resources.batch(work.model),
                    trained,
                    index.part(facts) if trained else None,
                )
            )  # fmt: skip
        receipts += work.resources.executor_for(work.model).run(missing, meter.advance)
        return sorted(receipts, key=lambda receipt: receipt.facts.token_start)

    def _planned(self) -> list[ShardFacts]:
        base, work = self._site.base, self._work
        first = 1 + max(int(shard.name) for shard in base.shards) if base else 0
        return plan_shards(self._documents, work.windowing, work.settings.shard_tokens, self._tokens_before, first)


def _first_manifest(made: _Made, model: ModelFacts, plan: dict[str, Any]) -> Manifest:
    """Of a new store."""
    work, store, tokenizer = made.work, made.work.site.store, made.tokenizer
    write_atomically(store / SETTINGS, as_json({"corpus": made.corpus.digest, **plan}))
    text = TextFacts(
        work.settings.bos, work.settings.eos, tokenizer.bos_id, tokenizer.eos_id, work.settings.split_documents, work.corpus.pretokenized
    )
    return Manifest(
        knnlm_version=knnlm.__version__,
        created=now(),
        model=model,
        key=KeyFacts(work.model.key_layer, work.model.key_dimension, made.key_dtype),
        text=text,
        windowing=work.windowing,
        counts=Counts(made.corpus.documents, made.corpus.tokens, made.corpus.entries),
        shards=[receipt.facts for receipt in made.shards],
        documents=[made.segment],
        next_serial=made.corpus.documents,
        index=made.index,
        corpus_xxh3=made.corpus.digest,
        files={SETTINGS: file_facts(store / SETTINGS), **made.files},
    )


def _next_manifest(made: _Made, base: Manifest, store: Path) -> Manifest:
    """Of a store that was appended to."""
    counts, new = base.counts, made.corpus
    gone = (f"{base.index}/", base.search or f"{base.index}/")
    audit = log_operation(store, base, "append", corpus_xxh3=new.digest, documents=new.documents, entries=new.entries)
    return replace(
        base,
        knnlm_version=knnlm.__version__,
        created=now(),
        counts=Counts(counts.documents + new.documents, counts.tokens + new.tokens, counts.entries + new.entries),
        shards=[*base.shards, *(receipt.facts for receipt in made.shards)],
        documents=[*base.documents, made.segment],
        next_serial=base.next_serial + new.documents,
        index=made.index,
        search=None,
        audit=audit,
        appended=[*base.appended, new.digest],
        files={**{name: facts for name, facts in base.files.items() if not name.startswith(gone)}, **made.files},
    )

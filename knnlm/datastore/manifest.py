"""The manifest: every fact about a datastore, in one JSON file that is written last and checks itself.

Knows the format's names and versions, not what lies in the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from knnlm.datastore.files import FileFacts, checksum, read_json_with_checksum, write_json_with_checksum
from knnlm.datastore.parsing import parse, parse_value
from knnlm.errors import StoreDamaged, StoreIncomplete, StoreMismatch, StoreNotFound, StoreVersion
from knnlm.model import KeyLayer, LanguageModel, ModelFingerprint
from knnlm.windows import Windowing

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
BUILD_FOLDER = ".build"
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features a store may require of its reader beyond its format version; this reader knows none yet."""


@dataclass(frozen=True)
class ModelFacts:
    """The base LM: where it was loaded from, and what it is. ``dtype``: in what the keys were computed."""

    name: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    fingerprint: ModelFingerprint
    vocabulary_size: int


@dataclass(frozen=True)
class KeyFacts:
    """What a key is: layer, width, and the dtype in which it is stored (``none``: not stored, so distances come from
    the index)."""

    layer: KeyLayer
    dimension: int
    dtype: str

    @property
    def stored(self) -> bool:
        """Whether keys are in the store."""
        return self.dtype != "none"

    @property
    def distance(self) -> str:
        """The kind of its distances: ``exact``, measured from the stored keys, or ``index``, the index's own."""
        return "exact" if self.stored else "index"


@dataclass(frozen=True)
class TextFacts:
    """How text became tokens.

    ``bos``: auto, yes or no; ``eos``: whether documents end with one; ``bos_id``/``eos_id``: what was added (None:
    nothing). ``split_documents``: the regular expression that cut files, if any. ``pretokenized``: the input was token
    ids, so there are no character spans."""

    bos: str
    eos: bool
    bos_id: int | None
    eos_id: int | None
    split_documents: str | None
    pretokenized: bool


@dataclass(frozen=True)
class Counts:
    """What is in the files, removed documents included. ``entries`` = ``tokens`` - ``documents``: each token but the
    first of a document is a value once."""

    documents: int
    tokens: int
    entries: int


@dataclass(frozen=True)
class ShardFacts:
    """A shard holds corpus tokens [token_start, token_start + tokens) and the entries of those that are values."""

    name: str
    token_start: int
    tokens: int
    entry_start: int
    entries: int


@dataclass(frozen=True)
class RemovedFacts:
    """Tombstones: the file of removed serials, and how many documents and entries they are."""

    file: str
    documents: int
    entries: int


@dataclass(frozen=True)
class Manifest:
    """All facts of a datastore; :meth:`read` and :meth:`write` it.

    ``documents``: segments of the document table in order; ``next_serial``: of the next document, never given twice;
    ``index``: folder of the index, ``search`` the file with its measured settings; ``removed``: tombstones; ``audit``: of
    the audit log as far as it was written when this manifest was. ``corpus_xxh3``: of the first input, by content;
    ``appended``: of those that were appended since.
    """

    knnlm_version: str
    created: str
    model: ModelFacts
    key: KeyFacts
    text: TextFacts
    windowing: Windowing
    counts: Counts
    shards: list[ShardFacts]
    documents: list[str]
    next_serial: int
    index: str
    corpus_xxh3: str
    files: dict[str, FileFacts]
    search: str | None = None
    removed: RemovedFacts | None = None
    audit: FileFacts | None = None
    appended: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    requires: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """xxh3 over everything but the time of creation, the audit log and how shards were made: equal for equal stores."""
        files = {name: facts for name, facts in asdict(self)["files"].items() if Path(name).name != RECEIPT}
        return checksum({**asdict(self), "created": "", "audit": None, "files": files})

    @property
    def live_documents(self) -> int:
        """Documents that are not removed."""
        return self.counts.documents - (self.removed.documents if self.removed else 0)

    @property
    def live_entries(self) -> int:
        """Entries that are not removed."""
        return self.counts.entries - (self.removed.entries if self.removed else 0)

    def write(self, store: Path) -> None:
        """Write ``manifest.json`` atomically, in the newest format, with a checksum over itself."""
        write_json_with_checksum(store / MANIFEST, asdict(replace(self, format_version=FORMAT_VERSION)))

    @classmethod
    def read(cls, store: Path) -> Manifest:
        """Read and check the manifest of the datastore at ``store``.

        Raises :class:`StoreNotFound`, :class:`StoreIncomplete`, :class:`StoreDamaged` or :class:`StoreVersion`.
        """
        path = store / MANIFEST
        if not store.is_dir():
            raise StoreNotFound(
                f"There is no datastore at {store}: no such folder. Build one with: knnlm build TEXT --model MODEL --store {store}"
            )
        if not path.exists():
            if (store / BUILD_FOLDER).exists():
                raise StoreIncomplete(
                    f"The datastore {store} is incomplete: its build was interrupted. Run the same knnlm build command again."
                )
            raise StoreNotFound(f"{store} is no datastore: it holds no {MANIFEST}.")
        content = read_json_with_checksum(path)
        version = content.get("format_version")
        if type(version) is not int or version not in (1, FORMAT_VERSION):
            raise StoreVersion(
                f"{path} has format version {version}, but this knnlm reads versions 1 to {FORMAT_VERSION}; "
                "use the version that wrote it, or newer."
            )
        required = parse_value(list[str], content.get("requires", []), f"{path}: requires")
        if unknown := sorted(set(required) - KNOWN_FEATURES):
            raise StoreVersion(f"{path} requires {', '.join(unknown)}, which this knnlm does not know; use a newer version.")
        found = parse(cls, _from_version_1(content, path) if version == 1 else content, str(path))
        for name in found._paths():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not PurePath(name).parts:
                raise StoreDamaged(f"{path} is damaged: it names {name!r}, which is no place in the datastore.")
        return found

    def _paths(self) -> Iterator[str]:
        """Every place that it names, relative to the datastore: what is read, and what is copied elsewhere."""
        yield from self.files
        yield from (shard.name for shard in self.shards)
        yield from (*self.documents, self.index)
        if self.search is not None:
            yield self.search
        if self.removed is not None:
            yield self.removed.file

    def require_model(self, model: LanguageModel) -> None:
        """Raise :class:`StoreMismatch` if ``model`` is not the one that made the keys, naming both sides."""
        for part in ("configuration", "tokenizer", "weights"):
            expected, found = getattr(self.model.fingerprint, part), getattr(model.fingerprint, part)
            if expected != found:
                raise StoreMismatch(
                    f"The datastore was built with {self.model.name} ({part} {expected[:12]}), but {model.name} has another "
                    f"{part} ({found[:12]}). Load the model it was built with (--model PATH if it was moved)."
                )
        if self.key.layer != model.key_layer or self.key.dimension != model.key_dimension:
            raise StoreMismatch(
                f"The datastore's keys are {_layer(self.key.layer)} of width {self.key.dimension}, "
                f"but the model gives {_layer(model.key_layer)} of width {model.key_dimension}."
            )


def _from_version_1(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Facts of a version 1 store as version 2 says them: one document table, serials in row order, nothing removed."""
    counts = parse(Counts, content.get("counts"), f"{path}: counts")
    return {
        **content,
        "documents": [content.get("documents")],
        "next_serial": counts.documents,
        "search": None,
        "removed": None,
        "audit": None,
        "appended": [],
    }


def _layer(layer: KeyLayer) -> str:
    return f"{layer.kind} ({layer.module})"

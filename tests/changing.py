"""What tests of operations that change a store share: documents by id, all that a store holds as plain arrays, and proofs
that it is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnlm.corpus import Corpus
from knnlm.datastore.checking import store_problems
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.index import open_index
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchSettings
from knnlm_index_builder.compaction import CompactionResult, compact
from knnlm_index_builder.pipeline import BuildResult, append_documents
from knnlm_index_builder.settings import Resources
from tests.fake_model import FakeModel
from tests.stores import Silent, build

Array = np.ndarray[Any, np.dtype[Any]]


@cache
def fake() -> FakeModel:
    """The fake model, made once."""
    return FakeModel()


def documents_file(path: Path, documents: Mapping[str, str], **metadata: object) -> Path:
    """JSON lines of documents by id, each with ``metadata`` in which ``{}`` stands for the id."""
    lines = []
    for name, text in documents.items():
        fields = {key: value.format(name) if isinstance(value, str) else value for key, value in metadata.items()}
        lines.append(json.dumps({"id": name, "text": text, **fields}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def built(inputs: Path | Sequence[Path], store: Path, **settings: Any) -> BuildResult:
    """A build with the fake model."""
    return build(inputs, store, fake(), **settings)  # type: ignore[arg-type]


def append(inputs: Path | Sequence[Path], store: Path, model: Any = None, **resources: Any) -> BuildResult:
    """An append, with the fake model if no other is named."""
    paths = [inputs] if isinstance(inputs, Path) else list(inputs)
    return append_documents(Corpus(paths), store, model or fake(), Silent(), Resources(**resources))


def compacted(store: Path, index: str | None = None) -> CompactionResult:
    """A compaction."""
    return compact(store, Silent(), Resources(), index)


def problems(store: Path) -> list[str]:
    """What ``knnlm verify`` finds."""
    return list(store_problems(store, Manifest.read(store), lambda *_: None))


@dataclass(frozen=True)
class Held:
    """A store's shards, read with numpy alone and joined; ``keys`` and ``spans`` are None where there are none."""

    keys: Array | None
    values: Array
    tokens: Array
    spans: Array | None

    @classmethod
    def of(cls, store: Path) -> Held:
        folders = [store / "shards" / shard["name"] for shard in json.loads((store / "manifest.json").read_text())["shards"]]

        def joined(name: str) -> Array | None:
            return np.concatenate([np.load(folder / name) for folder in folders]) if (folders[0] / name).exists() else None

        values, tokens = joined("values.npy"), joined("tokens.npy")
        assert values is not None
        assert tokens is not None
        return cls(joined("keys.npy"), values, tokens, joined("spans.npy"))

    def require_equal(self, other: Held) -> None:
        """Bit by bit, dtypes too."""
        for name in ("keys", "values", "tokens", "spans"):
            mine, its = getattr(self, name), getattr(other, name)
            assert (mine is None) == (its is None), name
            if mine is not None:
                assert mine.dtype == its.dtype, name
                np.testing.assert_array_equal(mine, its, err_msg=name)


def table_of(store: Path) -> list[dict[str, Any]]:
    """The document table without serials."""
    documents = Datastore.open(store).documents
    return [{**documents[number].__dict__, "serial": None} for number in range(len(documents))]


def looking_everywhere(store: Datastore) -> Retriever:
    """A retriever of the open ``store`` that looks into every cell of its index, and knows of removals when the store does."""
    index = open_index(store.path / store.manifest.index, store.keys, len(store))
    return Retriever(index, store.keys, store.values, SearchSettings.fixed(index.nlist, len(store), index.nlist, 4.0), store.allowed)


def search_all(store: Datastore, queries: Array, k: int) -> Neighbors:
    """Neighbours of ``queries`` [n, dimension] in every cell of the index."""
    return looking_everywhere(store).retrieve(torch.from_numpy(queries.astype(np.float32)), k)


def require_provenance(store: Path, texts: Mapping[str, str]) -> None:
    """The characters of each live entry's span, in its document's text, are its value token; so is its left context."""
    opened, tokenizer = Datastore.open(store), fake()._tokenizer
    removed = set(opened.tombstones.documents.tolist())
    for number in range(len(opened.documents)):
        if number in removed:
            continue
        first, last = opened.documents.entry_range(number)
        ids = [opened.evidence(entry).token_id for entry in range(first, last)]
        text, at = texts[opened.documents[number].id], 0
        for entry, token in zip(range(first, last), ids, strict=True):
            evidence = opened.evidence(entry)
            assert evidence.document.id == opened.documents[number].id
            assert evidence.characters is not None
            start, stop = evidence.characters
            # A character of several bytes may be several tokens.
            assert token_bytes(tokenizer.convert_ids_to_tokens(token)) in text[start:stop].encode()
            assert start >= at
            assert evidence.line == text[:start].count("\n") + 1
            before = [int(opened.tokens.slice(opened.documents[number].token_start, opened.documents[number].token_start + 1)[0]), *ids]
            assert evidence.left_context == before[max(0, entry - first + 1 - 24) : entry - first + 1]
            at = start


def token_bytes(token: str) -> bytes:
    """What a byte-level token stands for: printable bytes as they are, the others from U+0100 on in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    meaning = {**{chr(byte): byte for byte in printable}, **{chr(256 + place): byte for place, byte in enumerate(others)}}
    return bytes(meaning[character] for character in token)


def files_with(store: Path, content: bytes) -> list[str]:
    """Names of the files in the store's folder that hold these bytes anywhere."""
    assert content
    return [path.relative_to(store).as_posix() for path in _files(store) if content in path.read_bytes()]


def _files(store: Path) -> Iterator[Path]:
    return (path for path in sorted(store.rglob("*")) if path.is_file())

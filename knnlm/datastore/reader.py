"""Reading a datastore: checked on opening, memory-mapped, from entry to key, value and evidence.

Knows the files of a store; knows no model, no search and no mixing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.arrays import map_array
from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.documents import DocumentRecord, DocumentTable
from knnlm.datastore.files import FileFacts, file_facts
from knnlm.datastore.manifest import MANIFEST, Manifest, ShardFacts
from knnlm.datastore.profile import Profile
from knnlm.datastore.search_file import read_search
from knnlm.datastore.tombstones import Serials, Tombstones, read_serials
from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput, StoreDamaged

KEYS, VALUES, TOKENS, SPANS = "keys.npy", "values.npy", "tokens.npy", "spans.npy"
LEFT_CONTEXT_TOKENS = 24

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Evidence:
    """Where an entry came from.

    ``token_id``: its value. ``characters``: [start, end) of that token in the document's text, and ``line`` counted
    from 1; both None where the store was built from token ids. ``left_context``: up to 24 token ids before it.
    """

    entry: int
    token_id: int
    document: DocumentRecord
    characters: tuple[int, int] | None
    line: int | None
    left_context: list[int]


class ShardedRows:
    """Rows of several memory-mapped arrays, numbered through. ``gather`` reads any of them."""

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], starts: Sequence[int]) -> None:
        self._arrays = list(arrays)
        self._tensors = [torch.from_numpy(array) for array in arrays]
        self._starts = torch.tensor(list(starts), dtype=torch.int64)
        self.length = int(starts[-1]) + len(arrays[-1])

    def __len__(self) -> int:
        return self.length

    def gather(self, rows: Tensor) -> Tensor:
        """Rows by number [m] int64, in that order: [m, …] in the stored dtype."""
        if len(self._tensors) == 1:
            return self._tensors[0].index_select(0, rows)
        # By NumPy, which takes a third of the time that torch's indexing takes for a few thousand rows.
        numbers, starts = rows.numpy(), self._starts.numpy()
        shards = np.searchsorted(starts, numbers, side="right") - 1
        out = np.empty((len(numbers), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        for shard in np.flatnonzero(np.bincount(shards)):
            chosen = np.flatnonzero(shards == shard)
            out[chosen] = self._arrays[shard].take(numbers[chosen] - starts[shard], axis=0)
        return torch.from_numpy(out)

    def slice(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): a view where they lie in one shard."""
        first = int(torch.searchsorted(self._starts, start, right=True)) - 1
        offset = start - int(self._starts[first])
        if stop - int(self._starts[first]) <= len(self._tensors[first]):
            return self._tensors[first][offset : offset + stop - start]
        return self.gather(torch.arange(start, stop))

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in pieces of at most ``rows``, none across shards: (number of the first row, piece)."""
        for start, tensor in zip(self._starts.tolist(), self._tensors, strict=True):
            for offset in range(0, len(tensor), rows):
                yield start + offset, tensor[offset : offset + rows]


class Datastore:
    """An open datastore. Use :meth:`open`.

    ``keys`` [entries, dimension] float16 or float32 (None: not stored), ``values`` [entries] int32, ``tokens`` [tokens]
    int32 and ``spans`` [tokens, 2] uint32 (None: built from token arrays) are memory-mapped; ``documents`` is the table of
    where they came from; ``tombstones`` say which of those were removed. Numbers of entries and documents count removed
    ones too. ``profile``: the calibrated mixture, ``search``: the measured search settings, each None if there are none.
    """

    def __init__(self, path: Path, manifest: Manifest, signature: Signature) -> None:
        self.path = path
        self.manifest = manifest
        self._signature = signature
        self.profile = Profile.read(path)
        self.search = read_search(path, manifest)
        self.documents = DocumentTable([path / name for name in manifest.documents])
        counts, shards = manifest.counts, manifest.shards
        if len(self.documents) != counts.documents or int(self.documents.token_counts.sum()) != counts.tokens:
            raise StoreDamaged(
                f"{path}: {', '.join(manifest.documents)} hold {len(self.documents)} documents, but the manifest says {counts.documents}."
            )
        entry_starts, token_starts = [s.entry_start for s in shards], [s.token_start for s in shards]
        self.keys = None
        if manifest.key.stored:
            key_dtype = np.dtype(manifest.key.dtype)
            self.keys = ShardedRows(self._arrays(KEYS, key_dtype, lambda s: (s.entries, manifest.key.dimension)), entry_starts)
        self.values = ShardedRows(self._arrays(VALUES, np.dtype(np.int32), lambda s: (s.entries,)), entry_starts)
        self.tokens = ShardedRows(self._arrays(TOKENS, np.dtype(np.int32), lambda s: (s.tokens,)), token_starts)
        self.spans = None
        if not manifest.text.pretokenized:
            self.spans = ShardedRows(self._arrays(SPANS, np.dtype(np.uint32), lambda s: (s.tokens, 2)), token_starts)
        self.tombstones = Tombstones(self.documents, counts.entries, removed_serials(path, manifest))

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Datastore:
        """Open the datastore at ``path``; with ``verify``, read every file and compare its checksum first.

        Always checked: the manifest, that every file is there with its size, and the small files' checksums. Raises
        :class:`StoreNotFound`, :class:`StoreIncomplete`, :class:`StoreVersion` or :class:`StoreDamaged`, naming the file.
        """
        root = Path(path)
        while True:
            before = signature_of(root)
            manifest = Manifest.read(root)
            try:
                check_files(root, manifest, verify=verify)
                return cls(root, manifest, before)
            except StoreDamaged:
                # Another process may just have put a compacted store in the place of this one.
                if signature_of(root) == before:
                    raise

    def refresh(self) -> bool:
        """Take over what other processes removed since; True if anything changed. Costs one look at the manifest's time.

        After a compaction or an append this store stays as it was opened, less the documents that are no longer there.
        Raises the errors of a store that can't be read; what is open stays as it is then.
        """
        signature = signature_of(self.path)
        if signature == self._signature:
            return False
        removed = np.setdiff1d(self.documents.serials, _live_serials(self.path), assume_unique=True)
        changed = not np.array_equal(removed, self.tombstones.serials)
        if changed:
            self.tombstones = Tombstones(self.documents, len(self), removed)
        self._signature = signature
        return changed

    def allowed(self) -> EntryMask | None:
        """The entries that are not removed; None if none is. Asked by a :class:`~knnlm.retrieval.Retriever` at each search."""
        return self.tombstones.mask

    def __len__(self) -> int:
        return self.manifest.counts.entries

    def is_removed(self, entry: int) -> bool:
        """Whether an entry's document was removed; raises :class:`InvalidInput` for a number that no entry has."""
        if not 0 <= entry < len(self):
            raise InvalidInput("entry", f"is {entry}, but the datastore has entries 0 to {len(self) - 1}.")
        mask = self.allowed()
        return mask is not None and not bool(mask.allows(torch.tensor(entry)))

    def evidence(self, entry: int) -> Evidence:
        """Document, character span, line and left context of an entry, in O(log documents).

        Raises :class:`InvalidInput` for a number that no entry has, or one whose document was removed.
        """
        if self.is_removed(entry):
            raise InvalidInput("entry", f"is {entry}, whose document was removed.")
        number = self.documents.of_entry(entry)
        document = self.documents[number]
        position = self.documents.position_of_entry(entry)
        start = max(document.token_start, position - LEFT_CONTEXT_TOKENS)
        characters = line = None
        if self.spans is not None:
            first, last = self.spans.slice(position, position + 1)[0].tolist()
            characters = (first, last)
            line = document.line_of(first)
        return Evidence(
            entry, int(self.values.slice(entry, entry + 1)[0]), document, characters, line, self.tokens.slice(start, position).tolist()
        )

    def left_contexts(self, entries: Tensor, length: int) -> Tensor:
        """The ``length`` tokens before the value of each of ``entries`` [m], in its document: [m, length] int64, -1 before its
        first token. Removed entries are not refused."""
        numbers = entries.numpy()
        documents = self.documents.of_entries(numbers)
        positions = torch.from_numpy((numbers + documents + 1)[:, None]) + torch.arange(-length, 0)
        first = torch.from_numpy(self.documents.token_starts[documents])[:, None]
        tokens = self.tokens.gather(positions.clamp(min=0).flatten()).view(positions.shape).long()
        return torch.where(positions >= first, tokens, -1)

    def live_token_ranges(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the token stream between removed documents, in order."""
        table, gone = self.documents, self.tombstones.documents
        starts = [0, *(table.token_starts[gone] + table.token_counts[gone]).tolist()]
        stops = [*table.token_starts[gone].tolist(), len(self.tokens)]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]

    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(facts.bytes for facts in self.manifest.files.values())

    def _arrays(self, name: str, dtype: np.dtype[Any], shape: Callable[[ShardFacts], tuple[int, ...]]) -> list[np.ndarray[Any, Any]]:
        arrays = []
        for shard in self.manifest.shards:
            path = self.path / "shards" / shard.name / name
            try:
                # Copy-on-write, so that torch takes it without a warning; nothing ever writes to it.
                array = map_array(path, "c")
            except ValueError as error:
                raise StoreDamaged(f"{path} is damaged: {error}") from error
            if array.dtype != dtype or array.shape != shape(shard):
                raise StoreDamaged(f"{path} is {array.dtype}{list(array.shape)}, but the manifest says {dtype}{list(shape(shard))}.")
            arrays.append(array)
        return arrays


def removed_serials(root: Path, manifest: Manifest) -> Serials:
    """Serials of the documents that ``manifest`` says are removed, ascending."""
    if manifest.removed is None:
        return np.zeros(0, np.int64)
    return read_serials(root / manifest.removed.file)


def _live_serials(root: Path) -> Serials:
    """Serials of the documents that the store at ``root`` holds now and that are not removed."""
    while True:
        before = signature_of(root)
        manifest = Manifest.read(root)
        try:
            table = DocumentTable([root / name for name in manifest.documents])
            return np.setdiff1d(table.serials, removed_serials(root, manifest), assume_unique=True)
        except StoreDamaged:
            if signature_of(root) == before:
                raise


def signature_of(root: Path) -> Signature:
    """Changes when the manifest is replaced; zeros where there is none."""
    try:
        found = (root / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size


LARGE_FILES = frozenset({KEYS, VALUES, TOKENS, SPANS, "index.faiss"})


def check_files(root: Path, manifest: Manifest, *, verify: bool) -> None:
    """Raise :class:`StoreDamaged` for the first file that is missing or has another size or content, or a bad profile.

    Without ``verify``, the content of the large files (keys, values, tokens, spans, codes) is not read.
    """
    for name, expected in manifest.files.items():
        _check_file(root / name, expected, content=verify or Path(name).name not in LARGE_FILES)
    _check_audit(root, manifest, content=verify)
    Profile.read(root)


def damaged_files(root: Path, manifest: Manifest, progress: Callable[[int], None]) -> Iterator[str]:
    """One sentence for each file that is missing, has another size, or another content than the manifest says.

    ``progress`` is called with the bytes of the files read so far.
    """
    done = 0
    for name, expected in manifest.files.items():
        try:
            _check_file(root / name, expected, content=True)
        except StoreDamaged as damage:
            yield str(damage)
        done += expected.bytes
        progress(done)
    try:
        _check_audit(root, manifest, content=True)
    except StoreDamaged as damage:
        yield str(damage)


def _check_audit(root: Path, manifest: Manifest, *, content: bool) -> None:
    """The log may have grown since the manifest was written, but what it said then it must say now."""
    if manifest.audit is None:
        return
    path, expected = root / AUDIT_LOG, manifest.audit
    if not path.is_file() or path.stat().st_size < expected.bytes:
        raise StoreDamaged(f"{path} is missing or shorter than the {expected.bytes} bytes that the manifest says.")
    if content and file_facts(path, expected.bytes) != expected:
        raise StoreDamaged(f"{path} is damaged: what it said when the manifest was written has changed.")


def _check_file(path: Path, expected: FileFacts, *, content: bool) -> None:
    if not path.is_file():
        raise StoreDamaged(f"{path} is missing; the manifest lists it with {expected.bytes} bytes.")
    if (size := path.stat().st_size) != expected.bytes:
        raise StoreDamaged(f"{path} has {size} bytes, but the manifest says {expected.bytes}: it was truncated or replaced.")
    if content and (found := file_facts(path)) != expected:
        raise StoreDamaged(f"{path} is damaged: its content gives xxh3 {found.xxh3}, but the manifest says {expected.xxh3}.")

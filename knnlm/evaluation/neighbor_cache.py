"""Search once, tune everything: what one pass of LM and search found for every token of a text, kept in files.

Per token: the LM's log-probability, entropy, largest probability and rank of the target. Per neighbour, at the largest
k: distance, token, entry and the LM's log-probability of that token. Whatever is asked afterwards (fewer neighbours,
another temperature, weight or gate, the mixture's most probable token) needs neither model nor index. The folder
belongs to one text, one datastore, one model: anything else is refused. Files are written batch by batch, so memory is
that of a batch; at k = 1024 a token takes 20 KiB of disk.

A cache of shuffled contexts answers each position with what another one found, measured again from the position's own
query: what a search would return of a datastore that holds nothing but that. It shows a gate a datastore that is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from knnlm.arrays import map_array, write_header
from knnlm.datastore.files import made_aside, read_json_with_checksum, write_json_with_checksum
from knnlm.errors import CorpusError, StoreDamaged, StoreMismatch
from knnlm.evaluation.scoring import ReadBatch, read
from knnlm.following import FOLLOWED_NEIGHBORS, followed_by_each
from knnlm.gate import LMSummary
from knnlm.neighbors import Neighbors
from knnlm.opening import OpenedKNNLM
from knnlm.tokenized import TokenizedDocument

CACHE = "cache.json"
FORMAT = 2
TOKENS_OF_PART = 8192

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CachedTokens:
    """Some tokens in document order, n of them, as one part holds them.

    Per token [n]: ``document`` int32 (its number in the text), ``position`` int32 in the document, ``target`` int32;
    ``lm_log_prob``, ``lm_entropy``, ``lm_max_log_prob`` float32, natural logarithms; ``lm_argmax`` int32 (the smallest id among
    equals); ``lm_rank`` int32, tokens that the LM finds more probable than the target. Per neighbour [n, k], nearest first:
    ``distances`` float32 (squared L2, inf: none), ``tokens`` int32, ``ids`` int64 (-1: none) and ``neighbor_lm_log_probs``
    float32, the LM's log-probability of the neighbour's token. ``followed`` int32 [n, min(k, 8)]: how many tokens of context
    the token shares with each of its nearest neighbours (:func:`knnlm.following.followed_by_each`).
    """

    document: Array
    position: Array
    target: Array
    lm_log_prob: Array
    lm_entropy: Array
    lm_max_log_prob: Array
    lm_argmax: Array
    lm_rank: Array
    distances: Array
    tokens: Array
    ids: Array
    neighbor_lm_log_probs: Array
    followed: Array

    def __len__(self) -> int:
        return len(self.target)

    @staticmethod
    def empty(n: int, k: int) -> CachedTokens:
        """Room for n tokens with k neighbours each."""
        return CachedTokens(**{name: np.empty((n, *wide), dtype) for name, (dtype, wide) in columns(k).items()})


def columns(k: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The arrays of :class:`CachedTokens`: type, and shape beside the number of tokens."""
    whole, real = np.dtype(np.int32), np.dtype(np.float32)
    return {
        **dict.fromkeys(("document", "position", "target"), (whole, ())),
        **dict.fromkeys(("lm_log_prob", "lm_entropy", "lm_max_log_prob"), (real, ())),
        **dict.fromkeys(("lm_argmax", "lm_rank"), (whole, ())),
        "distances": (real, (k,)),
        "tokens": (whole, (k,)),
        "ids": (np.dtype(np.int64), (k,)),
        "neighbor_lm_log_probs": (real, (k,)),
        "followed": (whole, (min(k, FOLLOWED_NEIGHBORS),)),
    }


class NeighborCache:
    """A cache that is complete. ``facts`` are those under which it was made; ``k`` neighbours stand with each token."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.k: int = facts["k"]
        self.tokens: int = facts["tokens"]

    def parts(self) -> Iterator[CachedTokens]:
        """All tokens, part by part, memory-mapped. Raises :class:`StoreDamaged` for a file that can't be read."""
        for number in range(self.facts["parts"]):
            yield _open_part(_part_folder(self.folder, number), self.k)


def cache_facts(opened: OpenedKNNLM, documents: Sequence[TokenizedDocument], k: int, shuffled_batches: int | None = None) -> dict[str, Any]:
    """Everything that decides what stands in a cache; equal facts, equal caches (up to the last bits of a float).

    ``shuffled_batches``: of shuffled contexts, the tokens of a batch, within which positions are exchanged.
    """
    manifest, retriever = opened.store.manifest, opened.retriever
    setting = retriever.settings.for_k(k, None)
    text = xxhash.xxh3_128()
    for document in documents:
        text.update(np.int64(len(document.ids)).tobytes())
        text.update(np.ascontiguousarray(document.ids, np.int32).tobytes())
    return {
        "format": FORMAT,
        "k": k,
        "tokens": sum(max(len(document.ids) - 1, 0) for document in documents),
        "parts": len(list(_groups(documents))),
        "text": text.hexdigest(),
        "datastore": manifest.fingerprint,
        "model": manifest.model.fingerprint.weights,
        "key_layer": manifest.key.layer.kind,
        "dtype": opened.model.dtype,
        "device": opened.model.device.type,
        "windows": [manifest.windowing.max_length, manifest.windowing.stride],
        "index": retriever.index.description,
        "probes": setting.probes,
        "overfetch": setting.overfetch,
        "distance": retriever.distance,
        "shuffled_batches": shuffled_batches,
    }


def fill_cache(
    folder: str | Path,
    opened: OpenedKNNLM,
    documents: Iterable[TokenizedDocument],
    k: int,
    *,
    shuffled: bool = False,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> NeighborCache:
    """The cache of ``documents`` in ``folder``: what is there already is kept, what is missing is made, part by part.

    ``shuffled``: with the neighbours of other positions. ``progress`` is called with the number of tokens that stand in the
    cache. Killed at any moment, the same call goes on. Raises :class:`CorpusError` where no token can be scored,
    :class:`StoreMismatch` where the folder holds the cache of something else, naming the difference.
    """
    held, root = list(documents), Path(folder)
    facts = cache_facts(opened, held, k, batch_tokens if shuffled else None)
    if not facts["tokens"]:
        raise CorpusError("There is nothing to score: no document has at least two tokens.")
    _claim(root, facts)
    done = 0
    for number, (first, group) in enumerate(_groups(held)):
        path = _part_folder(root, number)
        if not path.is_dir():
            for written in _write_part(path, opened, first, group, k, batch_tokens, shuffled):
                progress(done + written)
        done += sum(len(document.ids) - 1 for document in group)
        progress(done)
    return NeighborCache(root, facts)


def open_cache(folder: str | Path) -> NeighborCache:
    """The complete cache in ``folder``; raises :class:`StoreDamaged` where there is none, or parts of it are missing."""
    root = Path(folder)
    if not (root / CACHE).is_file():
        raise StoreDamaged(f"{root / CACHE} is missing; there is no neighbour cache in {root}.")
    facts = read_json_with_checksum(root / CACHE)
    missing = [number for number in range(facts["parts"]) if not _part_folder(root, number).is_dir()]
    if missing:
        raise StoreDamaged(f"{_part_folder(root, missing[0])} is missing: the neighbour cache was not finished; make it again.")
    return NeighborCache(root, facts)


def _claim(root: Path, facts: dict[str, Any]) -> None:
    """Write the facts, or compare them with those that are there."""
    path = root / CACHE
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_json_with_checksum(path, facts)
        return
    found = read_json_with_checksum(path)
    different = [name for name in facts if found.get(name) != facts[name]]
    if different:
        name = different[0]
        raise StoreMismatch(
            f"{root} is the neighbour cache of something else: its {name} is {found.get(name)!r}, not {facts[name]!r}; "
            "choose another folder."
        )


def _part_folder(root: Path, number: int) -> Path:
    return root / f"part-{number:05}"


def _groups(documents: Sequence[TokenizedDocument]) -> Iterator[tuple[int, list[TokenizedDocument]]]:
    """Documents of two tokens and more, with the number of the first one, in groups of about TOKENS_OF_PART tokens."""
    group: list[TokenizedDocument] = []
    first = tokens = 0
    for number, document in enumerate(documents):
        if not group:
            first = number
        group.append(document)
        tokens += max(len(document.ids) - 1, 0)
        if tokens >= TOKENS_OF_PART:
            yield first, group
            group, tokens = [], 0
    if tokens:
        yield first, group


def _write_part(
    path: Path,
    opened: OpenedKNNLM,
    first: int,
    group: Sequence[TokenizedDocument],
    k: int,
    batch_tokens: int,
    shuffled: bool,
) -> Iterator[int]:
    """Yields how many tokens are written, batch by batch."""
    ids = [document.ids for document in group]
    counts = [max(len(tokens) - 1, 0) for tokens in ids]
    numbers = np.repeat(np.arange(first, first + len(group)), counts)
    positions = np.concatenate([np.arange(1, count + 1) for count in counts])
    done = 0
    with made_aside(path) as aside:
        with ExitStack() as stack:
            files = _create_columns(stack, aside, len(numbers), k)
            for batch in read(opened.model, ids, opened.store.manifest.windowing, batch_tokens=batch_tokens):
                rows = batch.rows.numpy()
                places = {"document": torch.from_numpy(numbers[rows]), "position": torch.from_numpy(positions[rows])}
                _put(files, rows, {**places, **_columns_of(batch, opened, k, shuffled)}, k)
                done += len(rows)
                yield done
        write_json_with_checksum(aside / "part.json", {"tokens": len(numbers)})


def _create_columns(stack: ExitStack, folder: Path, n: int, k: int) -> dict[str, tuple[BinaryIO, int]]:
    """A file for each column, and where in it the rows begin."""
    files: dict[str, tuple[BinaryIO, int]] = {}
    for name, (dtype, wide) in columns(k).items():
        file = stack.enter_context((folder / f"{name}.npy").open("wb"))
        write_header(file, dtype, (n, *wide))
        files[name] = (file, file.tell())
    return files


def _put(files: Mapping[str, tuple[BinaryIO, int]], rows: Array, values: Mapping[str, Tensor], k: int) -> None:
    """Write each column's values for ``rows`` [n], run by run of rows that follow one another."""
    runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
    for name, (dtype, wide) in columns(k).items():
        file, begin = files[name]
        column = np.ascontiguousarray(values[name].numpy().astype(dtype, copy=False))
        size = dtype.itemsize * int(np.prod(wide, dtype=np.int64))
        for run in runs:
            file.seek(begin + int(rows[run[0]]) * size)
            file.write(column[run[0] : run[-1] + 1].data)


def _columns_of(batch: ReadBatch, opened: OpenedKNNLM, k: int, shuffled: bool) -> dict[str, Tensor]:
    """What a cache says of the tokens of a batch, by column."""
    log_probs, targets = batch.log_probs, batch.targets[:, None]
    of_target = log_probs.gather(1, targets)
    lm = LMSummary.of(log_probs)
    found = opened.retriever.retrieve(batch.queries, k)
    if shuffled:
        found = _of_other_positions(found, batch, opened)
    return {
        "target": batch.targets,
        "lm_log_prob": of_target[:, 0],
        "lm_entropy": lm.entropy,
        "lm_max_log_prob": lm.max_log_prob,
        "lm_argmax": lm.best,
        "lm_rank": (log_probs > of_target).sum(1),
        "distances": found.distances,
        "tokens": found.tokens,
        "ids": found.ids,
        "neighbor_lm_log_probs": log_probs.gather(1, found.tokens),
        "followed": followed_by_each(batch.contexts, found, opened.store),
    }


def _of_other_positions(found: Neighbors, batch: ReadBatch, opened: OpenedKNNLM) -> Neighbors:
    """Each row with the neighbours of the one half a batch away, by their distance to the row's own query.

    Where the datastore has no keys to measure from, their distances stay those of the other row.
    """
    other = found.each(lambda part: part.roll(len(found) // 2, 0))
    return other if opened.store.keys is None else opened.retriever.measure(batch.queries, other.ids)


def _open_part(path: Path, k: int) -> CachedTokens:
    facts = read_json_with_checksum(path / "part.json")
    arrays = {}
    for name, (dtype, wide) in columns(k).items():
        file, shape = path / f"{name}.npy", (facts["tokens"], *wide)
        try:
            arrays[name] = map_array(file, "r")
        except ValueError as error:
            raise StoreDamaged(f"{file} is damaged: {error}; delete the folder of the neighbour cache.") from error
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise StoreDamaged(f"{file} is not {dtype}{list(shape)}; delete the folder of the neighbour cache.")
    return CachedTokens(**arrays)

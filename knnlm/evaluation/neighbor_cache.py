"""Search once, tune everything: what one pass of LM and search found for every token of a text, kept in files.

Per token: the LM's log-probability, entropy, largest probability and rank of the target. Per neighbour, at the largest
k: distance, token, entry and the LM's log-probability of that token. Whatever is asked afterwards (fewer neighbours,
another temperature, weight or gate, the mixture's most probable token) needs neither model nor index. The folder
belongs to one text, one datastore, one model: anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from knnlm.arrays import map_array, write_array
from knnlm.datastore.files import made_aside, read_json_with_checksum, write_json_with_checksum
from knnlm.errors import CorpusError, StoreDamaged, StoreMismatch
from knnlm.evaluation.scoring import ReadBatch, read
from knnlm.opening import OpenedKNNLM
from knnlm.retrieval import Retriever
from knnlm.tokenized import TokenizedDocument

CACHE = "cache.json"
FORMAT = 1
TOKENS_OF_PART = 8192

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CachedTokens:
    """Some tokens in document order, n of them, as one part holds them.

    Per token [n]: ``document`` int32 (its number in the text), ``position`` int32 in the document, ``target`` int32;
    ``lm_log_prob``, ``lm_entropy``, ``lm_max_log_prob`` float32, natural logarithms; ``lm_argmax`` int32 (the smallest id among
    equals); ``lm_rank`` int32, tokens that the LM finds more probable than the target. Per neighbour [n, k], nearest first:
    ``distances`` float32 (squared L2, inf: none), ``tokens`` int32, ``ids`` int64 (-1: none) and ``neighbor_lm_log_probs``
    float32, the LM's log-probability of the neighbour's token.
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

    def __len__(self) -> int:
        return len(self.target)

    @staticmethod
    def empty(n: int, k: int) -> CachedTokens:
        """Room for n tokens with k neighbours each."""
        return CachedTokens(**{name: np.empty((n, k) if wide else n, dtype) for name, (dtype, wide) in _COLUMNS.items()})


_FLOAT, _INT, _LONG = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
_COLUMNS: dict[str, tuple[np.dtype[Any], bool]] = {
    **dict.fromkeys(("document", "position", "target"), (_INT, False)),
    **dict.fromkeys(("lm_log_prob", "lm_entropy", "lm_max_log_prob"), (_FLOAT, False)),
    **dict.fromkeys(("lm_argmax", "lm_rank"), (_INT, False)),
    "distances": (_FLOAT, True),
    "tokens": (_INT, True),
    "ids": (_LONG, True),
    "neighbor_lm_log_probs": (_FLOAT, True),
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


def cache_facts(opened: OpenedKNNLM, documents: Sequence[TokenizedDocument], k: int) -> dict[str, Any]:
    """Everything that decides what stands in a cache; equal facts, equal caches (up to the last bits of a float)."""
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
    }


def fill_cache(
    folder: str | Path,
    opened: OpenedKNNLM,
    documents: Iterable[TokenizedDocument],
    k: int,
    *,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> NeighborCache:
    """The cache of ``documents`` in ``folder``: what is there already is kept, what is missing is made, part by part.

    ``progress`` is called with the number of tokens that stand in the cache. Killed at any moment, the same call goes on.
    Raises :class:`CorpusError` where no token can be scored, :class:`StoreMismatch` where the folder holds the cache of
    something else, naming the difference.
    """
    held, root = list(documents), Path(folder)
    facts = cache_facts(opened, held, k)
    if not facts["tokens"]:
        raise CorpusError("There is nothing to score: no document has at least two tokens.")
    _claim(root, facts)
    done = 0
    for number, (first, group) in enumerate(_groups(held)):
        path = _part_folder(root, number)
        count = sum(len(document.ids) - 1 for document in group)
        if not path.is_dir():
            _write_part(path, opened, first, group, k, batch_tokens)
        done += count
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


def _write_part(path: Path, opened: OpenedKNNLM, first: int, group: Sequence[TokenizedDocument], k: int, batch_tokens: int) -> None:
    ids = [document.ids for document in group]
    counts = [max(len(tokens) - 1, 0) for tokens in ids]
    part = CachedTokens.empty(sum(counts), k)
    part.document[:] = np.repeat(np.arange(first, first + len(group)), counts)
    part.position[:] = np.concatenate([np.arange(1, count + 1) for count in counts])
    for batch in read(opened.model, ids, opened.store.manifest.windowing, batch_tokens=batch_tokens):
        _put(part, batch, opened.retriever, k)
    with made_aside(path) as aside:
        for field in fields(part):
            with (aside / f"{field.name}.npy").open("wb") as file:
                write_array(file, getattr(part, field.name))
        write_json_with_checksum(aside / "part.json", {"tokens": len(part)})


def _put(part: CachedTokens, batch: ReadBatch, retriever: Retriever, k: int) -> None:
    rows, log_probs, targets = batch.rows.numpy(), batch.log_probs, batch.targets[:, None]
    of_target = log_probs.gather(1, targets)
    most = log_probs.max(1)
    probabilities = log_probs.exp()
    found = retriever.retrieve(batch.queries, k)
    values = {
        "target": batch.targets,
        "lm_log_prob": of_target[:, 0],
        # 0 · log 0 is 0.
        "lm_entropy": -torch.where(probabilities > 0, probabilities * log_probs, 0.0).sum(1),
        "lm_max_log_prob": most.values,
        "lm_argmax": most.indices,
        "lm_rank": (log_probs > of_target).sum(1),
        "distances": found.distances,
        "tokens": found.tokens,
        "ids": found.ids,
        "neighbor_lm_log_probs": log_probs.gather(1, found.tokens),
    }
    for name, tensor in values.items():
        getattr(part, name)[rows] = tensor.numpy()


def _open_part(path: Path, k: int) -> CachedTokens:
    facts = read_json_with_checksum(path / "part.json")
    arrays = {}
    for name, (dtype, wide) in _COLUMNS.items():
        file, shape = path / f"{name}.npy", (facts["tokens"], k) if wide else (facts["tokens"],)
        try:
            arrays[name] = map_array(file, "r")
        except ValueError as error:
            raise StoreDamaged(f"{file} is damaged: {error}; delete the folder of the neighbour cache.") from error
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise StoreDamaged(f"{file} is not {dtype}{list(shape)}; delete the folder of the neighbour cache.")
    return CachedTokens(**arrays)

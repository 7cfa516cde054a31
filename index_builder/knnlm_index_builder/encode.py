"""Second stage: a range of the token stream becomes one shard of keys and values.

:func:`build_shard` is pure and idempotent: the same descriptor gives the same files, byte for byte, whatever ran
before it and whoever else runs it. A batch holds windows of one length of one shard, so nothing is padded and batch size
changes no key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnlm.arrays import write_array
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, made_aside, new_file, read_json_with_checksum, write_json_with_checksum
from knnlm.datastore.manifest import RECEIPT, ShardFacts
from knnlm.datastore.reader import SPANS, TOKENS, VALUES
from knnlm.errors import KeyOverflow, NonFiniteKey
from knnlm.model import LanguageModel
from knnlm.windows import PlacedWindow, Windowing, length_batches, windows
from knnlm_index_builder.fill_index import fill_part
from knnlm_index_builder.ingest import IngestedCorpus
from knnlm_index_builder.key_file import KeyFile

FLOAT16_MOST = 65_504
LEAST_BATCH_TOKENS = 64


@dataclass(frozen=True)
class ShardDescriptor:
    """All that one shard is made of: its place in the corpus, where that lies, and the settings its bytes depend on.

    ``documents``: segments of the document table; ``folder``: of the shard to be made. ``key_dtype``: float16, float32 or
    ``none``: then keys go as codes into ``part``, a copy of the trained index ``trained``, and nowhere else.
    """

    facts: ShardFacts
    corpus: IngestedCorpus
    documents: tuple[Path, ...]
    folder: Path
    windowing: Windowing
    key_dtype: str
    batch_tokens: int
    trained: Path | None = None
    part: Path | None = None


@dataclass(frozen=True)
class ShardReceipt:
    """What was made: the shard's facts, its files, in what its keys are stored, and how (batch size in tokens, computing
    dtype, device)."""

    facts: ShardFacts
    files: dict[str, FileFacts]
    key_dtype: str
    batch_tokens: int
    dtype: str
    device: str


def plan_shards(documents: DocumentTable, windowing: Windowing, shard_tokens: int, first: int = 0, names: int = 0) -> list[ShardFacts]:
    """Cut the corpus from token ``first`` on into shards of at most ``shard_tokens`` tokens (at least one block each).

    A shard begins where a document or a block begins, so its windows are its own; each shard has at least one entry.
    Names are numbers from ``names`` on.
    """
    total = int(documents.token_starts[-1] + documents.token_counts[-1])
    cuts, previous = [first], first
    for border in (*_borders(documents, windowing.stride, first), total):
        if border - cuts[-1] > shard_tokens and previous > cuts[-1] and _entries(documents, cuts[-1], previous):
            cuts.append(previous)
        previous = border
    if len(cuts) > 1 and not _entries(documents, cuts[-1], total):
        # Only documents of one token are left: they have no entry, and go with the shard before them.
        cuts.pop()
    shards: list[ShardFacts] = []
    before = _entries(documents, 0, first)
    for start, end in zip(cuts, [*cuts[1:], total], strict=True):
        shards.append(ShardFacts(f"{names + len(shards):05d}", start, end - start, before, _entries(documents, start, end)))
        before += shards[-1].entries
    return shards


def _borders(documents: DocumentTable, stride: int, first: int) -> Iterator[int]:
    begin = int(np.searchsorted(documents.token_starts, first))
    for token_start, count in zip(documents.token_starts[begin:].tolist(), documents.token_counts[begin:].tolist(), strict=True):
        yield from range(token_start, token_start + count, stride)


def _entries(documents: DocumentTable, start: int, end: int) -> int:
    first, last = np.searchsorted(documents.token_starts, [start, end])
    return int(end - start - (last - first))


def shard_windows(facts: ShardFacts, documents: DocumentTable, windowing: Windowing) -> Iterator[PlacedWindow]:
    """The windows whose targets lie in the shard: ``origin`` is the document's first token, ``row`` an entry of the shard."""
    end = facts.token_start + facts.tokens
    number = int(np.searchsorted(documents.token_starts, facts.token_start, side="right")) - 1
    while number < len(documents) and (origin := int(documents.token_starts[number])) < end:
        for window in windows(int(documents.token_counts[number]), windowing):
            if facts.token_start <= origin + window.first_target < end:
                entry = origin + window.first_target - number - 1
                yield PlacedWindow(window, origin, entry - facts.entry_start)
        number += 1


def build_shard(descriptor: ShardDescriptor, model: LanguageModel, progress: Callable[[int], None]) -> ShardReceipt:
    """Make one shard in its folder (written aside, then renamed) and return its receipt.

    ``progress`` is called with the entries added by each batch. Raises :class:`NonFiniteKey`, naming document and
    position, for a key that is not finite, and :class:`KeyOverflow` for one that float16 can't hold.
    """
    facts, folder = descriptor.facts, descriptor.folder
    documents = DocumentTable(descriptor.documents)
    with made_aside(folder) as aside:
        _write_text(descriptor, documents, aside)
        with KeyFile.create(aside, descriptor.key_dtype, facts.entries, model.key_dimension) as keys:
            placed = shard_windows(facts, documents, descriptor.windowing)
            for row, found in encode(placed, descriptor.corpus, model, documents, descriptor.key_dtype, descriptor.batch_tokens):
                keys.write(row, found)
                progress(len(found))
            if descriptor.trained is not None and descriptor.part is not None:
                fill_part(descriptor.trained, keys.pieces(facts.entry_start), descriptor.part, model.device.type)
        return write_receipt(
            aside, facts, descriptor.key_dtype, batch_tokens=descriptor.batch_tokens, dtype=model.dtype, device=str(model.device)
        )


def write_receipt(folder: Path, facts: ShardFacts, key_dtype: str, **how: Any) -> ShardReceipt:
    """The last file of a shard: what was made. ``how``: ``batch_tokens``, ``dtype`` and ``device`` as the receipt says them."""
    receipt = ShardReceipt(facts, {path.name: file_facts(path) for path in sorted(folder.iterdir())}, key_dtype, **how)
    write_json_with_checksum(folder / RECEIPT, asdict(receipt))
    return receipt


def _write_text(descriptor: ShardDescriptor, documents: DocumentTable, folder: Path) -> None:
    start, stop = descriptor.facts.token_start, descriptor.facts.token_start + descriptor.facts.tokens
    tokens, spans = descriptor.corpus.tokens(start, stop), descriptor.corpus.spans(start, stop)
    firsts = documents.token_starts[(documents.token_starts >= start) & (documents.token_starts < stop)]
    for name, array in ((TOKENS, tokens), (VALUES, np.delete(tokens, firsts - start)), (SPANS, spans)):
        if array is not None:
            with new_file(folder / name) as file:
                write_array(file, array)


def read_receipt(folder: Path) -> ShardReceipt | None:
    """The receipt of a finished shard, None if there is none."""
    path = folder / RECEIPT
    if not path.exists():
        return None
    content = read_json_with_checksum(path)
    files = {name: FileFacts(**facts) for name, facts in content.pop("files").items()}
    return ShardReceipt(facts=ShardFacts(**content.pop("facts")), files=files, **content)


def encode(
    placed: Iterator[PlacedWindow],
    corpus: IngestedCorpus,
    model: LanguageModel,
    documents: DocumentTable,
    key_dtype: str,
    batch_tokens: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Keys of the targets of each window, as (row of the first, [targets, dimension] float32 on the CPU)."""
    for batch in length_batches(placed, batch_tokens):
        length = batch[0].window.input_length
        starts = [item.origin + item.window.start for item in batch]
        tokens = np.stack([corpus.tokens(start, start + length) for start in starts]).astype(np.int64)
        # Products of a few rows go other ways in BLAS, with other last bits; windows are repeated until there are enough.
        copies = -(-LEAST_BATCH_TOKENS // tokens.size)
        found = model.forward(torch.from_numpy(tokens).repeat(copies, 1).to(model.device), logits=False).keys.float().cpu()
        for item, row in zip(batch, found, strict=False):
            target_keys = row[item.window.first_target - 1 - item.window.start :]
            _require_storable(target_keys, key_dtype, item, documents)
            yield item.row, target_keys


def _require_storable(target_keys: torch.Tensor, key_dtype: str, item: PlacedWindow, documents: DocumentTable) -> None:
    limit = FLOAT16_MOST if key_dtype == "float16" else torch.finfo(torch.float32).max
    # A NaN fails every comparison, so this one finds it as well.
    if bool((target_keys.abs().amax() <= limit).item()):
        return
    bad = int((~(target_keys.abs().amax(1) <= limit)).nonzero()[0])
    value = float(target_keys[bad].abs().amax())
    number = int(np.searchsorted(documents.token_starts, item.origin, side="right")) - 1
    where = f"The key at token {item.window.first_target - 1 + bad} of document {documents[number].id!r}"
    if np.isfinite(value):
        raise KeyOverflow(f"{where} has a component of size {value:g}, which float16 can't hold")
    raise NonFiniteKey(f"{where} is not finite; the model's forward pass overflows in this dtype, so try --dtype float32.")

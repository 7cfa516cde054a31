"""Second stage: a range of the token stream becomes one shard of keys and values.

:func:`build_shard` is pure and idempotent: the same descriptor gives the same files, byte for byte, whatever ran
before it. A batch holds windows of one length, so nothing is padded and batch size changes no key.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, read_json_with_checksum, sync_file, sync_folder, write_json_with_checksum
from knnlm.datastore.manifest import RECEIPT, ShardFacts
from knnlm.datastore.reader import KEYS, SPANS, TOKENS, VALUES
from knnlm.errors import NonFiniteKey
from knnlm.model import LanguageModel
from knnlm.windows import PlacedWindow, Windowing, length_batches, windows
from knnlm_index_builder.ingest import IngestedCorpus

FLOAT16_MOST = 65_504
LEAST_BATCH_TOKENS = 64


@dataclass(frozen=True)
class ShardDescriptor:
    """What one shard is made of: its place in the corpus and the settings that its bytes depend on."""

    facts: ShardFacts
    windowing: Windowing
    key_dtype: str


@dataclass(frozen=True)
class ShardReceipt:
    """What was made: the shard's facts, its files, and how (batch size in tokens, computing dtype, device)."""

    facts: ShardFacts
    files: dict[str, FileFacts]
    batch_tokens: int
    dtype: str
    device: str


def plan_shards(documents: DocumentTable, windowing: Windowing, shard_tokens: int) -> list[ShardFacts]:
    """Cut the corpus into shards of at most ``shard_tokens`` tokens (at least one block of windowing each).

    A shard begins where a document or a block begins, so its windows are its own; each shard has at least one entry.
    """
    total = int(documents.token_starts[-1] + documents.token_counts[-1])
    cuts, previous = [0], 0
    for border in (*_borders(documents, windowing.stride), total):
        if border - cuts[-1] > shard_tokens and previous > cuts[-1] and _entries(documents, cuts[-1], previous):
            cuts.append(previous)
        previous = border
    if len(cuts) > 1 and not _entries(documents, cuts[-1], total):
        # Only documents of one token are left: they have no entry, and go with the shard before them.
        cuts.pop()
    shards: list[ShardFacts] = []
    for start, end in zip(cuts, [*cuts[1:], total], strict=True):
        before = shards[-1].entry_start + shards[-1].entries if shards else 0
        shards.append(ShardFacts(f"{len(shards):05d}", start, end - start, before, _entries(documents, start, end)))
    return shards


def _borders(documents: DocumentTable, stride: int) -> Iterator[int]:
    for token_start, count in zip(documents.token_starts.tolist(), documents.token_counts.tolist(), strict=True):
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


def build_shard(
    descriptor: ShardDescriptor,
    corpus: IngestedCorpus,
    documents: DocumentTable,
    model: LanguageModel,
    folder: Path,
    *,
    batch_tokens: int,
    dtype: str,
    progress: Callable[[int], None],
) -> ShardReceipt:
    """Make one shard in ``folder`` (written aside, then renamed) and return its receipt.

    ``progress`` is called with the entries added by each batch. Raises :class:`NonFiniteKey`, naming document and
    position, for a key that is not finite or that the stored dtype can't hold.
    """
    facts = descriptor.facts
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokens = corpus.tokens[facts.token_start : facts.token_start + facts.tokens]
    firsts = documents.token_starts[
        (documents.token_starts >= facts.token_start) & (documents.token_starts < facts.token_start + facts.tokens)
    ]
    np.save(aside / TOKENS, tokens)
    np.save(aside / VALUES, np.delete(tokens, firsts - facts.token_start))
    if corpus.spans is not None:
        np.save(aside / SPANS, corpus.spans[facts.token_start : facts.token_start + facts.tokens])
    keys = np.lib.format.open_memmap(aside / KEYS, mode="w+", dtype=descriptor.key_dtype, shape=(facts.entries, model.key_dimension))
    placed = shard_windows(facts, documents, descriptor.windowing)
    for batch in length_batches(placed, batch_tokens):
        _encode(batch, corpus.tokens, model, keys, facts, documents)
        progress(sum(item.window.target_count for item in batch))
    keys.flush()
    del keys
    files = {path.name: file_facts(path) for path in sorted(aside.iterdir())}
    receipt = ShardReceipt(facts, files, batch_tokens, dtype, str(model.device))
    for path in aside.iterdir():
        sync_file(path)
    write_json_with_checksum(aside / RECEIPT, asdict(receipt))
    aside.rename(folder)
    sync_folder(folder.parent)
    return receipt


def read_receipt(folder: Path) -> ShardReceipt | None:
    """The receipt of a finished shard, None if there is none. Raises :class:`StoreDamaged`."""
    path = folder / RECEIPT
    if not path.exists():
        return None
    content = read_json_with_checksum(path)
    files = {name: FileFacts(**facts) for name, facts in content.pop("files").items()}
    return ShardReceipt(facts=ShardFacts(**content.pop("facts")), files=files, **content)


def _encode(batch: list[PlacedWindow], stream: Any, model: LanguageModel, keys: Any, facts: ShardFacts, documents: DocumentTable) -> None:
    length = batch[0].window.input_length
    tokens = np.stack([stream[item.origin + item.window.start :][:length] for item in batch]).astype(np.int64)
    # Products of a few rows go other ways in BLAS, with other last bits; windows are repeated until there are enough.
    copies = -(-LEAST_BATCH_TOKENS // tokens.size)
    found = model.forward(torch.from_numpy(tokens).repeat(copies, 1).to(model.device), logits=False).keys.float()
    for item, row in zip(batch, found, strict=False):
        target_keys = row[item.window.first_target - 1 - item.window.start :]
        _require_storable(target_keys, keys.dtype, item, documents)
        keys[item.row : item.row + len(target_keys)] = target_keys.cpu().numpy()


def _require_storable(target_keys: torch.Tensor, dtype: np.dtype[Any], item: PlacedWindow, documents: DocumentTable) -> None:
    limit = FLOAT16_MOST if dtype == np.float16 else torch.finfo(torch.float32).max
    # A NaN fails every comparison, so this one finds it as well.
    if bool((target_keys.abs().amax() <= limit).item()):
        return
    bad = int((~(target_keys.abs().amax(1) <= limit)).nonzero()[0])
    value = float(target_keys[bad].abs().amax())
    position = item.window.first_target - 1 + bad
    number = int(np.searchsorted(documents.token_starts, item.origin, side="right")) - 1
    problem = f"has a component of size {value:g}, which float16 can't hold; build with --keys float32" if np.isfinite(value) else (
        "is not finite; the model's forward pass overflows in this dtype, so try --dtype float32"
    )  # fmt: skip
    raise NonFiniteKey(f"The key at token {position} of document {documents[number].id!r} {problem}.")

"""Evidence of completions against brute force over every token of the datastores."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.model import HFLanguageModel
from knnlm.neighbors import Neighbors
from knnlm_server import verbatim_runs
from knnlm_server.completion_evidence import EvidenceCollector
from knnlm_server.sequence import CompletionEvidence
from tests.stores import build, token_folder

TEMPERATURE = 2.0
SECOND_WEIGHT = 0.3
MANY = 1000


@dataclass(frozen=True)
class Named:
    name: str
    store: Datastore


@dataclass
class Votes:
    """What was found for one token: (number of datastore, entry, token, distance), and the neighbours' part of its probability."""

    neighbors: list[tuple[int, int, int, float]] = field(default_factory=list)
    share: float = 0.0
    changed: bool = False
    searched: bool = True


def documents_of_four_tokens(seed: int) -> list[list[int]]:
    """Documents that repeat themselves and each other."""
    chance = random.Random(seed)
    return [[chance.randint(1, 4) for _ in range(chance.randint(2, 20))] for _ in range(12)]


@pytest.fixture(scope="module")
def token_stores(tiny_gpt2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Named]:
    """Two datastores, of several shards."""
    model, folder = HFLanguageModel.load(tiny_gpt2_path), tmp_path_factory.mktemp("evidence")
    for number in range(2):
        documents = token_folder(folder / f"tokens-{number}", documents_of_four_tokens(number))
        build(documents, folder / f"store-{number}", model, index="exact", keys="float32", shard_tokens=32, max_length=16, stride=8)
    return [Named(f"store-{number}", Datastore.open(folder / f"store-{number}")) for number in range(2)]


def spell(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def collect(
    stores: Sequence[Named], completion: Sequence[int], votes: Sequence[Votes], decode: Callable[[list[int]], str] = spell, most: int = MANY
) -> EvidenceCollector:
    """A collector that was given all tokens."""
    collector = EvidenceCollector(dict(enumerate(stores)), decode, most)
    for token, found in zip(completion, votes, strict=True):
        neighbors = None
        if found.searched:
            numbers, entries, tokens, distances = ([[one[part] for one in found.neighbors]] for part in range(4))
            whole = [torch.tensor(part, dtype=torch.int64) for part in (tokens, entries, numbers)]
            priors = whole[2].double() * math.log(SECOND_WEIGHT)
            neighbors = Neighbors(torch.tensor(distances, dtype=torch.float32), whole[0], whole[1], whole[2], priors)
        collector.add(token, token + found.changed, neighbors, TEMPERATURE, found.share)
    return collector


def evidence(stores: Sequence[Named], completion: Sequence[int], votes: Sequence[Votes], most: int = MANY) -> CompletionEvidence:
    return collect(stores, completion, votes, most=most).result()


def entries_with_tokens(store: Datastore) -> list[tuple[int, int]]:
    return [(entry, int(store.values.slice(entry, entry + 1)[0])) for entry in range(len(store))]


def brute_runs(store: Datastore, completion: Sequence[int], voted: set[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """(-tokens, start, position, document) of every run that can't be made longer and holds one of ``voted`` (index, entry)."""
    stream = store.tokens.slice(0, len(store.tokens)).tolist()
    entry = 0
    for number in range(len(store.documents)):
        record = store.documents[number]
        entry_at = {record.token_start + offset: entry + offset - 1 for offset in range(1, record.tokens)}
        entry += record.tokens - 1
        first, last = record.token_start, record.token_start + record.tokens
        for start in range(len(completion)):
            for position in range(first, last):
                if start > 0 and position > first and completion[start - 1] == stream[position - 1]:
                    continue
                length = 0
                while (
                    start + length < len(completion)
                    and position + length < last
                    and completion[start + length] == stream[position + length]
                ):
                    length += 1
                if any((start + i, entry_at.get(position + i)) in voted for i in range(length)):
                    yield -length, start, position, number


@st.composite
def cases(any_of: st.DrawFn) -> tuple[int, int, bool]:
    return any_of(st.integers(0, 10_000)), any_of(st.integers(0, 24)), any_of(st.booleans())


def make_case(stores: Sequence[Named], seed: int, length: int, generous: bool) -> tuple[list[int], list[Votes]]:
    """A completion out of pieces of documents and noise, and neighbours of each token, of which some vote for it."""
    chance = random.Random(seed)
    completion: list[int] = []
    while len(completion) < length:
        pieces = documents_of_four_tokens(chance.randint(0, 2))
        piece = chance.choice(pieces)
        start = chance.randrange(len(piece))
        completion += piece[start : start + chance.randint(1, 9)]
    completion = completion[:length]
    known = [(number, *pair) for number, named in enumerate(stores) for pair in entries_with_tokens(named.store)]
    votes = []
    for token in completion:
        pool = [one for one in known if one[2] == token or chance.random() < 0.1]
        found = chance.sample(pool, min(len(pool), chance.choice([0, 1, 3, 20]) if generous else chance.choice([0, 0, 0, 1])))
        neighbors = sorted([(*one, chance.choice([0.0, 1.0, chance.random() * 9])) for one in found], key=lambda one: one[3])
        share = chance.random() if any(one[2] == token for one in neighbors) else 0.0
        votes.append(Votes(neighbors, share, chance.random() < 0.3))
    return completion, votes


@given(cases())
def test_runs_are_those_of_brute_force(token_stores: list[Named], case: tuple[int, int, bool]) -> None:
    completion, votes = make_case(token_stores, *case)
    expected = []
    for number, named in enumerate(token_stores):
        voted = {(i, one[1]) for i, vote in enumerate(votes) for one in vote.neighbors if one[0] == number and one[2] == completion[i]}
        expected += [(run[0], run[1], number, *run[2:]) for run in brute_runs(named.store, completion, voted)]
    found = evidence(token_stores, completion, votes).verbatim
    if not expected:
        assert found is None
        return
    assert found is not None
    tokens, start, number, _, document = min(expected)
    named = token_stores[number]
    assert (found.tokens, found.start, found.datastore) == (-tokens, start, named.name)
    assert found.document_id == named.store.documents[document].id
    assert found.text == spell(completion[start : start - tokens])
    assert (found.character_start, found.character_end, found.line) == (None, None, None)


@given(cases())
def test_documents_have_their_parts_of_every_tokens_share(token_stores: list[Named], case: tuple[int, int, bool]) -> None:
    completion, votes = make_case(token_stores, *case)
    expected: dict[tuple[str, str], float] = {}
    for token, vote in zip(completion, votes, strict=True):
        voters = [one for one in vote.neighbors if one[2] == token]
        raised = [SECOND_WEIGHT ** one[0] * math.exp(-one[3] / TEMPERATURE) for one in voters]
        for one, part in zip(voters, raised, strict=True):
            named = token_stores[one[0]]
            key = named.name, named.store.documents[named.store.documents.of_entry(one[1])].id
            expected[key] = expected.get(key, 0) + vote.share * part / sum(raised)
    found = evidence(token_stores, completion, votes)
    assert {(d.datastore, d.document_id): d.weight for d in found.documents} == pytest.approx(expected, abs=1e-6)
    assert sum(d.weight for d in found.documents) == pytest.approx(sum(vote.share for vote in votes), abs=1e-9)
    assert [d.weight for d in found.documents] == sorted((d.weight for d in found.documents), reverse=True)
    assert evidence(token_stores, completion, votes, most=2).documents == found.documents[:2]
    assert found.searched_tokens == len(completion)
    assert found.changed_share == pytest.approx(np.mean([vote.changed for vote in votes]) if votes else 0)


def test_runs_that_ended_are_kept_by_document_when_they_become_many(token_stores: list[Named], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make_case(token_stores, seed, 24, generous=True) for seed in range(5)]
    expected = [evidence(token_stores, *case) for case in cases]
    monkeypatch.setattr(verbatim_runs, "_CLOSED_RUNS", 3)
    assert [evidence(token_stores, *case) for case in cases] == expected


@pytest.mark.parametrize("document", [0, 1])
def test_a_run_stays_in_its_document_though_completion_and_datastore_go_on_alike(token_stores: list[Named], document: int) -> None:
    store = token_stores[0].store
    records = [store.documents[number] for number in range(2)]
    completion = store.tokens.slice(0, records[0].tokens + records[1].tokens).tolist()
    # The last token of the first document, or the second one of the second.
    place = records[0].tokens - 1 if document == 0 else records[0].tokens + 1
    votes = [Votes() for _ in completion]
    votes[place] = Votes([(0, place - 1 - document, completion[place], 0.0)], 0.5)
    run = evidence(token_stores, completion, votes).verbatim
    assert run is not None
    assert (run.start, run.tokens, run.document_id) == (records[document].token_start, records[document].tokens, records[document].id)


def test_without_a_search_there_is_no_evidence(token_stores: list[Named]) -> None:
    found = evidence(token_stores, [1, 2, 3], [Votes(searched=False)] * 3)
    assert found == CompletionEvidence(0.0, 0, (), None)
    assert evidence(token_stores, [], []) == CompletionEvidence(0.0, 0, (), None)


def test_removed_documents_are_not_named_and_the_next_best_run_is(token_stores: list[Named], tmp_path: Path) -> None:
    path = Path(shutil.copytree(token_stores[0].store.path, tmp_path / "store"))
    stores = [Named("copy", Datastore.open(path))]
    collectors = [collect(stores, *make_case(stores, seed, 24, generous=True)) for seed in range(6)]
    before = [collector.result() for collector in collectors]
    gone = {found.verbatim.document_id for found in before[:1] if found.verbatim}
    remove_documents(path, sorted(gone), {})
    assert stores[0].store.refresh()
    changed = 0
    for collector, old in zip(collectors, before, strict=True):
        new = collector.result()
        assert new.documents == tuple(d for d in old.documents if d.document_id not in gone)
        assert new.verbatim is not None
        assert old.verbatim is not None
        assert new.verbatim.document_id not in gone
        assert new.verbatim == old.verbatim or old.verbatim.document_id in gone
        changed += new.verbatim != old.verbatim
    assert changed > 0


def test_a_run_is_told_with_its_characters_and_line(tiny_gpt2_path: Path, tmp_path: Path) -> None:
    text = "One line.\nThe old king sold seven apples.\nThe end.\n"
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(text)
    model = HFLanguageModel.load(tiny_gpt2_path)
    tokenizer = model.tokenizer()
    build(tmp_path / "corpus", tmp_path / "store", model, index="exact", keys="float32", eos=True)
    stores = [Named("texts", Datastore.open(tmp_path / "store"))]
    all_tokens = tokenizer.encode_plain(text)
    begin = next(i for i in range(len(all_tokens)) if tokenizer.decode(all_tokens[:i]) == "One line.\n")
    noise = next(token for token in range(1, 300) if token != all_tokens[begin - 1])
    completion = [noise, *all_tokens[begin:], 0]  # with the EOS of the document
    votes = [Votes() if i != 3 else Votes([(0, begin + 1, completion[3], 0.0)], 1.0) for i in range(len(completion))]
    run = collect(stores, completion, votes, tokenizer.decode).result().verbatim
    assert run is not None
    assert (run.start, run.tokens) == (1, len(completion) - 1)
    assert run.text == text[len("One line.\n") :]
    assert (run.character_start, run.character_end, run.line) == (len("One line.\n"), len(text), 2)
    assert (run.document_id, run.source) == (stores[0].store.documents[0].id, stores[0].store.documents[0].source)

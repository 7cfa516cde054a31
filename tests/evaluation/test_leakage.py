"""A datastore that holds the test text: what is left out, what is said, and what happens where nothing is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from knnlm.corpus import Corpus
from knnlm.datastore.removal import remove_documents
from knnlm.errors import DocumentNotFound
from knnlm.evaluation.comparison import Comparison
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument, tokenize
from tests.stores import build, knnlm, text_folder, token_folder
from tests.tiny import VOCABULARY, tiny_corpus

TEXTS = tiny_corpus(6)
NEW = tiny_corpus(2, seed=8)


@pytest.fixture(scope="module")
def folder(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leakage")
    build(text_folder(folder / "corpus", TEXTS), folder / "store", gpt2, index="Flat", keys="float32", max_length=32, stride=16)
    text_folder(folder / "new", NEW)
    # Two documents of the store under other names, and one that is new.
    text_folder(folder / "mixed", [NEW[0], TEXTS[4], TEXTS[1]])
    return folder


@pytest.fixture
def opened(folder: Path) -> OpenedKNNLM:
    return open_store(folder / "store")


def compared(opened: OpenedKNNLM, text: Path, **options: object) -> Comparison:
    return opened.compare(text, mixture=Mixture(k=8, temperature=1.0, weight=0.5), **options)


def documents_found(opened: OpenedKNNLM, comparison: Comparison) -> set[str]:
    ids = comparison.per_token.neighbor_ids
    return {opened.store.documents[opened.store.documents.of_entry(int(entry))].id for entry in np.unique(ids[ids >= 0])}


def test_a_store_tested_on_its_own_text_collapses_and_the_audit_shouts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--k", "8", "--knn-temperature", "0.01", "--weight", "0.99"]
    own = ["compare", folder / "store", "--text", folder / "corpus", *flags]
    assert knnlm(*own, "--no-auto-exclude") == 0
    said = capsys.readouterr()
    assert "warning: much of this text stands in the datastore (100% of its 13-token sequences)" in " ".join(said.err.split())
    assert knnlm(*own, "--no-auto-exclude", "--json") == 0
    collapsed = json.loads(capsys.readouterr().out)["stores"][0]
    assert collapsed["knn"]["value"] < 1.5 < 20 < collapsed["base"]["value"]
    assert [overlap["share"] for overlap in collapsed["leakage"]["overlaps"]] == [1, 1, 1]
    assert collapsed["leakage"]["clean"] is None
    assert collapsed["leakage"]["contaminated"]["knn"] == pytest.approx(collapsed["knn"]["value"])
    assert collapsed["leakage"]["excluded"] == []


def test_by_default_no_search_finds_the_test_documents(opened: OpenedKNNLM, folder: Path) -> None:
    found = compared(opened, folder / "mixed")
    excluded = [(document.id, document.test_document) for document in found.leakage.excluded]
    assert excluded == [("story-0001.txt", "story-0002.txt"), ("story-0004.txt", "story-0001.txt")]
    assert [document.entries for document in found.leakage.excluded] == [
        int(opened.store.documents.token_counts[row]) - 1 for row in (1, 4)
    ]
    rest = {"story-0000.txt", "story-0002.txt", "story-0003.txt", "story-0005.txt"}
    assert documents_found(opened, found) <= rest
    assert found.overlap < 0.5
    leaking = compared(opened, folder / "mixed", auto_exclude=False)
    assert documents_found(opened, leaking) > {"story-0001.txt", "story-0004.txt"}
    assert leaking.knn.value < found.knn.value
    assert leaking.overlap > 0.6
    assert leaking.leakage.excluded == ()


def test_it_is_as_if_the_documents_had_never_been_there(opened: OpenedKNNLM, folder: Path, tmp_path: Path, gpt2: HFLanguageModel) -> None:
    rest = [text for number, text in enumerate(TEXTS) if number not in (1, 4)]
    settings = {"index": "Flat", "keys": "float32", "max_length": 32, "stride": 16}
    build(text_folder(tmp_path / "rest", rest), tmp_path / "store", gpt2, **settings)
    found, expected = compared(opened, folder / "mixed"), compared(open_store(tmp_path / "store"), folder / "mixed")
    np.testing.assert_allclose(found.per_token.logprob, expected.per_token.logprob, atol=1e-5)
    assert np.array_equal(found.per_token.frequency, expected.per_token.frequency)
    assert np.array_equal(found.per_token.contaminated, expected.per_token.contaminated)
    assert [group.tokens for each in found.breakdowns for group in each.groups] == [
        group.tokens for each in expected.breakdowns for group in each.groups
    ]


def test_documents_are_left_out_by_id(opened: OpenedKNNLM, folder: Path) -> None:
    found = compared(opened, folder / "new", exclude=["story-0003.txt"])
    assert [(document.id, document.test_document) for document in found.leakage.excluded] == [("story-0003.txt", None)]
    assert "story-0003.txt" not in documents_found(opened, found)
    assert "story-0003.txt" in documents_found(opened, compared(opened, folder / "new"))
    with pytest.raises(DocumentNotFound, match=r"no document of this id: 'nothing'"):
        compared(opened, folder / "new", exclude=["story-0003.txt", "nothing"])


def test_the_same_id_with_other_text_is_no_copy(opened: OpenedKNNLM, folder: Path) -> None:
    assert (folder / "new" / "story-0000.txt").name == (folder / "corpus" / "story-0000.txt").name
    assert compared(opened, folder / "new").leakage.excluded == ()


def test_contaminated_tokens_are_those_in_a_13_token_sequence_of_the_store(opened: OpenedKNNLM, folder: Path, tmp_path: Path) -> None:
    text_folder(tmp_path / "quoting", [NEW[0] + TEXTS[2][:200] + NEW[1], NEW[1]])
    found = compared(opened, tmp_path / "quoting")
    held = list(tokenize(Corpus([tmp_path / "quoting"]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))
    stored = {sequence for document in own_text(opened, folder) for sequence in sequences(document, 13)}
    expected: list[bool] = []
    for document in held:
        hits = [start for start, sequence in enumerate(sequences(document, 13)) if sequence in stored]
        expected += [any(start <= place < start + 13 for start in hits) for place in range(1, len(document.ids))]
    assert found.per_token.contaminated.tolist() == expected
    assert 0.02 < np.mean(expected) < 0.98
    contaminated, clean = found.leakage.contaminated, found.leakage.clean
    assert contaminated is not None
    assert clean is not None
    mask = np.array(expected)
    assert contaminated.knn == pytest.approx(np.exp(-found.per_token.logprob[mask].mean(dtype=float)))
    assert clean.base == pytest.approx(np.exp(-found.per_token.lm_logprob[~mask].mean(dtype=float)))


def test_documents_that_overlap_are_named_with_their_share(opened: OpenedKNNLM, folder: Path, tmp_path: Path) -> None:
    text_folder(tmp_path / "quoting", [NEW[0] + TEXTS[2][:200]])
    found = compared(opened, tmp_path / "quoting").leakage
    held = list(tokenize(Corpus([tmp_path / "quoting"]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))
    for length in (8, 13, 32):
        asked = [sequence for document in held for sequence in sequences(document, length)]
        stored = {sequence for document in own_text(opened, folder) for sequence in sequences(document, length)}
        assert found.share(length) == pytest.approx(sum(sequence in stored for sequence in asked) / len(asked))
    asked_13 = {sequence for document in held for sequence in sequences(document, 13)}
    counts = {d.document.id: [s in asked_13 for s in sequences(d, 13)] for d in own_text(opened, folder)}
    expected = {name: (len(flags), sum(flags)) for name, flags in counts.items() if any(flags)}
    assert {document.id: (document.sequences, document.found) for document in found.documents} == expected
    assert found.overlapping == len(expected)
    assert max(found.documents, key=lambda document: document.found) == found.documents[0]
    assert found.documents[0].id == "story-0002.txt"


def test_removed_documents_neither_leak_nor_are_named(folder: Path, tmp_path: Path, gpt2: HFLanguageModel) -> None:
    build(folder / "corpus", tmp_path / "store", gpt2, index="Flat", keys="float32", max_length=32, stride=16)
    remove_documents(tmp_path / "store", ["story-0004.txt"], {})
    found = compared(open_store(tmp_path / "store"), folder / "mixed")
    assert [document.id for document in found.leakage.excluded] == ["story-0001.txt"]


def test_an_unrelated_store_changes_perplexity_by_less_than_its_interval(tmp_path: Path, gpt2: HFLanguageModel) -> None:
    """Tokens drawn by chance, and the weight that a validation text asks for."""
    chance = np.random.default_rng(0)
    token_folder(tmp_path / "noise", [chance.integers(0, VOCABULARY, 400).tolist() for _ in range(4)])
    build(tmp_path / "noise", tmp_path / "store", gpt2, index="Flat", keys="float32", max_length=32, stride=16)
    for name, seed in (("valid", 21), ("test", 22)):
        text_folder(tmp_path / name, tiny_corpus(8, seed=seed))
    ids = {name: tmp_path / f"{name}.npy" for name in ("valid", "test")}
    for name, file in ids.items():
        tokens = [gpt2.tokenizer("no", False).encode(path.read_text()) for path in sorted((tmp_path / name).iterdir())]
        np.save(file, np.concatenate([np.array(document, np.int32) for document in tokens]))
    assert knnlm("calibrate", tmp_path / "store", "--text", ids["valid"], "--k", "16") == 0
    found = open_store(tmp_path / "store").compare(ids["test"])
    assert abs(found.knn.value - found.base.value) < 1.96 * found.base.standard_error
    assert abs(found.change) < 0.01
    assert found.overlap == 0


def own_text(opened: OpenedKNNLM, folder: Path) -> list[TokenizedDocument]:
    return list(tokenize(Corpus([folder / "corpus"]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))


def sequences(document: TokenizedDocument, length: int) -> list[tuple[int, ...]]:
    ids = document.ids.tolist()
    return [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]

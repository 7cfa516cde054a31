"""``compare`` equals the slow reference; its standard errors, bits per byte and files are what they are said to be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.corpus import Corpus
from knnlm.datastore.reader import Datastore
from knnlm.entry_mask import EntryMask
from knnlm.errors import CorpusError
from knnlm.evaluation.compare import compare
from knnlm.evaluation.comparison import Comparison
from knnlm.evaluation.scoring import score
from knnlm.evaluation.statistics import TOKENS_PER_CLUSTER
from knnlm.index import Candidates
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel, find_last_feed_forward
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.retrieval import Retriever
from knnlm.tokenized import TokenizedDocument, tokenize
from tests import reference
from tests.stores import build, knnlm, text_folder
from tests.tiny import save, tiny_corpus, tiny_gpt2, tiny_tokenizer

Floats = npt.NDArray[np.float64]
MAX_LENGTH, STRIDE = 16, 6


@pytest.fixture(scope="module")
def held_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("held") / "held", ["a", *tiny_corpus(2, seed=7), "Zoë laughed 🙂."])


@pytest.fixture(scope="module")
def opened(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenedKNNLM:
    folder = tmp_path_factory.mktemp("compare")
    settings: dict[str, Any] = {"index": "Flat", "keys": "float32", "max_length": MAX_LENGTH, "stride": STRIDE, "shard_tokens": 200}
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, **settings)
    return open_store(folder / "store")


@pytest.fixture(scope="module")
def held(opened: OpenedKNNLM, held_folder: Path) -> list[TokenizedDocument]:
    return list(tokenize(Corpus([held_folder]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))


@dataclass(frozen=True)
class Slow:
    """What the reference says of the store and of the held-out text."""

    store: reference.Scored
    held: reference.Scored


@pytest.fixture(scope="module")
def slow(held: list[TokenizedDocument]) -> Slow:
    hf, encode = tiny_gpt2(), tiny_tokenizer().encode
    layer = find_last_feed_forward(hf)
    stored = [encode(text, add_special_tokens=False) for text in tiny_corpus(4)]
    return Slow(
        reference.score(hf, layer, stored, MAX_LENGTH, STRIDE),
        reference.score(hf, layer, [document.ids.tolist() for document in held], MAX_LENGTH, STRIDE),
    )


@pytest.mark.parametrize(
    "mixture", [Mixture(1, 1.0, 0.5), Mixture(8, 20.0, 0.25), Mixture(64, 100.0, 0.9), Mixture(4096, 5.0, 0.3)], ids=str
)
def test_it_equals_the_reference(mixture: Mixture, opened: OpenedKNNLM, held: list[TokenizedDocument], slow: Slow) -> None:
    found = compare(opened.knn_lm, opened.store, held, mixture=mixture)
    rows = np.arange(len(slow.held.values))
    expected_lm = slow.held.log_probs[rows, slow.held.values]
    k = min(mixture.k, len(slow.store.keys))
    expected = np.array(
        [
            reference.knn_lm_log_probs(
                query, lm, slow.store.keys, slow.store.values, k=k, temperature=mixture.temperature, weight=mixture.weight
            )[value]
            for query, lm, value in zip(slow.held.keys, slow.held.log_probs, slow.held.values, strict=True)
        ]
    )
    per_token = found.per_token
    np.testing.assert_allclose(per_token.lm_logprob, expected_lm, rtol=0, atol=2e-5)
    np.testing.assert_allclose(per_token.logprob, expected, rtol=0, atol=1e-4)
    assert found.base.value == pytest.approx(math.exp(-expected_lm.mean()), rel=1e-5)
    assert found.knn.value == pytest.approx(math.exp(-expected.mean()), rel=1e-5)
    assert found.change == pytest.approx(found.knn.value / found.base.value - 1)
    assert found.better == (per_token.logprob > per_token.lm_logprob).mean()
    assert found.worse == (per_token.logprob < per_token.lm_logprob).mean()


def test_one_row_for_each_token_but_the_first_in_document_order(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    per_token = compare(opened.knn_lm, opened.store, held).per_token
    expected = [(doc, position, token) for doc, d in enumerate(held) for position, token in enumerate(d.ids.tolist()) if position]
    assert list(zip(per_token.doc.tolist(), per_token.position.tolist(), per_token.token_id.tolist(), strict=True)) == expected
    assert len(held[0].ids) == 1


class NeverSearched:
    """An index that must not be asked."""

    description, entries, nlist = "none", 0, 0

    def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
        raise AssertionError("weight 0 must not search")


def test_weight_0_is_the_base_lm_bit_for_bit_and_makes_no_search(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    never = Retriever(NeverSearched(), opened.store.keys, opened.store.values)
    knn_lm = KNNLanguageModel(opened.model, opened.knn_lm.tokenizer, never)
    found = compare(knn_lm, opened.store, held, mixture=Mixture(weight=0))
    with_search = compare(opened.knn_lm, opened.store, held)
    assert np.array_equal(found.per_token.logprob, found.per_token.lm_logprob)
    assert np.array_equal(found.per_token.logprob, with_search.per_token.lm_logprob)
    assert (found.knn.value, found.change, found.better, found.worse) == (found.base.value, 0, 0, 0)
    assert (found.per_token.knn_logprob == -np.inf).all()


def test_weight_1_is_the_neighbors_alone(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    found = compare(opened.knn_lm, opened.store, held, mixture=Mixture(k=2, weight=1))
    assert np.array_equal(found.per_token.logprob, found.per_token.knn_logprob)
    assert found.knn.value == math.inf
    assert math.isnan(found.knn.standard_error)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_scores_do_not_depend_on_the_batch(batch_tokens: int, opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    documents = [document.ids for document in held]
    n = sum(len(ids) - 1 for ids in documents)

    def scored(tokens: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        lines, ids = np.full((n, 3), np.nan), np.full((n, 4), -2, dtype=np.int64)
        for batch in score(opened.knn_lm, documents, opened.store.manifest.windowing, Mixture(k=4), batch_tokens=tokens):
            rows = batch.rows.numpy()
            assert np.isnan(lines[rows]).all()
            lines[rows] = torch.stack([batch.lm_log_probs, batch.knn_log_probs, batch.log_probs], 1).numpy()
            ids[rows] = batch.neighbors.ids.numpy()
        return lines, ids

    lines, ids = scored(batch_tokens)
    expected, expected_ids = scored(333)
    np.testing.assert_allclose(lines, expected, rtol=0, atol=1e-5)
    assert np.array_equal(ids, expected_ids)


def test_documents_are_scored_alone(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    together = compare(opened.knn_lm, opened.store, held).per_token
    for number, document in enumerate(held):
        if len(document.ids) > 1:
            alone = compare(opened.knn_lm, opened.store, [document]).per_token
            np.testing.assert_allclose(alone.logprob, together.logprob[together.doc == number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("documents", [19, 20])
def test_clusters_are_documents_or_blocks_where_documents_are_few(documents: int, opened: OpenedKNNLM) -> None:
    texts = tiny_corpus(documents - 1, seed=4)
    tokenizer = opened.knn_lm.tokenizer
    all_of_it = [np.array(tokenizer.encode(text), np.int32) for text in [*texts, "".join(tiny_corpus(12, seed=5))]]
    held = [TokenizedDocument(document, ids, None) for document, ids in zip(Corpus([Path(__file__)]), all_of_it[:1], strict=True)]
    held = [TokenizedDocument(held[0].document, ids, None) for ids in all_of_it]
    found = compare(opened.knn_lm, opened.store, held, mixture=Mixture(k=4))
    per_token = found.per_token
    names = per_token.doc.astype(np.int64)
    if documents < 20:
        names = names * 1_000_000 + per_token.position // TOKENS_PER_CLUSTER
        assert len(all_of_it[-1]) > 2 * TOKENS_PER_CLUSTER
    assert found.clusters == ("documents" if documents == 20 else "blocks of 256 tokens")
    clusters = np.unique(names, return_inverse=True)[1]
    for result, values in ((found.base, per_token.lm_logprob), (found.knn, per_token.logprob)):
        assert result.standard_error == pytest.approx(result.value * ratio_error(values, clusters), rel=1e-5)
        assert result.bits_per_byte is None
    paired = ratio_error(per_token.lm_logprob.astype(np.float64) - per_token.logprob, clusters)
    assert found.change_standard_error == pytest.approx(found.knn.value / found.base.value * paired, rel=1e-3)


def ratio_error(values: Any, clusters: npt.NDArray[np.int64]) -> float:
    """Standard error of a ratio of cluster totals, token by token (Cochran, Sampling Techniques, section 6.4)."""
    total, mean, groups = 0.0, float(np.mean(values, dtype=np.float64)), sorted(set(clusters.tolist()))
    for cluster in groups:
        total += (values[clusters == cluster].astype(np.float64) - mean).sum() ** 2
    return math.sqrt(total * len(groups) / (len(groups) - 1)) / len(values)


TEXTS = ["Zoë paid 3 € for a café.\n農夫 🙂", "plain", "The old king."]


@pytest.mark.parametrize(("bos", "eos"), [("no", False), ("yes", False), ("yes", True), ("no", True)])
def test_bits_per_byte_by_hand(bos: str, eos: bool, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    """Bits of the scored tokens over the UTF-8 bytes that they stand for: all with BOS, else without the first token's."""
    corpus = text_folder(tmp_path / "corpus", TEXTS)
    build(corpus, tmp_path / "store", gpt2, index="Flat", bos=bos, eos=eos)
    opened = open_store(tmp_path / "store")
    held = list(tokenize(Corpus([corpus]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))
    found = compare(opened.knn_lm, opened.store, held, mixture=Mixture(k=4, weight=0.25))
    scored = 0
    for text in TEXTS:
        first = tiny_tokenizer().encode(text, add_special_tokens=False)[0]
        whole = len(text.encode("utf-8"))
        scored += whole if bos == "yes" else whole - len(str(tiny_tokenizer().decode([first])).encode("utf-8"))
    for result, log_probs in ((found.base, found.per_token.lm_logprob), (found.knn, found.per_token.logprob)):
        bits = -log_probs.astype(np.float64).sum() / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / scored, rel=1e-6)


def test_the_text_itself_in_the_store_is_reported(opened: OpenedKNNLM, gpt2: HFLanguageModel, held: list[TokenizedDocument]) -> None:
    other = compare(opened.knn_lm, opened.store, held)
    documents = Corpus([opened.store.path.parent / "corpus"])
    text = list(tokenize(documents, opened.knn_lm.tokenizer, opened.model.vocabulary_size))
    same = compare(opened.knn_lm, opened.store, text, auto_exclude=False)
    assert same.overlap == 1
    assert other.overlap < 0.5


def test_nothing_to_compare_is_refused(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    for documents in ([], held[:1]):
        with pytest.raises(CorpusError, match="nothing to compare"):
            compare(opened.knn_lm, opened.store, documents)


def test_progress_ends_at_the_number_of_tokens(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    seen: list[int] = []
    found = compare(opened.knn_lm, opened.store, held, batch_tokens=50, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == found.tokens == sum(len(document.ids) - 1 for document in held)
    assert len(seen) > 2


def test_the_command_prints_and_writes_it(
    opened: OpenedKNNLM, held_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores"
    flags = ["--k", "4", "--knn-temperature", "20", "--weight", "0.3", "--per-token", str(file)]
    assert knnlm("compare", opened.store.path, "--text", held_folder, *flags, "--json") == 0
    said = json.loads(capsys.readouterr().out)["stores"][0]
    held = list(tokenize(Corpus([held_folder]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))
    expected = compare(opened.knn_lm, opened.store, held, mixture=Mixture(4, 20.0, 0.3))
    for name in ("base", "knn"):
        assert set(said[name]) == {"value", "standard_error", "bits_per_byte", "tokens_per_second"}
        assert said[name]["value"] == getattr(expected, name).value
        assert said[name]["tokens_per_second"] > 0
    assert said["settings"]["model"] == opened.model.name
    assert {"k", "knn_temperature", "weight", "overfetch", "max_length", "stride", "index", "entries", "key_layer", "dtype"} <= set(
        said["settings"]
    )
    # Under exactly the name that was given.
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    arrays = dict(np.load(file))
    assert {name: array.dtype for name, array in arrays.items()} == {
        **dict.fromkeys(("doc", "token_id", "lm_best", "best"), np.int32),
        **dict.fromkeys(("position", "neighbor_ids", "supporter", "frequency"), np.int64),
        **dict.fromkeys(("lm_logprob", "knn_logprob", "logprob", "weight", "nearest", "lm_best_logprob", "best_logprob"), np.float32),
        **dict.fromkeys(("searched", "contaminated"), np.bool_),
    }
    for name, array in arrays.items():
        assert np.array_equal(array, getattr(expected.per_token, name))


def test_infinite_values_are_null_in_json(opened: OpenedKNNLM, held_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("compare", opened.store.path, "--text", held_folder, "--weight", "1", "--k", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["stores"][0]
    assert said["knn"]["value"] is None
    assert said["knn"]["standard_error"] is None
    assert said["base"]["value"] > 1


def test_the_table_says_what_was_used(opened: OpenedKNNLM, held_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("compare", opened.store.path, "--text", held_folder) == 0
    out = capsys.readouterr().out
    for said in (
        "base LM",
        "kNN-LM",
        "bits/byte",
        "tokens/s",
        "k=64",
        "kNN temperature=10",
        "weight=0.2 (defaults)",
        "windows of 16 tokens, stride 6",
    ):
        assert said in out


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--k", "0"], 2, "--k is 0"),
        (["--knn-temperature", "0"], 2, "--knn-temperature is 0"),
        (["--knn-temperature", "nan"], 2, "--knn-temperature is nan"),
        (["--weight", "1.5"], 2, "--weight is 1.5"),
        (["--weight", "nan"], 2, "--weight is nan"),
        (["--dtype", "int8"], 2, "--dtype is 'int8'"),
        (["--device", "gpu0"], 2, "--device is 'gpu0'"),
        (["--split-documents", "("], 2, "--split-documents"),
        (["--per-token", "/nowhere/at/all.npz"], 2, "there is no folder /nowhere/at"),
        (["--report", "."], 2, "--report is ., which is a folder; name a file"),
        (["--text", "/nowhere/at/all"], 1, "There is no file or folder /nowhere/at/all"),
    ],
)
def test_what_cannot_be_used_is_named(
    flags: list[str], status: int, said: str, opened: OpenedKNNLM, held_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert knnlm("compare", opened.store.path, "--text", held_folder, *flags) == status
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_windows_and_special_tokens_are_those_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that adds BOS: held-out text gets it where the store's documents got it, and not otherwise."""
    path = save(tiny_gpt2(), tiny_tokenizer(adds_bos=True), tmp_path / "model")
    corpus = text_folder(tmp_path / "corpus", TEXTS)
    tokens = sum(len(tiny_tokenizer().encode(text, add_special_tokens=False)) for text in TEXTS)
    for bos, scored in (("auto", tokens), ("no", tokens - len(TEXTS))):
        build(corpus, tmp_path / bos, HFLanguageModel.load(path), index="exact", bos=bos, max_length=8)
        assert knnlm("compare", tmp_path / bos, "--text", corpus, "--json") == 0
        said = json.loads(capsys.readouterr().out)["stores"][0]
        assert (said["tokens"], said["settings"]["max_length"], said["settings"]["stride"]) == (scored, 8, 4)


def test_the_store_is_only_read(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    before = {path: path.stat().st_mtime_ns for path in opened.store.path.rglob("*")}
    result: Comparison = compare(opened.knn_lm, opened.store, held)
    assert result.tokens
    assert {path: path.stat().st_mtime_ns for path in opened.store.path.rglob("*")} == before
    Datastore.open(opened.store.path, verify=True)

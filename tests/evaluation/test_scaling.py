"""``knnlm scaling``: a part of a datastore is what a datastore of those documents is; k, λ and settings are what they are said to be."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.removal import remove_documents
from knnlm.errors import CorpusError, InvalidInput
from knnlm.evaluation.compare import compare
from knnlm.evaluation.plotting import svg
from knnlm.evaluation.scaling import Options, Scaling, measure_scaling
from knnlm.evaluation.scaling_plot import scaling_plot
from knnlm.evaluation.subsets import nested_subsets
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus

SETTINGS: dict[str, Any] = {"keys": "float32", "max_length": 16}
MIXTURE = {"k": 8, "temperature": 5.0, "weight": 0.3}


@pytest.fixture(scope="module")
def folder(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    corpus = text_folder(folder / "corpus", tiny_corpus(12))
    text_folder(folder / "held", tiny_corpus(3, seed=7))
    text_folder(folder / "valid", tiny_corpus(3, seed=8))
    build(corpus, folder / "exact", gpt2, index="exact", **SETTINGS)
    build(corpus, folder / "ivf", gpt2, index="IVF8,SQ8", **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def exact(folder: Path) -> OpenedKNNLM:
    return open_store(folder / "exact", **MIXTURE)


def texts(opened: OpenedKNNLM, folder: Path, name: str) -> list[TokenizedDocument]:
    return opened.read(opened.corpus(folder / name))


def documents_of(opened: OpenedKNNLM, allowed: Any) -> set[str]:
    """Ids of the documents of which any entry may be found; a document is in as a whole."""
    store, found = opened.store, set()
    for number in range(len(store.documents)):
        first, last = store.documents.entry_range(number)
        rows = [True] * (last - first) if allowed is None else allowed.rows(first, last).tolist()
        assert len(set(rows)) <= 1
        if any(rows):
            found.add(store.documents[number].id)
    return found


@given(shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_subsets_are_nested_and_near_to_their_share(exact: OpenedKNNLM, shares: list[float], seed: int) -> None:
    subsets = nested_subsets(exact.store, shares, seed)
    members = [documents_of(exact, subset.mask) for subset in subsets]
    assert all(small < large for small, large in itertools.pairwise(members))
    largest = int(exact.store.documents.token_counts.max()) - 1
    for share in shares:
        wanted = share * exact.store.manifest.live_entries
        assert min(abs(subset.entries - wanted) for subset in subsets) <= largest
    for subset, documents in zip(subsets, members, strict=True):
        assert subset.documents == len(documents)
        assert subset.entries == (len(exact.store) if subset.mask is None else subset.mask.allowed)
    assert [s.entries for s in nested_subsets(exact.store, shares, seed)] == [s.entries for s in subsets]


def test_removed_documents_are_in_no_subset(gpt2: HFLanguageModel, folder: Path, tmp_path: Path) -> None:
    build(folder / "corpus", tmp_path / "store", gpt2, index="exact", **SETTINGS)
    gone = open_store(tmp_path / "store").store.documents[3].id
    remove_documents(tmp_path / "store", [gone], [])
    opened = open_store(tmp_path / "store")
    for subset in nested_subsets(opened.store, [0.3, 0.7, 1.0], 0):
        assert gone not in documents_of(opened, subset.mask)
    assert subset.entries == opened.store.manifest.live_entries


def test_a_part_of_a_datastore_is_a_datastore_of_those_documents(
    exact: OpenedKNNLM, folder: Path, gpt2: HFLanguageModel, tmp_path: Path
) -> None:
    held = texts(exact, folder, "held")
    found = measure_scaling(exact, held, options=Options(shares=(0.3, 1.0), ks=(2, 8), seed=3))
    subset = nested_subsets(exact.store, [0.3], 3)[0]
    chosen = documents_of(exact, subset.mask)
    build([folder / "corpus" / name for name in sorted(chosen)], tmp_path / "part", gpt2, index="exact", **SETTINGS)
    for store, entries in ((open_store(tmp_path / "part"), subset.entries), (exact, len(exact.store))):
        for k in (2, 8):
            expected = compare(store.knn_lm, store.store, held, mixture=Mixture(k, MIXTURE["temperature"], MIXTURE["weight"]))
            (point,) = (point for point in found.at_k(k) if point.entries == entries)
            assert point.fixed.perplexity == pytest.approx(expected.knn.value, rel=1e-5)
            assert point.fixed.standard_error == pytest.approx(expected.knn.standard_error, rel=1e-4)
            assert point.fixed.change == pytest.approx(expected.change, abs=1e-5)
            assert point.fixed.change_standard_error == pytest.approx(expected.change_standard_error, rel=1e-3)
    assert found.base.perplexity == pytest.approx(expected.base.value, rel=1e-6)
    assert (found.base.change, found.base.weight) == (0, 0)


def test_the_fitted_weight_is_the_best_of_all_on_the_calibration_text(exact: OpenedKNNLM, folder: Path) -> None:
    held, valid = texts(exact, folder, "held"), texts(exact, folder, "valid")
    options = Options(shares=(0.4, 1.0), ks=(8,))
    found = measure_scaling(exact, held, valid, options)
    on_valid = measure_scaling(exact, valid, options=options)
    assert found.calibration_tokens == on_valid.tokens
    for point, same in zip(found.points, on_valid.points, strict=True):
        assert point.refitted is not None
        assert same.refitted is None

        near = [point.refitted.weight + step for step in (-0.02, 0.0, 0.02)]
        losses = [loss_at(folder, valid, options, weight, point.entries) for weight in near if 0 <= weight < 1]
        assert min(losses) >= loss_at(folder, valid, options, point.refitted.weight, point.entries) - 1e-9


def loss_at(folder: Path, text: list[TokenizedDocument], options: Options, weight: float, entries: int) -> float:
    opened = open_store(folder / "exact", **{**MIXTURE, "weight": weight})
    (point,) = measure_scaling(opened, text, options=options).at_size(entries)
    return math.log(point.fixed.perplexity)


def test_settings_that_look_everywhere_are_exact(folder: Path) -> None:
    opened = open_store(folder / "ivf", **MIXTURE)
    nlist = opened.retriever.index.nlist
    held = texts(opened, folder, "held")
    found = measure_scaling(opened, held, options=Options(shares=(1.0,), ks=(8,), settings=[(1, 1.0), (nlist, 8.0)], exact_tokens=50))
    by_setting = {(point.probes, point.overfetch): point for point in found.settings}
    everywhere, little = by_setting[nlist, 8.0], by_setting[1, 1.0]
    assert (everywhere.total_variation, everywhere.recall) == (pytest.approx(0, abs=1e-6), 1)
    assert little.total_variation > everywhere.total_variation
    assert little.recall < 1
    assert found.reference_tokens == 50
    assert [point.own for point in found.settings].count(True) == 1
    exactly = measure_scaling(open_store(folder / "exact", **MIXTURE), held, options=Options(shares=(1.0,), ks=(8,)))
    assert everywhere.measured.perplexity == pytest.approx(exactly.points[0].fixed.perplexity, rel=1e-5)
    assert exactly.settings == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(shares=(0.0,)), "size: is 0"),
        (Options(shares=(1.5,)), "size: is 1.5"),
        (Options(ks=(0,)), "k: is 0"),
        (Options(settings=[(9, 1.0)]), "setting: has 9 probes, but the index has 8 cells"),
        (Options(settings=[(4, 0.5)]), "over-fetch 0.5"),
    ],
)
def test_what_cannot_be_measured_is_named(folder: Path, options: Options, said: str) -> None:
    opened = open_store(folder / "ivf", **MIXTURE)
    with pytest.raises(InvalidInput, match=said):
        measure_scaling(opened, texts(opened, folder, "held"), options=options)


def test_a_setting_of_an_exact_index_and_a_text_without_tokens_are_refused(exact: OpenedKNNLM, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="compares every key"):
        measure_scaling(exact, texts(exact, folder, "held"), options=Options(settings=[(1, 1.0)]))
    with pytest.raises(CorpusError, match="no document has at least two tokens"):
        measure_scaling(exact, [])


def test_the_batch_changes_nothing(exact: OpenedKNNLM, folder: Path) -> None:
    held = texts(exact, folder, "held")
    options = Options(shares=(0.5,), ks=(4,))
    one, other = (measure_scaling(exact, held, options=options, batch_tokens=tokens) for tokens in (20, 4096))
    assert [p.fixed.perplexity for p in one.points] == pytest.approx([p.fixed.perplexity for p in other.points], rel=1e-5)


def scaled(folder: Path) -> Scaling:
    opened = open_store(folder / "ivf", **MIXTURE)
    return measure_scaling(
        opened, texts(opened, folder, "held"), texts(opened, folder, "valid"), Options(shares=(0.3, 1.0), ks=(2,), exact_tokens=20)
    )


def test_the_plot_has_a_panel_for_each_question_and_is_the_same_twice(folder: Path) -> None:
    found = scaled(folder)
    assert len(scaling_plot(found).axes) == 3
    assert svg(scaling_plot(found), "a", "p") == svg(scaling_plot(found), "a", "p")


def test_the_command_prints_and_plots(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["scaling", folder / "ivf", "--text", folder / "held", "--calibrate-text", folder / "valid", "--size", "0.5", "--size", "1"]
    line += ["--k", "4", "--setting", "2:2", "--exact-tokens", "20", "--mixture-k", "8"]
    for name in ("plot.svg", "plot.png"):
        assert knnlm(*line, "--plot", tmp_path / name, "--json") == 0
        assert (tmp_path / name).stat().st_size > 1000
    said = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert said["format"] == 1
    assert [point["k"] for point in said["points"]] == [4, 8, 4, 8]
    assert said["points"][0]["documents"] < said["points"][-1]["documents"] == 12
    assert (2, 2.0) in [(p["probes"], p["overfetch"]) for p in said["settings"]]
    assert len(said["settings"]) <= 2
    assert knnlm(*line) == 0
    out = capsys.readouterr().out
    for words in ("Datastore size, k=8", "Neighbours,", "Search settings, k=8", "base LM: perplexity", "λ fitted on"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--plot", "plot.txt"], "--plot is plot.txt, but its name must end in .svg, .png, .pdf"),
        (["--plot", "/nowhere/at/all.svg"], "there is no folder /nowhere/at"),
        (["--setting", "some"], "--setting is 'some'"),
        (["--size", "2"], "--size is 2"),
    ],
)
def test_options_that_cannot_be_used_are_named(folder: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("scaling", folder / "ivf", "--text", folder / "held", *flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_shares_of_one_document_are_one_size(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    build(text_folder(tmp_path / "corpus", tiny_corpus(1)), tmp_path / "store", gpt2, index="exact", **SETTINGS)
    subsets = nested_subsets(open_store(tmp_path / "store").store, (0.01, 0.5, 1.0), 0)
    assert [(subset.documents, subset.mask) for subset in subsets] == [(1, None)]
    assert np.isclose(subsets[0].entries, len(open_store(tmp_path / "store").store))

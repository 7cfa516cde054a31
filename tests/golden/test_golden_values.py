"""The product reproduces an independent exact implementation: base LM, neighbours, mixtures and perplexities.

Values and their conventions: ``../shared/data/golden/README.md``. Tolerances: base 1e-4; mixture 1e-3 at the 99.5th
percentile and 2e-2 at most (a neighbour swapped at the k-th place); perplexity 0.1 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.distribution import knn_token_log_probs
from knnlm.evaluation.scoring import score
from knnlm.interpolation import effective_weight, interpolate
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.neighbors import Neighbors
from knnlm.opening import OpenedKNNLM, open_store
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GOLDEN = DATA / "golden"
CASES = ("wt2-gpt2", "wt2-llama")
KEY_LAYERS = {"ffn": "last_ffn_input", "final": "last_hidden"}
NEIGHBORS, TEMPERATURES, WEIGHTS = (8, 64, 1024), (1, 10, 100), (0.1, 0.25, 0.4)
SETTINGS = [pytest.param(k, t, id=f"k{k}-T{t}") for k in NEIGHBORS for t in TEMPERATURES]

Floats = npt.NDArray[np.float64]

# The golden neighbours and queries are those of last_ffn_input.
FEED_FORWARD = pytest.mark.parametrize("run", [(case, "ffn") for case in CASES], ids="-".join, indirect=True, scope="module")

pytestmark = [pytest.mark.golden, pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden values are not at {GOLDEN}")]


class Silent:
    def update(self, stage: str, done: int, total: int | None) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """One case with one key layer: the store as opened, and what the product said of the 2,000 tokens."""

    case: Path
    key: str
    opened: OpenedKNNLM
    targets: torch.Tensor
    lm: torch.Tensor
    neighbors: Neighbors

    def golden(self, name: str) -> Floats:
        found: Floats = np.load(self.case / f"{name}.npy")
        return found


@pytest.fixture(scope="module", params=[(case, key) for case in CASES for key in KEY_LAYERS], ids="-".join)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Build the store once and search once, with the largest k: fewer neighbours are the first of these."""
    name, key = request.param
    case, store = GOLDEN / name, tmp_path_factory.mktemp("golden") / "store"
    config = json.loads((case / "config.json").read_text())
    model = HFLanguageModel.load(DATA / "models" / config["model"], key_layer=KEY_LAYERS[key])
    settings = BuildSettings(index="Flat", keys="float32", max_length=config["max_length"], stride=config["stride"])
    build_datastore([case / "datastore_tokens.npy"], store, model, settings, Silent())
    opened = open_store(store)
    tokens = np.load(case / "tokens.npy")
    n = len(tokens) - 1
    lm, neighbors = torch.empty(n), Neighbors.empty(n, max(NEIGHBORS))
    for batch in score(opened.knn_lm, [tokens], opened.store.manifest.windowing, Mixture(k=max(NEIGHBORS))):
        lm[batch.rows] = batch.lm_log_probs
        found = batch.neighbors
        neighbors.distances[batch.rows], neighbors.tokens[batch.rows], neighbors.ids[batch.rows] = found.distances, found.tokens, found.ids
    yield Run(case, key, opened, torch.from_numpy(tokens[1:].astype(np.int64)), lm, neighbors)
    # 270 MB each.
    for file in [*store.rglob("keys.npy"), *store.rglob("*.faiss")]:
        file.unlink()


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    def note(name: str, value: float) -> None:
        record_property(name, float(value))  # plain, so that it can pass between processes
        print(f"{name}: {value:.3g}")

    return note


def test_every_token_but_the_first_is_an_entry(run: Run) -> None:
    counts = run.opened.store.manifest.counts
    assert (counts.documents, counts.tokens, counts.entries) == (1, 131_072, 131_071)


def test_base_log_probabilities(run: Run, report: Callable[[str, float], None]) -> None:
    deviation = np.abs(run.lm.double().numpy() - run.golden("base_logprobs"))
    report("base: largest deviation", deviation.max())
    assert deviation.max() < 1e-4
    assert perplexity(run.lm.double().numpy()) == pytest.approx(table(run)["base_ppl"], rel=1e-3)


@pytest.mark.parametrize(("k", "temperature"), SETTINGS)
def test_mixture_and_perplexity(run: Run, k: int, temperature: int, report: Callable[[str, float], None]) -> None:
    nearest = run.neighbors.nearest(k)
    knn = knn_token_log_probs(nearest, temperature, run.targets)
    base, golden_knn = run.golden("base_logprobs"), run.golden(f"knn_logprobs_{run.key}_k{k}_T{temperature}")
    expected_row = next(row for row in table(run)["table"] if (row["key"], row["k"], row["T"]) == (run.key, k, temperature))
    if temperature > 1:
        # The table counts probabilities above 0 in float64; at T = 1 those of far neighbours are too small for it.
        assert float((nearest.tokens == run.targets[:, None]).any(1).double().mean()) == pytest.approx(expected_row["hit"], abs=1e-3)
    for weight in WEIGHTS:
        weights = effective_weight(torch.full((len(knn),), weight, dtype=torch.float64), nearest.found)
        mixed = interpolate(run.lm, knn, weights).double().numpy()
        deviation = np.abs(mixed - np.logaddexp(np.log1p(-weight) + base, np.log(weight) + golden_knn))
        report(f"weight {weight}: 99.5th percentile", float(np.quantile(deviation, 0.995)))
        report(f"weight {weight}: largest", deviation.max())
        assert np.quantile(deviation, 0.995) < 1e-3
        assert deviation.max() < 2e-2
        assert perplexity(mixed) == pytest.approx(expected_row[f"ppl_l{weight}"], rel=1e-3)


@FEED_FORWARD
def test_keys_and_neighbors_of_the_first_hundred(run: Run, report: Callable[[str, float], None]) -> None:
    golden = np.load(run.case / "neighbors_first100.npz")
    width = golden["ids"].shape[1]
    stored = run.opened.store.keys.slice(0, 100).numpy()
    report("datastore keys: largest deviation", float(np.abs(stored - golden["datastore_keys_first100"]).max()))
    np.testing.assert_allclose(stored, golden["datastore_keys_first100"], rtol=0, atol=1e-5 * np.abs(stored).max())
    for how, found in {
        "text scored": run.neighbors.nearest(width),
        "golden queries": run.opened.knn_lm.retriever.retrieve(torch.from_numpy(golden["query_keys"]), width),
    }.items():
        ids, distances = found.ids[:100].numpy(), found.distances[:100].numpy()
        report(f"{how}: share of equal ids", float((ids == golden["ids"]).mean()))
        report(f"{how}: largest deviation of distances", float(np.abs(distances - golden["d2"]).max()))
        np.testing.assert_allclose(distances, golden["d2"], rtol=1e-4, atol=1e-3)
        # Neighbours that are equally far within the precision of float32 may change places.
        assert (ids == golden["ids"]).mean() > 0.999


@FEED_FORWARD
def test_queries_equal_the_golden_ones(run: Run) -> None:
    golden = np.load(run.case / "neighbors_first100.npz")["query_keys"]
    tokens = torch.from_numpy(np.load(run.case / "tokens.npy")[:100].astype(np.int64))
    keys = run.opened.model.forward(tokens[None], logits=False).keys[0].numpy()
    np.testing.assert_allclose(keys, golden, rtol=0, atol=1e-5 * np.abs(golden).max())


@FEED_FORWARD
def test_the_command_writes_the_same(run: Run, tmp_path: Path, report: Callable[[str, float], None]) -> None:
    """``knnlm compare --per-token`` from end to end, for one setting: here each row is searched with its own k."""
    k, temperature, weight, file = 64, 10, 0.25, tmp_path / "per_token.npz"
    command = [sys.executable, "-m", "knnlm", "compare", str(run.opened.store.path), "--text", str(run.case / "tokens.npy"), "--json"]
    command += ["--k", str(k), "--knn-temperature", str(temperature), "--weight", str(weight), "--per-token", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = dict(np.load(file))
    base = run.golden("base_logprobs")
    golden = np.logaddexp(np.log1p(-weight) + base, np.log(weight) + run.golden(f"knn_logprobs_{run.key}_k{k}_T{temperature}"))
    deviation = np.abs(rows["logprob"] - golden)
    report("command: 99.5th percentile", float(np.quantile(deviation, 0.995)))
    report("command: largest", float(deviation.max()))
    assert np.array_equal(rows["position"], np.arange(1, 2001))
    assert np.array_equal(rows["token_id"], run.targets.numpy())
    assert np.abs(rows["lm_logprob"] - base).max() < 1e-4
    assert np.quantile(deviation, 0.995) < 1e-3
    assert deviation.max() < 2e-2
    said, expected = json.loads(done.stdout)["stores"][0], table(run)
    row = next(row for row in expected["table"] if (row["key"], row["k"], row["T"]) == (run.key, k, temperature))
    assert said["base"]["value"] == pytest.approx(expected["base_ppl"], rel=1e-3)
    assert said["knn"]["value"] == pytest.approx(row[f"ppl_l{weight}"], rel=1e-3)


def table(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.case / "reference_table.json").read_text())
    return found


def perplexity(log_probs: Floats) -> float:
    return float(np.exp(-log_probs.mean()))

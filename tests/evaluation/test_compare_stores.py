"""Several datastores in one command: each its own figures, pairs token by token, and what is printed and written."""

from __future__ import annotations

import csv
import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.datastore.profile import Profile
from knnlm.evaluation.compare_stores import OpenComparison, compare_stores
from knnlm.evaluation.comparison_files import CSV_COLUMNS
from knnlm.evaluation.comparison_json import SCHEMA_VERSION
from knnlm.gate import LM_FEATURES, Network, SkipRule
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store, profile_facts
from tests.gates import constant_gate
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "compare.schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float)}


@pytest.fixture(scope="module")
def folder(gpt2: HFLanguageModel, llama: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a`` and ``b`` of one model and different text, ``bos`` of another model, whose tokenizer adds a token of its own."""
    folder = tmp_path_factory.mktemp("stores")
    settings: dict[str, Any] = {"index": "Flat", "keys": "float32", "max_length": 32, "stride": 16}
    build(text_folder(folder / "corpus-a", tiny_corpus(5)), folder / "a", gpt2, **settings)
    build(text_folder(folder / "corpus-b", tiny_corpus(3, seed=5)), folder / "b", gpt2, **settings)
    build(folder / "corpus-a", folder / "bos", llama, **settings)
    text_folder(folder / "text", tiny_corpus(3, seed=9))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert knnlm("compare", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def test_each_store_has_the_figures_that_it_has_alone(folder: Path) -> None:
    found = compare_stores([folder / "a", folder / "b"], [folder / "text"])
    assert [store.name for store in found.stores] == [str(folder / "a"), str(folder / "b")]
    for store in found.stores:
        alone = open_store(store.name).compare(folder / "text")
        assert np.array_equal(store.comparison.per_token.logprob, alone.per_token.logprob)
        assert (store.comparison.knn.value, store.comparison.interval) == (alone.knn.value, alone.interval)


def test_stores_of_one_tokenizer_are_paired_token_by_token(folder: Path) -> None:
    found = compare_stores([folder / "a", folder / "b", folder / "a"], [folder / "text"])
    assert found.one_tokenizer
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2)]
    a, b = (store.comparison.per_token.logprob.astype(np.float64) for store in found.stores[:2])
    pair, same = found.pairs
    assert pair.change == pytest.approx(math.exp(-b.mean()) / math.exp(-a.mean()) - 1)
    assert (pair.better, pair.worse) == ((b > a).mean(), (b < a).mean())
    assert pair.interval.low < pair.change < pair.interval.high
    assert (same.change, same.interval.low, same.interval.high, same.better, same.worse) == (0, 0, 0, 0, 0)


def test_other_tokens_are_not_paired_and_a_sentence_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_stores([folder / "a", folder / "bos"], [folder / "text"])
    assert found.pairs == ()
    assert knnlm("compare", folder / "a", folder / "bos", "--text", folder / "text", "--no-baselines") == 0
    out = " ".join(capsys.readouterr().out.split())
    if found.one_tokenizer:
        assert "not all of these datastores score the same tokens" in out
    else:
        assert "the tokenizers differ, so perplexities of these datastores do not compare; bits per byte do" in out


def test_one_store_is_open_at_a_time(folder: Path) -> None:
    seen: list[weakref.ref[Any]] = []

    def visit(found: OpenComparison) -> None:
        gc.collect()
        assert [each() for each in seen] == [None] * len(seen)
        seen.append(weakref.ref(found.opened.model))

    compare_stores([folder / "a", folder / "b", folder / "a"], [folder / "text"], visit=visit)
    assert len(seen) == 3


def test_a_document_is_left_out_where_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = (folder / "a", folder / "b", "--text", folder / "text", "--no-baselines")
    found = said(capsys, *stores, "--exclude-document", "story-0004.txt", "--exclude-document", "story-0001.txt")
    excluded = [[document["id"] for document in store["leakage"]["excluded"]] for store in found["stores"]]
    assert excluded == [["story-0001.txt", "story-0004.txt"], ["story-0001.txt"]]
    assert knnlm("compare", *stores, "--exclude-document", "nowhere") == 1
    assert capsys.readouterr().err == "error: No datastore holds a document of this id: 'nowhere'.\n"


def test_a_store_that_is_missing_is_said_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("compare", folder / "a", folder / "nowhere", "--text", folder / "text") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_per_token_figures_of_several_stores_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scores.npz"
    assert knnlm("compare", folder / "a", folder / "b", "--text", folder / "text", "--per-token", file) == 2
    assert "--per-token writes the figures of one datastore" in capsys.readouterr().err
    assert not file.exists()


def test_no_store_is_refused() -> None:
    with pytest.raises(Exception, match="stores: is empty"):
        compare_stores([], ["text"])


@pytest.mark.parametrize("flags", [[], ["--no-baselines"], ["--weight", "1", "--k", "1"], ["--weight", "0"]], ids=str)
def test_json_is_what_its_schema_says(flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, folder / "a", folder / "b", "--text", folder / "text", *flags)
    assert found["schema_version"] == SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert list(problems(found, SCHEMA, "$")) == []
    assert len(found["stores"][0]["baselines"]) == (0 if flags == ["--no-baselines"] else 2)


def test_the_schema_refuses_what_is_not_in_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = said(capsys, folder / "a", "--text", folder / "text")
    assert list(problems(content, SCHEMA, "$")) == []
    del content["stores"][0]["leakage"]["excluded"]
    content["stores"][0]["cost"]["forward"] = "most"
    content["pairs"] = {}
    content["more"] = 1
    assert len(list(problems(content, SCHEMA, "$"))) == 4


def problems(value: Any, schema: dict[str, Any], where: str) -> Any:
    """Where ``value`` is not as the keywords of the schema that it uses say."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema and all(list(problems(value, option, where)) for option in schema["anyOf"]):
        yield f"{where}: none of the options"
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        yield f"{where}: {value!r}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds):
        yield f"{where}: {type(value).__name__}"
        return
    if isinstance(value, int | float) and not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        yield f"{where}: {value}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{where}: no {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            further = known.get(name, schema.get("additionalProperties", {}))
            if further is False:
                yield f"{where}: {name}"
            else:
                yield from problems(item, further, f"{where}.{name}")
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), f"{where}[{place}]")


def test_csv_and_markdown_hold_the_same_figures_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--csv", str(tmp_path / "table.csv"), "--markdown", str(tmp_path / "table.md")]
    found = said(capsys, folder / "a", folder / "b", "--text", folder / "text", *files)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == CSV_COLUMNS
    for store in found["stores"]:
        own = [row for row in rows if row["datastore"] == store["name"]]
        whole = own[0]
        assert (whole["table"], whole["group"], int(whole["tokens"])) == ("all", "all", store["tokens"])
        assert float(whole["perplexity"]) == store["knn"]["value"]
        assert float(whole["change_low"]) == store["change_interval"]["low"]
        for breakdown in store["breakdowns"]:
            theirs = [(row["group"], int(row["tokens"]), float(row["change"])) for row in own if row["table"] == breakdown["by"]]
            assert theirs == [(group["name"], group["tokens"], group["change"]) for group in breakdown["groups"]]
        baselines = {row["group"]: float(row["perplexity"]) for row in own if row["table"] == "baseline"}
        assert baselines == {each["name"]: each["perplexity"]["value"] for each in store["baselines"]}
    markdown = (tmp_path / "table.md").read_text()
    for store in found["stores"]:
        name, value = store["name"], store["knn"]["value"]
        assert f"| `{name}` | kNN-LM | {value:.2f} |" in markdown
        assert f"## `{name}`" in markdown
        assert all(f"### Perplexity by {breakdown['title']}" in markdown for breakdown in store["breakdowns"])
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.count(" | ") >= 4


def test_ids_reach_the_terminal_as_they_are_but_for_what_steers_it(
    folder: Path, gpt2: HFLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_corpus(1, seed=9)[0]
    for name in ("corpus", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(json.dumps({"id": "[red]x[/red]\x1b[2J", "text": text}) + "\n")
    (tmp_path / "text" / "b.txt").write_text(text)
    build(tmp_path / "corpus", tmp_path / "store", gpt2, index="Flat")
    assert knnlm("compare", tmp_path / "store", "--text", tmp_path / "text", "--no-baselines") == 0
    out = capsys.readouterr().out
    assert "left out because the text has the same: [red]x[/red]␛[2J\n" in out
    assert "\x1b" not in out


def test_figures_of_a_comparison_are_consistent(folder: Path) -> None:
    found = open_store(folder / "a").compare(folder / "text", mixture=Mixture(8, 20.0, 0.4), baselines=True)
    per_token, gain = found.per_token, found.per_token.gain.astype(np.float64)
    for breakdown in found.breakdowns:
        assert sum(group.tokens for group in breakdown.groups) == found.tokens
        loss = sum(group.tokens * math.log(group.knn) for group in breakdown.groups) / found.tokens
        assert math.exp(loss) == pytest.approx(found.knn.value, rel=1e-6)
    assert int(found.difference.histogram.counts.sum()) == found.tokens
    for place, count in enumerate(found.difference.histogram.counts.tolist()):
        low, high = found.difference.histogram.edges[place : place + 2]
        last = place == len(found.difference.histogram.counts) - 1
        lowest, highest = (-math.inf if place == 0 else low), (math.inf if last else high)
        assert count == ((gain >= lowest) & (gain < highest)).sum()
    assert found.difference.mean == pytest.approx(gain.mean(), rel=1e-6)
    assert found.interval.low == pytest.approx(math.expm1(-found.difference.interval.high))
    assert found.interval.low < found.change < found.interval.high
    assert found.cost.forward + found.cost.search + found.cost.mixing == pytest.approx(1)
    assert (found.mean_weight, found.skipped, found.gated) == (pytest.approx(0.4), 0, False)
    assert found.knn_reliability.accuracy == (per_token.best == per_token.token_id).mean()
    assert (per_token.best_logprob >= per_token.logprob - 1e-5).all()
    assert (per_token.lm_best_logprob >= per_token.lm_logprob).all()
    for baseline in found.baselines.values():
        assert baseline.perplexity.value == pytest.approx(math.exp(-baseline.log_probs.mean(dtype=np.float64)))
        assert baseline.change == pytest.approx(baseline.perplexity.value / found.base.value - 1)
        assert baseline.knn_change == pytest.approx(found.knn.value / baseline.perplexity.value - 1)


def test_an_adaptive_weight_is_said_and_kept_where_documents_are_left_out(folder: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(folder / "a", tmp_path / "store"))
    opened = open_store(store)
    facts = profile_facts(opened.store, opened.model.dtype, opened.retriever.index)
    best = opened.compare(folder / "text").per_token.lm_best_logprob
    # Searched where the LM is surer than in half of the places.
    picks = tuple(float(name == "lm_max_log_prob") for name in LM_FEATURES)
    middle = float(np.median(best))
    rule = SkipRule(Network(tuple(middle * pick for pick in picks), (1.0,) * len(picks), (((picks,), (0.0,)),)), 0.5)
    for skip, words in ((None, "distance buckets"), (rule, "distance buckets, skipping searches")):
        Profile(Mixture(8, 20.0, 0.4), "exact", "a test", facts, {}, replace(constant_gate(0.25), skip=skip)).write(store)
        found = compare_stores([store], [folder / "text"], exclude=["story-0001.txt"]).stores[0]
        comparison, per_token = found.comparison, found.comparison.per_token
        assert (comparison.gated, found.setup.gate) == (True, words)
        assert np.array_equal(per_token.searched, best >= np.float32(middle) if skip else np.full(len(best), True))
        assert np.array_equal(per_token.weight, np.where(per_token.searched, np.float32(0.25), 0))
        assert comparison.mean_weight == pytest.approx(per_token.weight.mean(dtype=np.float64))
        assert comparison.skipped == pytest.approx(1 - per_token.searched.mean())
        assert (per_token.neighbor_ids[~per_token.searched] == -1).all()
        assert len(comparison.leakage.excluded) == 1
        base = ~per_token.searched
        assert np.array_equal(per_token.logprob[base], per_token.lm_logprob[base])
        assert np.array_equal(per_token.best_logprob[base], per_token.lm_best_logprob[base])
    fixed = compare_stores([store], [folder / "text"], opening={"weight": 0.4}).stores[0]
    assert (fixed.comparison.gated, fixed.setup.gate, fixed.comparison.mean_weight) == (False, None, pytest.approx(0.4))


def test_supporters_and_frequencies_are_those_of_the_store(folder: Path) -> None:
    opened = open_store(folder / "a")
    found = opened.compare(folder / "text", mixture=Mixture(8, 20.0, 0.4)).per_token
    values = opened.store.values.slice(0, len(opened.store)).numpy()
    with_supporter = found.supporter >= 0
    assert np.array_equal(with_supporter, np.isfinite(found.knn_logprob))
    assert np.array_equal(values[found.supporter[with_supporter]], found.token_id[with_supporter])
    stored = opened.store.tokens.slice(0, len(opened.store.tokens)).numpy().tolist()
    assert found.frequency.tolist() == [stored.count(token) for token in found.token_id.tolist()]

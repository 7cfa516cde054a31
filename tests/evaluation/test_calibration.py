"""``knnlm calibrate``: the profile it writes is the best of what ``compare`` would have found, and belongs to its store."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.profile import PROFILE, Profile
from knnlm.evaluation import gate_fit
from knnlm.model import HFLanguageModel
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus


@pytest.fixture(scope="module")
def whole(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    build(text_folder(folder / "corpus", tiny_corpus(8)), folder / "store", gpt2, index="IVF4,SQ8", keys="float32", max_length=16)
    text_folder(folder / "valid", tiny_corpus(4, seed=3))
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "store", tmp_path / "store"))


@pytest.fixture(autouse=True)
def _few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny text is learned by heart in a few."""
    monkeypatch.setattr(gate_fit, "EPOCHS", 8)


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert knnlm(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def compared(capsys: pytest.CaptureFixture[str], store: Path, whole: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = said(capsys, "compare", store, "--text", whole / "valid", *options)["stores"][0]
    return found


def test_compare_finds_the_perplexities_that_calibrate_promised(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "calibrate", store, "--text", whole / "valid", "--k", "32")
    assert found["saved"]
    after = compared(capsys, store, whole)
    chosen = {name: found[name] for name in ("k", "knn_temperature", "weight")}
    assert {name: after["settings"][name] for name in chosen} == chosen
    assert after["base"]["value"] == pytest.approx(found["base_perplexity"], rel=1e-4)
    fixed = compared(
        capsys, store, whole, *(part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value)))
    )
    # A search for fewer neighbours may look less far.
    assert fixed["knn"]["value"] == pytest.approx(found["perplexity"], rel=5e-3)
    for options in (("--weight", "0.9"), ("--knn-temperature", "1000"), ("--k", "1")):
        assert compared(capsys, store, whole, *options)["knn"]["value"] > fixed["knn"]["value"] * (1 - 5e-3)


def test_a_gate_is_used_where_the_profile_has_one(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "calibrate", store, "--text", whole / "valid", "--k", "32")
    profile = Profile.read(store)
    assert profile is not None
    assert (profile.gate is not None) == found["gate"]["has_gate"]
    assert profile.measured["gate"] == found["gate"]
    assert found["gate"]["fixed"]["change"] == 0
    after = compared(capsys, store, whole)
    assert after["settings"]["mixture_from"].startswith("calibrated profile")
    assert ("adaptive weight" in after["settings"]["mixture_from"]) == found["gate"]["has_gate"]
    best = min(form["perplexity"] for form in found["gate"]["forms"])
    assert found["gate"]["has_gate"] == (best < found["gate"]["fixed"]["perplexity"] * 0.999), "a clear case"
    # It was fitted to this text, so it is better than where the text was held out.
    assert after["knn"]["value"] < best * 1.01


def test_negative_text(store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = text_folder(tmp_path / "other", ["qzx " * 40, "0987 6543 " * 30])
    line = ("calibrate", store, "--text", whole / "valid", "--negative-text", other, "--k", "16", "--dry-run")
    found = said(capsys, *line)
    assert [judged["name"] for judged in found["gate"]["negatives"]] == ["shuffled contexts", str(other)]
    assert found["tokens"] == said(capsys, *line[:4], "--k", "16", "--dry-run")["tokens"], "the mixture is of the validation text alone"
    assert knnlm(*line) == 0
    shown = capsys.readouterr().out
    for word in ("base LM", "best fixed weight", "distance buckets", "logistic function", "network", "shuffled contexts", "text of no use"):
        assert word in shown


def test_plot(store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    line = ("calibrate", store, "--text", whole / "valid", "--k", "4", "--dry-run", "--plot")
    assert knnlm(*line, tmp_path / "surface.svg") == 0
    assert "<svg" in (tmp_path / "surface.svg").read_text()
    assert knnlm(*line, tmp_path / "nowhere" / "surface.png") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert knnlm(*line, tmp_path / "surface.txt") == 2
    assert "must end in .svg, .png, .pdf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert knnlm(*line, tmp_path / "surface.png") == 1
    assert "knnlm[report]" in capsys.readouterr().err


def test_a_text_that_is_too_short_for_a_gate(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("The old king sold seven apples near the river.")
    assert said(capsys, "calibrate", store, "--text", tmp_path / "one.txt", "--k", "8")["gate"] is None
    profile = Profile.read(store)
    assert profile is not None
    assert profile.gate is None
    assert knnlm("calibrate", store, "--text", tmp_path / "one.txt", "--k", "8", "--dry-run") == 0
    assert "too short to hold any of it out" in capsys.readouterr().out


def test_twice_is_the_same_and_a_cache_spares_the_search(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("calibrate", store, "--text", whole / "valid", "--k", "16", "--cache", tmp_path / "cache")
    first = said(capsys, *line)
    profile = (store / PROFILE).read_bytes()
    monkeypatch.setattr(HFLanguageModel, "forward", None)
    assert said(capsys, *line) == first
    assert (store / PROFILE).read_bytes() == profile


def test_dry_run_changes_nothing(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not said(capsys, "calibrate", store, "--text", whole / "valid", "--k", "8", "--dry-run")["saved"]
    assert not (store / PROFILE).exists()
    assert knnlm("calibrate", store, "--text", whole / "valid", "--k", "8", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "not saved (--dry-run)" in shown
    assert "best mixture" in shown


@pytest.mark.parametrize(
    ("name", "value"), [("index", "FAISS Flat"), ("model", "0123"), ("key_layer", "last_hidden"), ("dtype", "bfloat16")]
)
def test_a_profile_of_something_else_is_refused_until_calibrated_again(
    store: Path, whole: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    said(capsys, "calibrate", store, "--text", whole / "valid", "--k", "8")
    profile = Profile.read(store)
    assert profile is not None
    assert set(profile.belongs) == {"index", "model", "key_layer", "dtype"}
    replace(profile, belongs={**profile.belongs, name: value}).write(store)
    assert knnlm("compare", store, "--text", whole / "valid") == 1
    error = capsys.readouterr().err
    assert f"was calibrated with the {name.replace('_', ' ')} {value!r}, but it is {profile.belongs[name]!r} now" in error
    compared(capsys, store, whole, "--k", "4", "--knn-temperature", "3", "--weight", "0.1")
    said(capsys, "calibrate", store, "--text", whole / "valid", "--k", "8")
    compared(capsys, store, whole)


def test_text_without_tokens_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("a")
    assert knnlm("calibrate", store, "--text", tmp_path / "empty.txt") == 1
    assert "no document has at least two tokens" in capsys.readouterr().err


def test_negative_text_without_tokens_is_refused_before_any_search(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").write_text("a")
    monkeypatch.setattr(HFLanguageModel, "forward", None)
    assert knnlm("calibrate", store, "--text", whole / "valid", "--negative-text", tmp_path / "empty.txt") == 1
    assert f"There is nothing to score in {tmp_path / 'empty.txt'}" in capsys.readouterr().err


def test_text_that_the_datastore_holds_is_warned_of(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("calibrate", store, "--text", whole / "corpus", "--k", "4", "--dry-run", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["overlap"] == 1
    assert "100% of the text's 13-token sequences stand in the datastore" in shown.err
    other = store.parent / "other.txt"
    other.write_text(" ".join(f"{number} red boats" for number in range(60)))
    assert knnlm("calibrate", store, "--text", other, "--k", "4", "--dry-run") == 0
    assert "stand in the datastore" not in capsys.readouterr().err

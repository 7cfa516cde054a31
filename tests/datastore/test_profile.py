"""The calibrated profile: kept beside the manifest, refused when damaged, used where a command gives no settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.datastore.reader import Datastore
from knnlm.errors import KNNLMError, StoreDamaged
from knnlm.gated import StoreGate
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_mix, open_store
from tests.gates import random_gate
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus

PROMPT = "The old king"
CALIBRATED = Profile(Mixture(k=5, temperature=2.5, weight=0.35), "exact", "held.txt, 2026-01-01")


@pytest.fixture(scope="module")
def whole(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, index="Flat", max_length=16)
    (folder / "held.txt").write_text(tiny_corpus(1, seed=3)[0])
    return folder / "store"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(whole, tmp_path / "store"))
    CALIBRATED.write(copy)
    return copy


def test_what_was_written_is_read(store: Path, whole: Path) -> None:
    assert Profile.read(store) == CALIBRATED
    assert Profile.read(whole) is None
    Datastore.open(store, verify=True)


def compared(capsys: pytest.CaptureFixture[str], store: Path, whole: Path, *flags: str) -> dict[str, Any]:
    assert knnlm("compare", store, "--text", whole.parent / "held.txt", "--json", *flags) == 0
    settings: dict[str, Any] = json.loads(capsys.readouterr().out)["stores"][0]["settings"]
    return {name: settings[name] for name in ("k", "knn_temperature", "weight", "mixture_from")}


def test_compare_takes_the_profile_where_nothing_is_given(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, store, whole)
    assert found == {"k": 5, "knn_temperature": 2.5, "weight": 0.35, "mixture_from": "calibrated profile"}
    found = compared(capsys, store, whole, "--weight", "0.5")
    assert found == {"k": 5, "knn_temperature": 2.5, "weight": 0.5, "mixture_from": "weight given, the rest calibrated profile"}
    found = compared(capsys, store, whole, "--k", "3", "--knn-temperature", "4", "--weight", "0")
    assert found == {"k": 3, "knn_temperature": 4, "weight": 0, "mixture_from": "given"}
    found = compared(capsys, whole, whole)
    assert found == {"k": 64, "knn_temperature": 10, "weight": 0.2, "mixture_from": "defaults"}


def test_the_profile_changes_what_compare_finds(store: Path, whole: Path) -> None:
    assert open_store(store).knn_lm.mixture == CALIBRATED.mixture
    assert open_store(whole).knn_lm.mixture == Mixture()


def test_inspect_shows_it(store: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("inspect", store, "--json") == 0
    found = json.loads(capsys.readouterr().out)["profile"]
    assert found == {"k": 5, "temperature": 2.5, "weight": 0.35, "source": CALIBRATED.source, "gate": None}
    assert knnlm("inspect", whole, "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None


@pytest.fixture
def gated(store: Path) -> Path:
    replace(CALIBRATED, gate=random_gate(1)).write(store)
    return store


def test_inspect_says_what_gate_it_has(gated: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("inspect", gated, "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"]["gate"] == {"kind": "network", "floor": 0.3, "skip_below": 0.5}
    for path, line in ((gated, "network, 0 below 0.3, no search where less than 0.5 is expected"), (whole, "adaptive weight  none")):
        assert knnlm("inspect", path) == 0
        assert line in " ".join(capsys.readouterr().out.replace("│", " ").split()).replace("adaptive weight none", "adaptive weight  none")


def test_the_gate_applies_where_nothing_is_given(gated: Path) -> None:
    opened = open_store(gated)
    assert opened.mixture_source == "calibrated profile with an adaptive weight"
    assert opened.knn_lm.gate == StoreGate(random_gate(1), opened.store)
    for given in ({"k": 5}, {"temperature": 2.5}, {"weight": 0.35}, {"k": 5, "temperature": 2.5, "weight": 0.35}):
        fixed = open_store(gated, **given)
        assert (fixed.knn_lm.gate, fixed.searchable.gate) == (None, None)
        assert "adaptive" not in fixed.mixture_source
        assert fixed.knn_lm.mixture == CALIBRATED.mixture
        assert fixed.next_token(PROMPT).weight.tolist() == [0.35]
    expected = open_mix({"alone": gated}).next_token(PROMPT)
    assert torch.equal(opened.next_token(PROMPT).log_probs, expected.log_probs)
    assert opened.next_token(PROMPT).weight.tolist() != [0.35]


def test_a_mix_of_several_has_one_weight(gated: Path, whole: Path) -> None:
    several = open_mix({"gated": gated, "other": whole})
    assert several.knn_lm.gate is None
    assert several.next_token(PROMPT).weight.tolist() == [0.35]


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_a_flipped_byte_is_refused_and_found_by_verify(at: int, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / PROFILE
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0x08
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"profile\.json is damaged"):
        Profile.read(store)
    with pytest.raises(StoreDamaged, match=r"profile\.json is damaged"):
        open_store(store)
    assert knnlm("verify", store, "--json") == 1
    (damage,) = json.loads(capsys.readouterr().out)["problems"]
    assert str(path) in damage


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"k": None}, "damaged"),
        ({"k": "many"}, "damaged"),
        ({"weight": 1.5}, "weight.*1.5"),
        ({"temperature": 0}, "temperature.*0"),
        ({"k": 0}, "k.*0"),
    ],
)
def test_a_profile_that_makes_no_mixture_is_refused_by_file(changes: dict[str, Any], problem: str, store: Path) -> None:
    content = json.loads((store / PROFILE).read_bytes())
    del content["checksum"]
    write_json_with_checksum(store / PROFILE, {**content, **changes})
    with pytest.raises(KNNLMError, match=rf"profile\.json.*{problem}"):
        Profile.read(store)


@pytest.mark.parametrize("field", ["k", "temperature", "weight", "distance", "source"])
def test_a_profile_without_a_field_is_refused(field: str, store: Path) -> None:
    content = json.loads((store / PROFILE).read_bytes())
    del content["checksum"], content[field]
    write_json_with_checksum(store / PROFILE, content)
    with pytest.raises(StoreDamaged, match=rf"profile\.json.*{field}"):
        Profile.read(store)

"""The calibrated profile: kept beside the manifest, refused when damaged, used where a command gives no settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.datastore.reader import Datastore
from knnlm.errors import KNNLMError, StoreDamaged
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus

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
    assert json.loads(capsys.readouterr().out)["profile"] == {"k": 5, "temperature": 2.5, "weight": 0.35, "source": CALIBRATED.source}
    assert knnlm("inspect", whole, "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None


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

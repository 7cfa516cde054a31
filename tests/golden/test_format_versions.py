"""Stores of every format version open for ever, and say what they said when they were made.

``format-N/`` holds stores of version N, the model and the corpus that they were made of, and in ``expected.json`` what
``scripts/generate_golden_store.py`` found them to say with the knnlm that wrote them. Tests work on copies.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.manifest import FORMAT_VERSION, MANIFEST
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidInput
from knnlm.opening import OpenedKNNLM, open_store
from scripts.generate_golden_store import generate
from tests.golden.observed import EXPECTED, Asked, observe
from tests.stores import knnlm

ROOT = Path(__file__).parent
STORES = sorted(ROOT.glob("format-*/store-*"))
FIRST_STORES = {"store-exact", "store-flat-tokens", "store-sq8"}


@dataclass(frozen=True)
class Golden:
    """A copy of a golden store, and what it was asked and said when it was made."""

    version: int
    path: Path
    model: str
    asked: Asked
    expected: dict[str, Any]

    def open(self) -> OpenedKNNLM:
        return open_store(self.path, model=self.model, verify=True)


def copied(store: Path, folder: Path) -> Golden:
    expected = json.loads((store.parent / EXPECTED).read_text())
    copy = Path(shutil.copytree(store, folder / store.name))
    version = int(store.parent.name.removeprefix("format-"))
    return Golden(version, copy, str(store.parent / "model"), Asked.from_json(expected["asked"]), expected["stores"][store.name])


@pytest.fixture(scope="module", params=STORES, ids=lambda store: f"{store.parent.name}-{store.name}")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return copied(request.param, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def said(golden: Golden) -> dict[str, Any]:
    return observe(golden.open(), golden.asked)


def test_every_format_version_has_its_stores() -> None:
    found = {int(folder.name.removeprefix("format-")): folder for folder in ROOT.glob("format-*")}
    # A version is frozen at the latest when the next one is begun.
    assert set(range(1, FORMAT_VERSION)) | {1} <= set(found)
    for folder in found.values():
        stores = {store.name for store in folder.glob("store-*")}
        assert stores == set(json.loads((folder / EXPECTED).read_text())["stores"])
        assert stores >= FIRST_STORES


def test_counts(golden: Golden, said: dict[str, Any]) -> None:
    assert said["counts"] == golden.expected["counts"]
    assert len(Datastore.open(golden.path, verify=True)) == golden.expected["counts"]["entries"]
    # A reader may take an old manifest for a newer one; the file is what it was.
    assert json.loads((golden.path / MANIFEST).read_text())["format_version"] == golden.version


def test_the_evidence_of_every_entry(golden: Golden, said: dict[str, Any]) -> None:
    expected = golden.expected["documents"]
    assert [document["id"] for document in said["documents"]] == [document["id"] for document in expected]
    for found, document in zip(said["documents"], expected, strict=True):
        assert found == document
    assert sum(len(document["lines"]) for document in said["documents"]) == golden.expected["counts"]["entries"]


def test_neighbors(golden: Golden, said: dict[str, Any]) -> None:
    assert len(said["neighbors"]) == len(golden.asked.queries)
    for found, expected in zip(said["neighbors"], golden.expected["neighbors"], strict=True):
        assert (found["ids"], found["tokens"]) == (expected["ids"], expected["tokens"])
        assert found["distances"] == pytest.approx(expected["distances"], rel=1e-5, abs=0)


def test_next_token(golden: Golden, said: dict[str, Any]) -> None:
    assert said["next_token"]["tokens"] == golden.expected["next_token"]["tokens"]
    assert said["next_token"]["log_probs"] == pytest.approx(golden.expected["next_token"]["log_probs"], abs=1e-4, rel=0)


def test_the_profile_applies(golden: Golden, said: dict[str, Any]) -> None:
    profile, opened = golden.expected["profile"], golden.open()
    assert said["profile"] == profile
    assert opened.mixture_source == ("calibrated profile" if profile else "defaults")
    if profile:
        mixture = opened.knn_lm.mixture
        assert (mixture.k, mixture.temperature, mixture.weight) == (profile["k"], profile["temperature"], profile["weight"])


def test_verify(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("verify", golden.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert knnlm("verify", golden.path) == 0


def test_inspect(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert knnlm("inspect", golden.path, "--verify") == 0
    capsys.readouterr()
    assert knnlm("inspect", golden.path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == golden.expected["counts"]
    assert said["model"]["name"] == f"tests/golden/format-{golden.version}/model"


def test_inspect_an_entry(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    document = golden.expected["documents"][-1]
    assert knnlm("inspect", golden.path, "--entry", str(document["first_entry"]), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["document"]["id"], said["document"]["metadata"]) == (document["id"], document["metadata"])
    assert [*said["left_context"], said["token_id"]] == document["tokens"][:2]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / f"format-{FORMAT_VERSION}"
    generate(folder)
    return folder


def test_the_generator_writes_stores_of_the_present_version(generated: Path, tmp_path: Path) -> None:
    stores = sorted(generated.glob("store-*"))
    assert {store.name for store in stores} >= FIRST_STORES
    for store in stores:
        again = copied(store, tmp_path)
        assert observe(again.open(), again.asked) == again.expected
        assert json.loads((store / MANIFEST).read_text())["format_version"] == FORMAT_VERSION


def test_the_generator_names_no_folder_of_this_machine(generated: Path) -> None:
    here = str(generated.parent).encode()
    assert [path for path in generated.rglob("*") if path.is_file() and here in path.read_bytes()] == []


def test_the_generator_leaves_what_is_there(generated: Path) -> None:
    with pytest.raises(InvalidInput, match="already"):
        generate(generated)
    with pytest.raises(InvalidInput, match=f"format-{FORMAT_VERSION}"):
        generate(generated.with_name("format-0"))
    assert not generated.with_name("format-0").exists()

"""A store fits the model that made its keys, wherever that lies now, and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from knnlm.datastore.manifest import Manifest
from knnlm.errors import ModelError, StoreMismatch
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from tests.stores import build, knnlm, text_folder
from tests.tiny import save, tiny_corpus, tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def store(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matching")
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, index="Flat", max_length=16)
    return folder / "store"


def both_sides(refused: pytest.ExceptionInfo[StoreMismatch], store: Path, part: str, other: HFLanguageModel) -> bool:
    """Whether the sentence names both models and both fingerprints."""
    expected = Manifest.read(store).model
    names = (expected.name, getattr(expected.fingerprint, part)[:12], other.name, getattr(other.fingerprint, part)[:12])
    return part in str(refused.value) and all(name in str(refused.value) for name in names)


@pytest.mark.parametrize("part", ["weights", "configuration", "tokenizer"])
def test_another_model_is_refused_with_both_sides(part: str, store: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    if part == "weights":
        with torch.no_grad():
            model.get_parameter("transformer.h.0.mlp.c_fc.bias")[3] += 1e-6
    elif part == "configuration":
        model.config.layer_norm_epsilon = 1e-6
    else:
        tokenizer = tiny_tokenizer(adds_bos=True)
    path = save(model, tokenizer, tmp_path / "other")
    with pytest.raises(StoreMismatch) as refused:
        open_store(store, model=str(path))
    assert both_sides(refused, store, part, HFLanguageModel.load(path))


def test_another_family_is_refused(store: Path, tmp_path: Path) -> None:
    path = save(tiny_llama(), tiny_tokenizer(), tmp_path / "llama")
    with pytest.raises(StoreMismatch, match="llama"):
        open_store(store, model=str(path))


def test_another_key_layer_is_refused_with_both_sides(store: Path, tiny_gpt2_path: Path) -> None:
    manifest = Manifest.read(store)
    with pytest.raises(StoreMismatch, match=r"last_ffn_input \(transformer\.h\.1\.mlp\) of width 32, but the model gives last_hidden"):
        manifest.require_model(HFLanguageModel.load(tiny_gpt2_path, key_layer="last_hidden"))
    with pytest.raises(StoreMismatch, match=r"module_input \(transformer\.h\.0\.mlp\)"):
        manifest.require_model(HFLanguageModel.load(tiny_gpt2_path, key_module="transformer.h.0.mlp"))


@pytest.mark.parametrize("layer", [{"key_layer": "last_hidden"}, {"key_module": "transformer.h.0.mlp"}], ids=str)
def test_the_key_layer_comes_from_the_manifest(layer: dict[str, str], tiny_gpt2_path: Path, tmp_path: Path) -> None:
    model = HFLanguageModel.load(tiny_gpt2_path, **layer)  # type: ignore[arg-type]
    build(text_folder(tmp_path / "corpus", tiny_corpus(2)), tmp_path / "store", model, index="Flat")
    assert open_store(tmp_path / "store").model.key_layer == model.key_layer


def test_a_moved_or_resaved_model_still_fits(tiny_gpt2_path: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_gpt2_path, here)
    build(text_folder(tmp_path / "corpus", tiny_corpus(2)), tmp_path / "store", HFLanguageModel.load(here), index="Flat")
    here.rename(there)
    with pytest.raises(ModelError, match=str(here)):
        open_store(tmp_path / "store")
    assert open_store(tmp_path / "store", model=str(there)).model.name == str(there)
    again = save(tiny_gpt2(), tiny_tokenizer(), tmp_path / "again", max_shard_size="20KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    assert open_store(tmp_path / "store", model=str(again)).mixture_source == "defaults"


def test_commands_take_a_moved_model(store: Path, tiny_gpt2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = shutil.copytree(tiny_gpt2_path, tmp_path / "there")
    (tmp_path / "held.txt").write_text(tiny_corpus(1, seed=3)[0])
    compare = ("compare", store, "--text", tmp_path / "held.txt", "--json")
    assert knnlm(*compare) == 0
    before = json.loads(capsys.readouterr().out)["stores"][0]
    assert knnlm(*compare, "--model", there) == 0
    after = json.loads(capsys.readouterr().out)["stores"][0]
    assert after["knn"]["value"] == before["knn"]["value"]
    assert after["settings"]["model"] == str(there)
    other = save(tiny_llama(), tiny_tokenizer(), tmp_path / "other")
    assert knnlm(*compare, "--model", other) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: The datastore was built with ")
    assert said.count("\n") == 1


def test_a_store_may_be_moved(store: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(store, tmp_path / "moved")
    opened = open_store(moved, k=4)
    assert opened.knn_lm.mixture == Mixture(k=4)
    assert opened.mixture_source == "k given, the rest defaults"

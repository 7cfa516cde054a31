"""Datastores leave as folders that hubs take, come back as they were, and are refused where anything does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from knnlm.datastore.files import file_facts
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import InvalidInput, ModelError, StoreDamaged, StoreError, StoreMismatch, StoreNotFound, StoreVersion
from knnlm.hf import KNNLMForCausalLM
from knnlm.hub import export_store, read_hub_folder
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from tests.stores import build, contents, knnlm, text_folder
from tests.tiny import save, tiny_corpus, tiny_gpt2, tiny_tokenizer


@pytest.fixture(scope="module")
def built(tiny_gpt2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards with a profile, and the model that it was built with beside it, which can be lost."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_gpt2_path, folder / "base")
    settings = {"index": "Flat", "max_length": 32, "shard_tokens": 200}
    build(text_folder(folder / "corpus", tiny_corpus(6)), folder / "store", HFLanguageModel.load(folder / "base"), **settings)
    Profile(Mixture(4, 3.0, 0.5), "exact", "valid.txt").write(folder / "store")
    return folder


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Path:
    """The same, to be changed; the manifest still names the model of :func:`built`."""
    shutil.copytree(built / "store", tmp_path / "store")
    return tmp_path


def logits(model: KNNLMForCausalLM) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(3, 30)[None]).logits
    return found


def test_what_comes_back_is_what_left(built: Path, tmp_path: Path) -> None:
    model = KNNLMForCausalLM.from_store(built / "store")
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "datastore"]
    assert contents(tmp_path / "out" / "datastore") == contents(built / "store")
    again = KNNLMForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert again.opened.knn_lm.mixture == Mixture(4, 3.0, 0.5)
    chosen = KNNLMForCausalLM.from_pretrained(tmp_path / "out", mixture=Mixture(2, 1.0, 0.9))
    assert not torch.equal(logits(chosen), logits(model))


def test_with_its_model_it_needs_nothing_else(tiny_gpt2_path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_gpt2_path, base)
    build(text_folder(tmp_path / "corpus", tiny_corpus(3)), tmp_path / "store", HFLanguageModel.load(base), index="Flat", max_length=32)
    expected = logits(KNNLMForCausalLM.from_store(tmp_path / "store"))
    assert knnlm("export", tmp_path / "store", "--to", tmp_path / "new" / "out", "--with-model") == 0
    base.rename(tmp_path / "moved")
    assert torch.equal(logits(KNNLMForCausalLM.from_pretrained(tmp_path / "new" / "out")), expected)
    assert knnlm("verify", tmp_path / "new" / "out" / "datastore") == 0

    export_store(tmp_path / "store", tmp_path / "without")
    with pytest.raises(ModelError, match="base"):
        KNNLMForCausalLM.from_pretrained(tmp_path / "without")
    given = KNNLMForCausalLM.from_pretrained(tmp_path / "without", model=str(tmp_path / "moved"))
    assert torch.equal(logits(given), expected)


def test_another_model_is_refused(built: Path, tmp_path: Path) -> None:
    export_store(built / "store", tmp_path / "out", with_model=True)
    shutil.rmtree(tmp_path / "out" / "model")
    save(tiny_gpt2(seed=1), tiny_tokenizer(), tmp_path / "out" / "model")
    with pytest.raises(StoreMismatch, match="another weights"):
        KNNLMForCausalLM.from_pretrained(tmp_path / "out")


def test_a_snapshot_of_links_as_a_hub_client_keeps_it_opens(built: Path, tmp_path: Path) -> None:
    """``huggingface_hub`` keeps files as blobs by checksum and gives a folder of links to them."""
    model = KNNLMForCausalLM.from_store(built / "store")
    model.save_pretrained(tmp_path / "out", with_model=True)
    snapshot, blobs = tmp_path / "models--me--knn" / "snapshots" / "abc", tmp_path / "models--me--knn" / "blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in (tmp_path / "out").rglob("*") if path.is_file()]:
        blob = blobs / file_facts(path).xxh3
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(tmp_path / "out")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    shutil.rmtree(tmp_path / "out")
    assert torch.equal(logits(KNNLMForCausalLM.from_pretrained(snapshot)), logits(model))


def test_the_card_says_facts_and_no_licence(built: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "c.html").write_text("<html>")
    reports = ["--report", tmp_path / "c.json", "--report", tmp_path / "c.html"]
    assert knnlm("export", built / "store", "--to", tmp_path / "out", *reports) == 0
    card, counts = (tmp_path / "out" / "README.md").read_text(), Manifest.read(built / "store").counts
    head = card.split("---")[1]
    assert "license" not in head
    assert "base_model" not in head, "a path of this machine is the name of no model elsewhere"
    assert str(built) not in card
    assert str(built) not in (tmp_path / "out" / "config.json").read_text()
    for fact in (
        "base model | base, not included", f"documents | {counts.documents:,} |", f"entries | {counts.entries:,} |",
        "k=4, kNN temperature=3, weight=0.5; calibrated", "32 tokens, stride 16", "stored as float16", "(report.html)", 'model="PATH"',
        "Not stated.",
    ):  # fmt: skip
        assert fact in card
    assert {path.name for path in read_hub_folder(tmp_path / "out").reports} == {"report.json", "report.html"}


def test_a_folder_that_holds_something_is_left_alone(built: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InvalidInput, match=r"to: is .* which is there already; give a new folder"):
        export_store(built / "store", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    export_store(built / "store", tmp_path / "empty")
    assert read_hub_folder(tmp_path / "empty").model is None


def test_what_fails_takes_nothing_else_with_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export into the folder where one stands is made beside it, and so is what a failure leaves."""
    next((place / "store").rglob("values.npy")).write_bytes(b"")
    for name in ("work", ".tmp"):
        (place / name).mkdir()
    (place / ".tmp" / "kept").write_text("mine")
    monkeypatch.chdir(place / "work")
    with pytest.raises(StoreDamaged):
        export_store(place / "store", "")
    assert sorted(path.name for path in place.iterdir()) == [".tmp", "store", "work"]
    assert (place / ".tmp" / "kept").is_file()


def test_removed_text_does_not_leave(place: Path) -> None:
    remove_documents(place / "store", [Datastore.open(place / "store").documents[0].id])
    with pytest.raises(StoreError, match=r"the text of 1 removed document still lies in its files.*knnlm compact"):
        export_store(place / "store", place / "out")
    assert [path.name for path in place.iterdir()] == ["store"]
    assert knnlm("compact", place / "store") == 0
    export_store(place / "store", place / "out")
    assert contents(place / "out" / "datastore") == contents(place / "store")


@pytest.mark.parametrize("name", ["keys.npy", "values.npy"])
def test_damage_is_found_by_copying(place: Path, name: str) -> None:
    path = next((place / "store").rglob(name))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match=f"{name} is damaged: its content gives xxh3"):
        export_store(place / "store", place / "out")
    assert [path.name for path in place.iterdir()] == ["store"]


def test_a_store_that_changes_meanwhile_is_not_half_copied(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def interfering(source: Path, target: Path) -> None:
        if source.name == "values.npy":
            source.unlink()
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", interfering)
    with pytest.raises(StoreError, match=r"changed while it was copied: .*values.npy is gone; run the command again"):
        export_store(place / "store", place / "out")
    assert [path.name for path in place.iterdir()] == ["store"]


def test_folders_that_do_not_fit_are_refused(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_store(built / "store", out, with_model=True)
    config = json.loads((out / "config.json").read_text())

    def saying(**changes: object) -> None:
        (out / "config.json").write_text(json.dumps({**config, **changes}))

    with pytest.raises(StoreNotFound, match=r"holds no config\.json"):
        read_hub_folder(tmp_path)
    saying(model_type="gpt2")
    with pytest.raises(StoreNotFound, match="says model type 'gpt2', not 'knnlm'"):
        read_hub_folder(out)
    saying(knnlm={**config["knnlm"], "layout": 2})
    with pytest.raises(StoreVersion, match="has layout 2, but this knnlm reads layout 1"):
        read_hub_folder(out)
    for base_model in (None, [], "gpt2"):
        saying(knnlm={**config["knnlm"], "base_model": base_model})
        with pytest.raises(StoreDamaged, match="does not say which base model"):
            read_hub_folder(out)
    (out / "config.json").write_text("[")
    with pytest.raises(StoreDamaged, match=r"config\.json is damaged"):
        read_hub_folder(out)
    saying()
    shutil.move(out / "model", tmp_path / "model")
    with pytest.raises(StoreDamaged, match="model is missing, but"):
        read_hub_folder(out)
    shutil.move(tmp_path / "model", out / "model")
    remove_documents(out / "datastore", [Datastore.open(out / "datastore").documents[0].id])
    with pytest.raises(StoreMismatch, match=r"is another datastore .* than .* speaks of"):
        read_hub_folder(out)


def test_reports_are_one_of_each_kind(built: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "a.txt"):
        (tmp_path / name).write_text("{}")
    for reports, message in (
        ([tmp_path / "a.txt"], "can be one .json and one .html file"),
        ([tmp_path / "a.json", tmp_path / "b.json"], "can be one .json and one .html file"),
        ([tmp_path / "lost.html"], "there is no such file"),
    ):
        with pytest.raises(InvalidInput, match=message):
            export_store(built / "store", tmp_path / "out", reports=reports)
    assert not (tmp_path / "out").exists()

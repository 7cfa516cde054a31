"""Tiny models in float32 and float64 with a datastore each, made once for all tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from knnlm.datastore.reader import Datastore
from knnlm.index import open_index
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.retrieval import Retriever
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings
from tests.engine.harness import Parts, Quiet
from tests.tiny import tiny_corpus

DOCUMENTS = 24


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(tiny_corpus(DOCUMENTS)):
        (folder / f"story-{number:02}.txt").write_text(text)
    return folder


def _store(model_path: Path, corpus: Path, folder: Path) -> Path:
    build_datastore([corpus], folder, HFLanguageModel.load(model_path), BuildSettings(index="exact", keys="float32"), Quiet())
    return folder


@pytest.fixture(scope="package")
def gpt2_store(tiny_gpt2_path: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _store(tiny_gpt2_path, corpus_folder, tmp_path_factory.mktemp("stores") / "gpt2")


@pytest.fixture(scope="package")
def llama_store(tiny_llama_path: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _store(tiny_llama_path, corpus_folder, tmp_path_factory.mktemp("stores") / "llama")


def _parts(model_path: Path, store_path: Path, dtype: str) -> Parts:
    model, store = HFLanguageModel.load(model_path, dtype=dtype), Datastore.open(store_path)
    retriever = Retriever(open_index(store.path / store.manifest.index, store.keys, len(store)), store.keys, store.values)
    return Parts(KNNLanguageModel(model, model.tokenizer(), retriever, Mixture(8, 10.0, 0.3)), model, store, model_path)


@pytest.fixture(scope="package")
def gpt2(tiny_gpt2_path: Path, gpt2_store: Path) -> Parts:
    """GPT-2-like, in float64: equal is equal to the last token."""
    return _parts(tiny_gpt2_path, gpt2_store, "float64")


@pytest.fixture(scope="package")
def llama(tiny_llama_path: Path, llama_store: Path) -> Parts:
    """LLaMA-like, in float64."""
    return _parts(tiny_llama_path, llama_store, "float64")


@pytest.fixture(scope="package", params=["gpt2", "llama"])
def parts(request: pytest.FixtureRequest) -> Parts:
    """Each of the two, in float64."""
    found: Parts = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="package", params=["gpt2", "llama"])
def single_parts(request: pytest.FixtureRequest, tiny_gpt2_path: Path, tiny_llama_path: Path, gpt2_store: Path, llama_store: Path) -> Parts:
    """Each of the two, in float32."""
    paths = {"gpt2": (tiny_gpt2_path, gpt2_store), "llama": (tiny_llama_path, llama_store)}
    return _parts(*paths[request.param], "float32")

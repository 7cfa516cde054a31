"""What tests of several datastores share: stores of the tiny GPT-2 over texts of their own, and what is mapped of them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from knnlm.model import HFLanguageModel
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings
from knnlm_server.sequence import DatastoreChoice, RetrievalParams
from tests.engine.harness import Quiet
from tests.stores import text_folder
from tests.tiny import tiny_corpus


def store_of(model: HFLanguageModel, folder: Path, documents: int = 6, seed: int = 1, **settings: Any) -> Path:
    """A store within ``folder``, over documents that depend on ``seed``."""
    corpus = text_folder(folder.with_name(f"{folder.name}-text"), tiny_corpus(documents, seed=seed))
    chosen: dict[str, Any] = {"index": "exact", "keys": "float32", **settings}
    build_datastore([corpus], folder, model, BuildSettings(**chosen), Quiet())
    return folder


def mixing(*names: str, weight: float = 0.5, k: int = 8, temperature: float = 10.0, **weights: float) -> RetrievalParams:
    """A mix of the datastores of these names with weight 1, and of others with weights of their own."""
    chosen = (*(DatastoreChoice(name) for name in names), *(DatastoreChoice(name, its) for name, its in weights.items()))
    return RetrievalParams(weight, k, temperature, chosen)


def mapped(folder: Path) -> bool:
    """Whether a file below ``folder`` is mapped into the memory of this process."""
    gc.collect()
    return f"{folder}/" in Path("/proc/self/maps").read_text()

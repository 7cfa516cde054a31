"""What the benchmarks run on: a model and text, by default those of the demo, which every machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from knnlm.model import HFLanguageModel
from knnlm_demo.documents import demo_documents, split_documents
from knnlm_demo.run import MODEL


@dataclass(frozen=True)
class Inputs:
    """A model, a folder of text for the datastore and one for evaluation."""

    model: HFLanguageModel
    corpus: Path
    held_out: Path


def load_inputs(model: str | None, corpus: Path | None, held_out: Path | None, folder: Path) -> Inputs:
    """The given inputs, or the demo's, written into ``folder``."""
    split = split_documents(demo_documents())
    for name, documents in (("corpus", split.datastore), ("held_out", split.held_out)):
        for document in documents:
            path = folder / name / document.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(document.text.encode())
    return Inputs(HFLanguageModel.load(model or MODEL), corpus or folder / "corpus", held_out or folder / "held_out")

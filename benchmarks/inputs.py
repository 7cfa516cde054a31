"""What the benchmarks run on: a model and text, by default those of the demo, which every machine has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from knnlm.corpus import Corpus
from knnlm.model import HFLanguageModel
from knnlm.tokenized import TokenizedDocument, tokenize
from knnlm_demo.documents import demo_documents, split_documents
from knnlm_demo.run import MODEL


@dataclass(frozen=True)
class Inputs:
    """A model (``source``: hub name or path), text for the datastore and text for evaluation.

    ``cut``: a regular expression at whose matches documents begin, in both (None: a file is a document).
    """

    model: HFLanguageModel
    source: str
    text: Path
    held_out_text: Path
    cut: str | None

    def corpus(self) -> Corpus:
        """Text of the datastore."""
        return Corpus([self.text], self.cut)

    def held_out(self, tokens: int) -> list[TokenizedDocument]:
        """The first documents of the held-out text, until they hold ``tokens``."""
        corpus = Corpus([self.held_out_text], self.cut)
        return first_documents(tokenize(corpus, self.model.tokenizer(), self.model.vocabulary_size), tokens)


def first_documents(documents: Iterable[TokenizedDocument], tokens: int) -> list[TokenizedDocument]:
    """Documents in order, until ``tokens`` of them can be scored."""
    chosen, total = list[TokenizedDocument](), 0
    for document in documents:
        chosen.append(document)
        total += len(document.ids) - 1
        if total >= tokens:
            break
    return chosen


def load_inputs(model: str | None, text: Path | None, held_out: Path | None, cut: str | None, folder: Path) -> Inputs:
    """The given inputs; where there is none the demo's, whose text is written into ``folder``."""
    if text is None or held_out is None:
        split = split_documents(demo_documents())
        for name, documents in (("corpus", split.datastore), ("held_out", split.held_out)):
            for document in documents:
                path = folder / name / document.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(document.text.encode())
    source = model or str(MODEL)
    return Inputs(HFLanguageModel.load(source), source, text or folder / "corpus", held_out or folder / "held_out", cut)

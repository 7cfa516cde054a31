"""Putting the parts together: from a path to a model, its datastore, its index and the mixture that applies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import search_settings
from knnlm.evaluation.compare import Comparison, compare
from knnlm.generation import generate
from knnlm.index import open_index
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.retrieval import Retriever
from knnlm.sampling import SamplingParams
from knnlm.tokenized import TokenizedDocument, tokenize


@dataclass(frozen=True)
class OpenedKNNLM:
    """A kNN language model with the datastore it reads; ``mixture_source`` says where its settings come from."""

    knn_lm: KNNLanguageModel
    store: Datastore
    model: HFLanguageModel
    mixture_source: str

    def next_token(self, text: str, mixture: Mixture | None = None) -> Mixed:
        """The distribution over the token that follows ``text``: ``log_probs`` [1, vocabulary] and who voted for it."""
        return self.knn_lm.next_token(text, mixture)

    def corpus(self, *paths: str | Path, split_documents: str | None = None) -> Corpus:
        """Files and folders as documents, cut as those of the datastore (or at ``split_documents``)."""
        return Corpus(paths, split_documents if split_documents is not None else self.store.manifest.text.split_documents)

    def read(self, corpus: Corpus) -> list[TokenizedDocument]:
        """Documents as tokens, with special tokens as those of the datastore. Raises :class:`CorpusError`."""
        return list(tokenize(corpus, self.knn_lm.tokenizer, self.model.vocabulary_size))

    def compare(self, *paths: str | Path, mixture: Mixture | None = None) -> Comparison:
        """Perplexity of base LM and kNN-LM over the text of files and folders; see :func:`knnlm.compare`."""
        return compare(self.knn_lm, self.store, self.read(self.corpus(*paths)), mixture=mixture)

    def generate(
        self, prompt: str, *, max_new_tokens: int = 64, sampling: SamplingParams | None = None, mixture: Mixture | None = None
    ) -> str:
        """Continue ``prompt``, for one request at a time; see :func:`knnlm.generation.generate`."""
        return generate(self.knn_lm, self.model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, mixture=mixture)


def load_model(
    manifest: Manifest, *, model: str | None = None, device: str = "cpu", dtype: str | None = None, trust_remote_code: bool | None = None
) -> HFLanguageModel:
    """The model that a store was built with, checked against the manifest's fingerprints.

    ``model``: where it lies now, if it was moved. Facts that the manifest holds (revision, dtype, key layer) are not
    asked for; code from a hub runs only with ``trust_remote_code=True``. Raises :class:`ModelError`,
    :class:`StoreMismatch`.
    """
    facts, layer = manifest.model, manifest.key.layer
    loaded = HFLanguageModel.load(
        model or facts.name,
        device=device,
        dtype=dtype or facts.dtype,
        revision=None if model else facts.revision,
        trust_remote_code=bool(trust_remote_code),
        key_layer="last_ffn_input" if layer.kind == "module_input" else layer.kind,
        key_module=layer.module if layer.kind == "module_input" else None,
    )
    manifest.require_model(loaded)
    return loaded


def open_store(
    store: str | Path,
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    weight: float | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> OpenedKNNLM:
    """Open the datastore at ``store`` with its model and index.

    The mixture: what is given here, else the store's calibrated profile, else the defaults of :class:`Mixture`.
    ``verify`` reads every file and compares checksums first. Raises the errors of :mod:`knnlm.errors`.
    """
    datastore = Datastore.open(store, verify=verify)
    profile = datastore.profile
    given = {name: value for name, value in (("k", k), ("temperature", temperature), ("weight", weight)) if value is not None}
    mixture = replace(profile.mixture if profile else Mixture(), **given).validate()  # type: ignore[arg-type]
    source = "calibrated profile" if profile else "defaults"
    if given:
        source = "given" if len(given) == 3 else f"{', '.join(sorted(given))} given, the rest {source}"
    loaded = load_model(datastore.manifest, model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    index = open_index(datastore.path / datastore.manifest.index, datastore.keys, len(datastore), device)
    text = datastore.manifest.text
    tokenizer = loaded.tokenizer(text.bos, text.eos)  # type: ignore[arg-type]
    retriever = Retriever(index, datastore.keys, datastore.values, search_settings(datastore, index), datastore.allowed)
    return OpenedKNNLM(KNNLanguageModel(loaded, tokenizer, retriever, mixture), datastore, loaded, source)

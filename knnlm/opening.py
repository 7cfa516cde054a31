"""Putting the parts together: from a path to a model, its datastore, its index and the mixture that applies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import search_settings
from knnlm.errors import StoreDamaged, StoreMismatch
from knnlm.evaluation.compare import Comparison, compare
from knnlm.generation import generate
from knnlm.index import NeighborIndex, open_index
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel, not_loaded, tokenizer_fingerprint
from knnlm.model_source import ModelSource
from knnlm.retrieval import Retriever
from knnlm.sampling import SamplingParams
from knnlm.tokenization import TextTokenizer
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

    def corpus(self, *paths: str | Path, split_documents: str | None = None, **options: Any) -> Corpus:
        """Input as documents, cut as those of the datastore (or at ``split_documents``); ``options`` are those of
        :class:`~knnlm.corpus.Corpus`."""
        return Corpus(paths, split_documents if split_documents is not None else self.store.manifest.text.split_documents, **options)

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


def load_tokenizer(manifest: Manifest, model: str | None = None) -> TextTokenizer:
    """The tokenizer that a store was built with, from files on this machine alone; no weights are read.

    ``model``: where it lies now, if it was moved. Raises :class:`ModelError`, :class:`StoreMismatch`.
    """
    from transformers import AutoTokenizer

    facts, text, name = manifest.model, manifest.text, model or manifest.model.name
    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=None if model else facts.revision, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that it can't read
        raise not_loaded("tokenizer of", name, error) from error
    found, expected = tokenizer_fingerprint(loaded), facts.fingerprint.tokenizer
    if found != expected:
        raise StoreMismatch(f"The tokenizer of {name!r} ({found[:12]}) is not the one that the datastore was built with ({expected[:12]}).")
    return TextTokenizer(loaded, text.bos, text.eos)  # type: ignore[arg-type]


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
    if profile is not None:
        _require_same_distance(datastore, profile)
    given = {name: value for name, value in (("k", k), ("temperature", temperature), ("weight", weight)) if value is not None}
    mixture = replace(profile.mixture if profile else Mixture(), **given).validate()  # type: ignore[arg-type]
    settings_from = "calibrated profile" if profile else "defaults"
    if given:
        settings_from = "given" if len(given) == 3 else f"{', '.join(sorted(given))} given, the rest {settings_from}"
    source = ModelSource.of(datastore.manifest, model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded = source.load()
    datastore, index = _with_index(datastore, device)
    text = datastore.manifest.text
    tokenizer = loaded.tokenizer(text.bos, text.eos)  # type: ignore[arg-type]
    retriever = Retriever(index, datastore.keys, datastore.values, search_settings(datastore, index), datastore.allowed)
    return OpenedKNNLM(KNNLanguageModel(loaded, tokenizer, retriever, mixture), datastore, loaded, settings_from)


def _require_same_distance(store: Datastore, profile: Profile) -> None:
    """A temperature that fits one kind of distance makes another distribution of the other."""
    distance = "exact" if store.manifest.key.stored else "index"
    if profile.distance != distance:
        raise StoreMismatch(
            f"{store.path / PROFILE} was calibrated with distances of the kind {profile.distance!r}, but those of this datastore are "
            f"{distance!r}; calibrate it again, or delete the file."
        )


def _with_index(opened: Datastore, device: str) -> tuple[Datastore, NeighborIndex]:
    """The datastore with its index; opened again if another process put a new one in its place while the model was loaded."""
    while True:
        try:
            return opened, open_index(opened.path / opened.manifest.index, opened.keys, len(opened), device)
        except StoreDamaged:
            again = Datastore.open(opened.path)
            if again.manifest.index == opened.manifest.index:
                raise
            opened = again

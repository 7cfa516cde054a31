"""Putting the parts together: from a path to a model, its datastore, its index and the mixture that applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnlm.corpus import Corpus
from knnlm.datastore.fitting import require_mixable
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.datastore.reader import Datastore, Evidence
from knnlm.datastore.search_file import search_settings
from knnlm.datastore_mix import NeighborSource, StoreMix
from knnlm.errors import InvalidInput, StoreDamaged, StoreMismatch
from knnlm.gate import Gate
from knnlm.gated import StoreGate
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

if TYPE_CHECKING:
    from knnlm.evaluation.comparison import Comparison


@dataclass(frozen=True)
class SearchableStore:
    """A datastore that can be searched, and the ``mixture`` that applies to it; ``mixture_source`` says where that comes from.

    ``gate``: λ for each token, where k, temperature and weight all come from the datastore's profile and that has one.
    """

    store: Datastore
    retriever: Retriever
    mixture: Mixture
    mixture_source: str
    gate: Gate | None = None

    @property
    def store_gate(self) -> StoreGate | None:
        """The gate with its datastore, as a batch needs it."""
        return None if self.gate is None else StoreGate(self.gate, self.store)


@dataclass(frozen=True)
class OpenedKNNLM:
    """A kNN language model with the datastore it reads."""

    knn_lm: KNNLanguageModel
    searchable: SearchableStore
    model: HFLanguageModel

    @property
    def store(self) -> Datastore:
        """The datastore."""
        return self.searchable.store

    @property
    def retriever(self) -> Retriever:
        """What searches it."""
        return self.searchable.retriever

    @property
    def mixture_source(self) -> str:
        """Where the settings of the mixture come from."""
        return self.searchable.mixture_source

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

    def compare(self, *paths: str | Path, mixture: Mixture | None = None, **options: Any) -> Comparison:
        """Perplexity of base LM and kNN-LM over the text of files and folders; ``options`` are those of :func:`knnlm.compare`."""
        # Evaluation opens stores itself, so it can't be there before this module.
        from knnlm.evaluation.compare import compare

        return compare(self.knn_lm, self.store, self.read(self.corpus(*paths)), mixture=mixture, **options)

    def generate(
        self, prompt: str, *, max_new_tokens: int = 64, sampling: SamplingParams | None = None, mixture: Mixture | None = None
    ) -> str:
        """Continue ``prompt``, for one request at a time; see :func:`knnlm.generation.generate`."""
        return generate(self.knn_lm, self.model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, mixture=mixture)


@dataclass(frozen=True)
class OpenedMix:
    """A kNN language model over several datastores, by name. ``Neighbors.stores`` numbers them in this order, from 0."""

    knn_lm: KNNLanguageModel
    stores: Mapping[str, SearchableStore]
    model: HFLanguageModel

    def next_token(self, text: str, mixture: Mixture | None = None) -> Mixed:
        """The distribution over the token that follows ``text``, as :meth:`OpenedKNNLM.next_token` gives it."""
        return self.knn_lm.next_token(text, mixture)

    def generate(
        self, prompt: str, *, max_new_tokens: int = 64, sampling: SamplingParams | None = None, mixture: Mixture | None = None
    ) -> str:
        """Continue ``prompt``; see :func:`knnlm.generation.generate`."""
        return generate(self.knn_lm, self.model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, mixture=mixture)

    def evidence(self, store: int, entry: int) -> tuple[str, Evidence]:
        """Name of the datastore of that number, and where its ``entry`` came from; as for :meth:`Datastore.evidence`."""
        name = list(self.stores)[store]
        return name, self.stores[name].store.evidence(entry)


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

    The mixture: what is given here, else the store's calibrated profile, else the defaults of :class:`Mixture`. The profile's
    adaptive weight applies where nothing is given.
    ``verify`` reads every file and compares checksums first. Raises the errors of :mod:`knnlm.errors`.
    """
    given = GivenMixture(k, temperature, weight)
    datastore = Datastore.open(store, verify=verify)
    source = ModelSource.of(datastore.manifest, model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded = source.load()
    searchable = _searchable(datastore, device, given, loaded.dtype)
    return OpenedKNNLM(_knn_lm(loaded, searchable, searchable.retriever, searchable.store_gate), searchable, loaded)


def open_mix(
    stores: Mapping[str, str | Path],
    *,
    weights: Mapping[str, float] | None = None,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    weight: float | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> OpenedMix:
    """Open several datastores, by name, with their model, and mix them: k neighbours from each share one softmax.

    ``weights``: how much the neighbours of a datastore count relative to those of others, by its name (1 where not
    named); the rest as for :func:`open_store`, with defaults from the first one, and one weight for every token where there
    are several. Raises :class:`StoreMismatch` for
    datastores that can't be mixed, and the errors of :mod:`knnlm.errors`.
    """
    weights = dict(weights or {})
    if not stores:
        raise InvalidInput("stores", "is empty, but must name at least one datastore.")
    if unknown := sorted(set(weights) - set(stores)):
        raise InvalidInput("weights", f"names {', '.join(unknown)}, but the datastores are {', '.join(stores)}.")
    opened = {name: Datastore.open(path, verify=verify) for name, path in stores.items()}
    require_mixable({name: store.manifest for name, store in opened.items()})
    manifest = next(iter(opened.values())).manifest
    loaded = ModelSource.of(manifest, model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code).load()
    given = GivenMixture(k, temperature, weight)
    searchable = {name: _searchable(store, device, given, loaded.dtype) for name, store in opened.items()}
    mix = StoreMix([part.retriever for part in searchable.values()], [weights.get(name, 1.0) for name in searchable])
    first = next(iter(searchable.values()))
    # A gate knows the neighbours of its own datastore only.
    return OpenedMix(_knn_lm(loaded, first, mix, first.store_gate if len(searchable) == 1 else None), searchable, loaded)


def open_searchable(
    store: str | Path,
    *,
    dtype: str,
    device: str = "cpu",
    k: int | None = None,
    temperature: float | None = None,
    weight: float | None = None,
    verify: bool = False,
) -> SearchableStore:
    """Open the datastore at ``store`` with its index and no model, for one that is loaded already and computes in
    ``dtype``; see :func:`open_store`."""
    return _searchable(Datastore.open(store, verify=verify), device, GivenMixture(k, temperature, weight), dtype)


@dataclass(frozen=True)
class GivenMixture:
    """Settings of the mixture that a caller chose; None: the datastore's."""

    k: int | None = None
    temperature: float | None = None
    weight: float | None = None


def _mixture(store: Datastore, given: GivenMixture) -> tuple[Mixture, str, Gate | None]:
    """The mixture that applies, where it comes from, and the gate, which belongs to the profile as it stands."""
    profile = store.profile
    chosen = {name: value for name, value in vars(given).items() if value is not None}
    mixture = replace(profile.mixture if profile else Mixture(), **chosen).validate()
    settings_from = "calibrated profile" if profile else "defaults"
    if chosen:
        settings_from = "given" if len(chosen) == 3 else f"{', '.join(sorted(chosen))} given, the rest {settings_from}"
        return mixture, settings_from, None
    gate = None if profile is None else profile.gate
    return mixture, settings_from if gate is None else f"{settings_from} with an adaptive weight", gate


def _searchable(datastore: Datastore, device: str, given: GivenMixture, dtype: str) -> SearchableStore:
    mixture, mixture_source, gate = _mixture(datastore, given)
    datastore, index = _with_index(datastore, device)
    if datastore.profile is not None and None in vars(given).values():
        require_profile_fits(datastore, datastore.profile, dtype, index)
    retriever = Retriever(index, datastore.keys, datastore.values, search_settings(datastore, index), datastore.allowed)
    return SearchableStore(datastore, retriever, mixture, mixture_source, gate)


def _knn_lm(model: HFLanguageModel, first: SearchableStore, source: NeighborSource, gate: StoreGate | None) -> KNNLanguageModel:
    text = first.store.manifest.text
    return KNNLanguageModel(model, model.tokenizer(text.bos, text.eos), source, first.mixture, gate)  # type: ignore[arg-type]


def profile_facts(store: Datastore, dtype: str, index: NeighborIndex) -> dict[str, str]:
    """What a profile belongs to beside its kind of distance: with another of these, the same settings make another mixture."""
    manifest = store.manifest
    return {
        # Without the device: results are those of the CPU.
        "index": index.description.rpartition(" (")[0],
        "model": manifest.model.fingerprint.weights,
        "key_layer": manifest.key.layer.kind,
        "dtype": dtype,
    }


def require_profile_fits(store: Datastore, profile: Profile, dtype: str, index: NeighborIndex) -> None:
    """Raise :class:`StoreMismatch`, naming the difference, for a profile that was calibrated with something else."""
    facts = {"distance": "exact" if store.manifest.key.stored else "index", **profile_facts(store, dtype, index)}
    for name, calibrated in {"distance": profile.distance, **profile.belongs}.items():
        if (found := facts.get(name)) != calibrated:
            raise StoreMismatch(
                f"{store.path / PROFILE} was calibrated with the {name.replace('_', ' ')} {calibrated!r}, but it is {found!r} now; "
                "calibrate again (knnlm calibrate), give k, temperature and weight, or delete the file."
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

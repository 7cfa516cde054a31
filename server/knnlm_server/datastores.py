"""The datastores that are served, by name: opened and checked aside, swapped at once, kept by the requests that use them.

Any thread may ask and change; files are read by the thread that changes, never under the lock that those who ask wait for.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.datastore.fitting import require_mixable, require_special_tokens
from knnlm.datastore.removal import remove_documents
from knnlm.errors import InvalidInput, StoreMismatch
from knnlm.model import LanguageModel
from knnlm.opening import SearchableStore, open_searchable
from knnlm.tokenization import TextTokenizer
from knnlm.windows import Windowing
from knnlm_server.errors import DatastoreLoaded, DatastoreNotLoaded
from knnlm_server.sequence import DATASTORE_NAME, DatastoreInfo, RetrievalParams
from knnlm_server.served_stores import ChosenStores, ServedStore
from knnlm_server.store_watch import StoreWatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOptions:
    """How datastores are opened: the ``device`` that searches, settings of the mixture that go before those of the datastore,
    and whether every file is read and its checksum compared."""

    device: str = "cpu"
    k: int | None = None
    temperature: float | None = None
    weight: float | None = None
    verify: bool = False


class Datastores:
    """What is served, the default first: the server's :class:`~knnlm_server.engine_protocol.DatastoreAdmin`.

    ``model`` and ``tokenizer``: what every datastore must fit.
    """

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, options: StoreOptions | None = None) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options or StoreOptions()
        self._served: tuple[ServedStore, ...] = ()
        self._in_use: weakref.WeakValueDictionary[int, ServedStore] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # held to look at or to swap what is served
        self._changing = threading.Lock()  # held by the one change that is made
        self._watch = StoreWatch(self.in_use)

    @property
    def info(self) -> tuple[DatastoreInfo, ...]:
        """What is told of those that are served, the default first."""
        return tuple(served.info for served in self._served)

    def in_use(self) -> list[ServedStore]:
        """Those that are served, and those that only running requests still hold."""
        with self._lock:
            return list(self._in_use.values())

    def numbered(self, number: int) -> ServedStore:
        """The one of that number, which somebody must hold."""
        with self._lock:
            return self._in_use[number]

    def look(self) -> None:
        """Take over removals, of all in use; for the thread that searches, between two steps."""
        self._watch.look()

    def choose(self, retrieval: RetrievalParams) -> ChosenStores:
        """The datastores that a request uses; whoever holds the result keeps them, whatever is changed here.

        Raises :class:`DatastoreNotLoaded`, and :class:`StoreMismatch` for several that can't be mixed.
        """
        if not retrieval.searches:
            return ChosenStores()
        if not retrieval.datastores:
            return ChosenStores.of(((self._default(), 1.0),), retrieval)
        chosen = tuple((self._named(choice.name), choice.weight) for choice in retrieval.datastores)
        if len(chosen) > 1:
            require_mixable({served.name: served.store.manifest for served, _ in chosen})
        return ChosenStores.of(chosen, retrieval)

    def windowing(self, retrieval: RetrievalParams) -> Windowing:
        """The windows of the datastore that is named first, of the default one, or those of a build with this model."""
        if retrieval.datastores:
            return self._named(retrieval.datastores[0].name).store.manifest.windowing
        served = self._served
        return served[0].store.manifest.windowing if served else Windowing.for_context(self._model.context)

    def load(self, name: str, path: Path, *, make_default: bool = False) -> DatastoreInfo:
        """See :meth:`~knnlm_server.engine_protocol.DatastoreAdmin.load`."""
        with self._changing:
            self._require_free(name)
            opened = self._open(name, path)
            self._serve((opened, *self._served) if make_default else (*self._served, opened))
        _log.info("the datastore %s is served: %d entries at %s", name, opened.info.entries, path)
        return opened.info

    def unload(self, name: str) -> None:
        """See :meth:`~knnlm_server.engine_protocol.DatastoreAdmin.unload`. The next one in order becomes the default."""
        with self._changing:
            gone = self._named(name)
            self._serve(tuple(served for served in self._served if served is not gone))
        _log.info("the datastore %s is served no more", name)

    def reload(self, name: str, path: Path | None = None) -> DatastoreInfo:
        """See :meth:`~knnlm_server.engine_protocol.DatastoreAdmin.reload`. It keeps its place in the order."""
        with self._changing:
            old = self._named(name)
            opened = self._open(name, path or old.store.path)
            self._serve(tuple(opened if served is old else served for served in self._served))
        _log.info("the datastore %s was opened again: %d entries at %s", name, opened.info.entries, opened.store.path)
        return opened.info

    def remove_documents(self, name: str, ids: Sequence[str], where: Mapping[str, str]) -> tuple[int, int]:
        """See :meth:`~knnlm_server.engine_protocol.DatastoreAdmin.remove_documents`. The next step of the engine knows of it."""
        with self._changing:
            removal = remove_documents(self._named(name).store.path, ids, where)
            self._watch.hurry()
        _log.info("%d documents with %d entries were removed from the datastore %s", len(removal.removed), removal.entries, name)
        return len(removal.removed), removal.entries

    def serve(self, name: str, opened: SearchableStore) -> ServedStore:
        """Serve a datastore that is open already and fits, as the last in order."""
        with self._changing:
            self._require_free(name)
            served = self._numbered(name, opened)
            self._serve((*self._served, served))
        return served

    def warm_up(self) -> None:
        """Search each once."""
        for served in self._served:
            served.warm_up()

    def _open(self, name: str, path: Path) -> ServedStore:
        options = self._options
        opened = open_searchable(
            path,
            dtype=self._model.dtype,
            device=options.device,
            k=options.k,
            temperature=options.temperature,
            weight=options.weight,
            verify=options.verify,
        )
        try:
            opened.store.manifest.require_model(self._model)
            require_special_tokens(opened.store.manifest, self._tokenizer)
        except StoreMismatch as error:
            raise StoreMismatch(f"{path} can't be served beside what is loaded: {error}") from error
        served = self._numbered(name, opened)
        served.warm_up()
        return served

    def _require_free(self, name: str) -> None:
        if not DATASTORE_NAME.fullmatch(name):
            raise InvalidInput(
                "name", f"is {name!r}, but must be 1 to 64 letters, digits, -, _ and ., of which the first is a letter or digit."
            )
        if any(served.name == name for served in self._served):
            raise DatastoreLoaded(f"A datastore {name!r} is loaded already; reload it, or choose another name.")

    def _numbered(self, name: str, opened: SearchableStore) -> ServedStore:
        served = ServedStore.of(name, next(self._numbers), opened)
        with self._lock:
            self._in_use[served.number] = served
        return served

    def _serve(self, served: tuple[ServedStore, ...]) -> None:
        with self._lock:
            self._served = served

    def _default(self) -> ServedStore:
        served = self._served
        if not served:
            raise DatastoreNotLoaded("No datastore is loaded; a request can only be answered by the base model alone (retrieval off).")
        return served[0]

    def _named(self, name: str) -> ServedStore:
        served = self._served
        for one in served:
            if one.name == name:
                return one
        there = f"there are {', '.join(sorted(one.name for one in served))}" if served else "there is none"
        raise DatastoreNotLoaded(f"No datastore {name!r} is loaded; {there}.")

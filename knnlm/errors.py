"""Every error that knnlm raises on purpose. Knows no transport: exit and status codes are given at the borders.

::

    KNNLMError
    ├── InvalidInput            an option or field has a value that can't be used (names the field)
    ├── MissingDependency       an optional package is not installed (names the extra)
    ├── ModelError              a language model can't be loaded or used
    │   └── KeyLayerNotFound    the tensor that serves as key is not found in its structure
    ├── CorpusError             input text can't be read, or yields nothing
    ├── NonFiniteKey            a key is NaN or infinite
    │   └── KeyOverflow         it is too large for the dtype in which it would be stored
    ├── WorkerLost              a worker process of a build ended without a word
    ├── IndexingError           a neighbour index can't be built, read or searched
    └── StoreError              something about a datastore
        ├── StoreNotFound       there is none at the path
        ├── StoreIncomplete     a build of it was not finished
        ├── StoreDamaged        a file is missing, truncated or does not match its checksum
        ├── StoreVersion        written in a format that this version does not know
        ├── StoreMismatch       it belongs to another model, tokenizer, key layer or corpus
        ├── StoreLocked         another process is writing it
        └── DocumentNotFound    it holds no document of that id, or none that meets the conditions
"""

from __future__ import annotations

__all__ = [
    "CorpusError",
    "DocumentNotFound",
    "IndexingError",
    "InvalidInput",
    "KNNLMError",
    "KeyLayerNotFound",
    "KeyOverflow",
    "MissingDependency",
    "ModelError",
    "NonFiniteKey",
    "StoreDamaged",
    "StoreError",
    "StoreIncomplete",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "StoreVersion",
    "WorkerLost",
]


class KNNLMError(Exception):
    """Base of all; its text is one sentence that says what was found and what to do."""


class InvalidInput(KNNLMError):
    """An option or field has a value that can't be used.

    ``field`` is its name as the caller knows it (``sampling.top_p``, ``--weight``).
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str]]:
        # As it was made, so that it comes whole out of a worker process.
        return type(self), (self.field, self.problem)


class MissingDependency(KNNLMError):
    """An optional package is not installed."""


class ModelError(KNNLMError):
    """A language model can't be loaded or used."""


class KeyLayerNotFound(ModelError):
    """The tensor that serves as key is not found in the model's structure."""


class CorpusError(KNNLMError):
    """Input text can't be read, or yields nothing."""


class NonFiniteKey(KNNLMError):
    """A key is NaN or infinite."""


class KeyOverflow(NonFiniteKey):
    """A key is too large for the dtype in which it would be stored."""


class WorkerLost(KNNLMError):
    """A worker process of a build ended without a word."""


class IndexingError(KNNLMError):
    """A neighbour index can't be built, read or searched."""


class StoreError(KNNLMError):
    """Something about a datastore."""


class StoreNotFound(StoreError):
    """There is no datastore at the path."""


class StoreIncomplete(StoreError):
    """A build of the datastore was not finished."""


class StoreDamaged(StoreError):
    """A file of the datastore is missing, truncated or does not match its checksum."""


class StoreVersion(StoreError):
    """The datastore is written in a format that this version does not know."""


class StoreMismatch(StoreError):
    """The datastore belongs to another model, tokenizer, key layer or corpus."""


class StoreLocked(StoreError):
    """Another process is writing the datastore."""


class DocumentNotFound(StoreError):
    """The datastore holds no document of that id, or none that meets the conditions."""

"""kNN language models: p = λ·p_kNN + (1-λ)·p_LM (Khandelwal et al., 2020), as a library.

Names are imported when they are first used, so that importing a torch-free part (the client, the errors) stays cheap.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("knnlm")

if TYPE_CHECKING:
    from knnlm.datastore.reader import Datastore
    from knnlm.datastore.removal import Removal, remove_documents
    from knnlm.evaluation.compare import compare
    from knnlm.evaluation.compare_stores import compare_stores
    from knnlm.evaluation.compared_stores import ComparedStores
    from knnlm.evaluation.comparison import Comparison
    from knnlm.knn_lm import KNNLanguageModel
    from knnlm.mixture import Mixture
    from knnlm.model import HFLanguageModel
    from knnlm.opening import open_mix, open_store
    from knnlm.sampling import SamplingParams

_HOMES = {
    "ComparedStores": "knnlm.evaluation.compared_stores",
    "Comparison": "knnlm.evaluation.comparison",
    "Datastore": "knnlm.datastore.reader",
    "HFLanguageModel": "knnlm.model",
    "KNNLanguageModel": "knnlm.knn_lm",
    "Mixture": "knnlm.mixture",
    "Removal": "knnlm.datastore.removal",
    "SamplingParams": "knnlm.sampling",
    "compare": "knnlm.evaluation.compare",
    "compare_stores": "knnlm.evaluation.compare_stores",
    "open_mix": "knnlm.opening",
    "open_store": "knnlm.opening",
    "remove_documents": "knnlm.datastore.removal",
}

__all__ = [
    "ComparedStores",
    "Comparison",
    "Datastore",
    "HFLanguageModel",
    "KNNLanguageModel",
    "Mixture",
    "Removal",
    "SamplingParams",
    "__version__",
    "compare",
    "compare_stores",
    "open_mix",
    "open_store",
    "remove_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'knnlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

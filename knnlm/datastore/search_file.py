"""Measured search settings of a datastore: ``search/NNNNN.json``, which the manifest names and lists."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from knnlm.datastore.files import FileFacts, file_facts, read_json_with_checksum, sync_folder, write_json_with_checksum
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.parsing import parse
from knnlm.errors import InvalidInput, StoreDamaged, StoreError
from knnlm.search_settings import SearchSettings, SearchTuning

if TYPE_CHECKING:
    from knnlm.datastore.reader import Datastore
    from knnlm.index import NeighborIndex

FIRST_SEARCH_FILE = "search/00000.json"


def write_search(store: Path, name: str, tuning: SearchTuning) -> FileFacts:
    """Write ``tuning`` as file ``name`` of the folder ``store``, durably, and return what the manifest lists of it."""
    path = store / name
    path.parent.mkdir(exist_ok=True)
    write_json_with_checksum(path, asdict(tuning))
    sync_folder(store)
    return file_facts(path)


def read_search(store: Path, manifest: Manifest) -> SearchTuning | None:
    """What ``manifest`` names, None if it names nothing; raises :class:`StoreDamaged` for anything odd."""
    if manifest.search is None:
        return None
    path = store / manifest.search
    tuning = parse(SearchTuning, read_json_with_checksum(path), str(path))
    if problem := _problem(tuning):
        raise StoreDamaged(f"{path} is damaged: {problem}")
    return tuning


def search_settings(store: Datastore, index: NeighborIndex) -> SearchSettings:
    """The settings for searches of ``index``: as measured, by rule where nothing was.

    Raises :class:`StoreDamaged` if they were measured with an index of another number of cells.
    """
    tuning = store.search
    if tuning is None:
        return SearchSettings(index.nlist, index.entries)
    if tuning.nlist != index.nlist:
        raise StoreDamaged(
            f"{store.path / str(store.manifest.search)} was measured with {tuning.nlist} cells, but the index has {index.nlist}; "
            f"measure again with: knnlm doctor {store.path} --apply"
        )
    return SearchSettings.tuned(tuning)


def _problem(tuning: SearchTuning) -> str | None:
    """A sentence on what can't be in a file of this version."""
    if not all(math.isfinite(value) for point in tuning.curve for value in asdict(point).values()):
        return "a point of the curve is not finite."
    ks = [setting.k for setting in tuning.settings]
    if ks != sorted(set(ks)) or min(ks, default=1) < 1:
        return f"its settings are for k of {ks}, expected ascending numbers."
    for setting in tuning.settings:
        if not min(1, tuning.nlist) <= setting.probes <= tuning.nlist:
            return f"probes is {setting.probes} for an index of {tuning.nlist} cells."
    try:
        met = all(tuning.point(setting).total_variation <= tuning.target for setting in tuning.settings)
    except InvalidInput as error:
        return str(error)
    return None if met == tuning.met else f"met is {tuning.met}, but the curve says {met}."


def replace_search(store: Path, measured: Manifest, tuning: SearchTuning) -> Manifest:
    """Put ``tuning`` in the place of the store's settings, and return the new manifest.

    ``measured``: the manifest of the store when it was measured; documents may have been removed since. A new file
    first, then the manifest that names it, then all others go; an interrupt leaves the old settings or the new ones.
    Raises :class:`StoreLocked` while another process writes, :class:`StoreError` if the index is another one by now.
    """
    with locked(store):
        manifest = Manifest.read(store)
        if (manifest.index, manifest.counts) != (measured.index, measured.counts):
            raise StoreError(f"{store} was changed while it was measured; run the same command again.")
        old = manifest.search
        name = FIRST_SEARCH_FILE if old is None else f"search/{int(Path(old).stem) + 1:05d}.json"
        files = {other: facts for other, facts in manifest.files.items() if other != old}
        manifest = replace(manifest, search=name, files={**files, name: write_search(store, name, tuning)})
        manifest.write(store)
        for other in (store / name).parent.iterdir():
            if other != store / name:
                other.unlink()
    return manifest

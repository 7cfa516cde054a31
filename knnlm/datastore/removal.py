"""Removal: documents that no search returns any more, from the moment that the manifest says so.

Nothing is rewritten: the removed documents' serials stand in a tombstone file that the manifest names. Whatever happens
on the way, the store is as it was or as it is to be, and the same call ends what another one began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from knnlm.datastore.audit import log_operation
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import file_facts, sync_folder
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import MANIFEST, Manifest, RemovedFacts
from knnlm.datastore.reader import check_files, removed_serials
from knnlm.datastore.selection import Rows, matching_rows, named_rows, require_all
from knnlm.datastore.tombstones import write_serials
from knnlm.errors import DocumentNotFound, InvalidInput, StoreError

REMOVED_FOLDER = "removed"


@dataclass(frozen=True)
class Removal:
    """What a removal came to: ids of the documents that it ``removed`` and of those that were ``already_removed``,
    both in corpus order; ``entries`` that went with the former; documents and entries that are left."""

    removed: list[str]
    already_removed: list[str]
    entries: int
    documents_left: int
    entries_left: int


def remove_documents(
    path: str | Path, ids: Sequence[str] = (), where: Mapping[str, str] | None = None, *, dry_run: bool = False
) -> Removal:
    """Remove the documents with these ``ids`` that meet every condition of ``where``; either may be left out.

    Conditions are those of :func:`~knnlm.datastore.selection.matching_rows`. Durable when this returns: whoever opens the
    store after it finds none of the documents, and a server that has it open loses them within a second. ``dry_run``
    changes nothing. Raises :class:`DocumentNotFound` where an id is unknown or does not meet the conditions, or where no
    document meets them, and removes none then; :class:`InvalidInput` if nothing says which; :class:`StoreLocked`,
    :class:`StoreIncomplete` and the other errors of a store.
    """
    store, where = Path(path), dict(where or {})
    if not ids and not where:
        raise InvalidInput("document", "must name what to remove, unless --where or --ids-from does.")
    with locked(store):
        manifest = Manifest.read(store)
        check_files(store, manifest, verify=False)
        table = DocumentTable([store / name for name in manifest.documents])
        gone = np.isin(table.serials, removed_serials(store, manifest))
        chosen = _chosen(table, ids, where)
        new, old = chosen[~gone[chosen]], chosen[gone[chosen]]
        gone[new] = True
        try:
            if not dry_run and len(new):
                manifest = _write(store, manifest, table, new, np.flatnonzero(gone), sorted(where))
            if not dry_run:
                _settle(store, manifest)
        except OSError as error:
            raise StoreError(
                f"{error.filename or store} can't be written ({error.strerror or error}); when that is mended, run the same command again."
            ) from error
    removed = table.texts("id", new)
    return Removal(
        removed=removed,
        already_removed=[name for name in dict.fromkeys(table.texts("id", old)) if name not in set(removed)],
        entries=_entries(table, new),
        documents_left=int((~gone).sum()),
        entries_left=manifest.counts.entries - _entries(table, np.flatnonzero(gone)),
    )


def _chosen(table: DocumentTable, ids: Sequence[str], where: Mapping[str, str]) -> Rows:
    """Numbers of the documents that are meant, removed ones among them."""
    conditions = " and ".join(f"{name}={value}" for name, value in where.items())
    rows = matching_rows(table, where)
    if ids:
        rows = np.intersect1d(rows, named_rows(table, ids), assume_unique=True)
        require_all(ids, table.texts("id", rows), f"Nothing was removed, since {conditions} does not hold for the document")
    elif not len(rows):
        raise DocumentNotFound(f"There is no document for which {conditions} holds.")
    return rows


def _entries(table: DocumentTable, rows: Rows) -> int:
    """Each token of a document but its first is the value of an entry."""
    return int(table.token_counts[rows].sum()) - len(rows)


def _write(store: Path, manifest: Manifest, table: DocumentTable, new: Rows, gone: Rows, fields: list[str]) -> Manifest:
    """Put a tombstone file with all of ``gone`` in the place of the one before; ``new`` of them go with this removal.

    The log takes only the names of the fields that chose them, since their values may be what is to be forgotten.
    """
    old = manifest.removed
    name = f"{REMOVED_FOLDER}/{int(Path(old.file).stem) + 1 if old else 0:05}.npy"
    (store / REMOVED_FOLDER).mkdir(exist_ok=True)
    sync_folder(store)
    write_serials(store / name, table.serials[gone])
    audit = log_operation(
        store, manifest, "remove", documents=table.texts("id", new), entries=_entries(table, new), where=fields,
        documents_removed_in_all=len(gone),
    )  # fmt: skip
    files = {listed: facts for listed, facts in manifest.files.items() if old is None or listed != old.file}
    after = replace(
        manifest,
        files={**files, name: file_facts(store / name)},
        removed=RemovedFacts(name, len(gone), _entries(table, gone)),
        audit=audit,
        # What was appended may be appended again now that some of it may be gone.
        appended=[],
    )
    after.write(store)
    return after


def _settle(store: Path, manifest: Manifest) -> None:
    """Delete what a removal leaves behind that was ended on its way, and make sure of the manifest."""
    sync_folder(store)
    for path in (*store.glob(f"{REMOVED_FOLDER}/*"), *store.glob(f"{MANIFEST}.tmp")):
        if path.relative_to(store).as_posix() not in manifest.files:
            path.unlink()

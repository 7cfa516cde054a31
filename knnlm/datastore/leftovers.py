"""Files in a store's folder that no manifest speaks of any more: what an interrupted operation left behind."""

from __future__ import annotations

from pathlib import Path

from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.files import sync_folder
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, RECEIPT, Manifest
from knnlm.datastore.profile import PROFILE


def leftovers(store: Path, manifest: Manifest) -> list[Path]:
    """Files that ``manifest`` does not list, in sorted order; those of an operation that can go on (``.build``) excluded."""
    receipts = {f"shards/{shard.name}/{RECEIPT}" for shard in manifest.shards}  # version 1 does not list them
    known = {*manifest.files, *receipts, MANIFEST, PROFILE, AUDIT_LOG}
    found = (path for path in store.rglob("*") if not path.is_dir())
    return sorted(
        path for path in found
        if (relative := path.relative_to(store)).as_posix() not in known and relative.parts[0] != BUILD_FOLDER
    )  # fmt: skip


def delete_leftovers(store: Path, manifest: Manifest) -> None:
    """Delete them, and the folders that are empty then. For the holder of the store's lock, with ``manifest`` on disk."""
    for path in leftovers(store, manifest):
        path.unlink()
    for folder in sorted((path for path in store.rglob("*") if path.is_dir()), reverse=True):
        if folder.name != BUILD_FOLDER and not any(folder.iterdir()):
            folder.rmdir()
    sync_folder(store)

"""A store's folder while it is written: the lock, the scratch folder, names of new files, and the commit.

Every file of a store is written once and never changed; an operation writes new ones, then puts a new manifest in the
place of the old, then deletes what no manifest speaks of. So a reader sees the store before or after, never between.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from knnlm.datastore.files import FileFacts, file_facts, named, sync_file, sync_folder, write_atomically
from knnlm.datastore.leftovers import delete_leftovers
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, RECEIPT, Manifest
from knnlm.errors import StoreError
from knnlm_index_builder.encode import ShardReceipt
from knnlm_index_builder.plan import require_same

SETTINGS = "settings.json"


class Site:
    """The folder of one store, held by one operation. ``base``: the manifest of what is there already (None: nothing)."""

    def __init__(self, store: Path, base: Manifest | None = None) -> None:
        self.store, self.base = store, base
        self.scratch = store / BUILD_FOLDER

    def claim(self, plan: dict[str, Any]) -> None:
        """Note what is being done in the scratch folder, or compare it with what was begun there."""
        begun = self.begun()
        if begun is not None:
            self._require_same(begun, plan)
            return
        if self.base is not None:
            # Shards of an operation that was given up must not be taken for those of this one.
            self.clean_up(self.base)
        others = [entry.name for entry in self.store.iterdir() if entry.name != BUILD_FOLDER]
        if others and self.base is None:
            raise StoreError(
                f"{self.store} is not empty and no datastore (it holds {', '.join(sorted(others)[:3])}); choose another --store."
            )
        self.scratch.mkdir(exist_ok=True)
        write_atomically(self.scratch / SETTINGS, as_json(plan))

    def begun(self) -> dict[str, Any] | None:
        """The plan of an operation that was not finished; None for one whose process was killed right after its commit."""
        found = self._noted()
        return None if found is None or self._is_over(found) else found

    def committed(self) -> dict[str, Any] | None:
        """The plan of an operation whose process was killed right after its commit."""
        found = self._noted()
        return found if found is not None and self._is_over(found) else None

    def _noted(self) -> dict[str, Any] | None:
        path = self.scratch / SETTINGS
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    def _is_over(self, plan: dict[str, Any]) -> bool:
        # Every commit of an operation on a base gives it another list of segments, which the plan names.
        return self.base is not None and plan.get("documents") != self.base.documents

    def _require_same(self, begun: dict[str, Any], plan: dict[str, Any]) -> None:
        operation = begun.get("operation", "build")
        if operation != plan["operation"]:
            raise StoreError(
                f"{self.store} holds an unfinished {operation}; finish it with the command that began it, or give it up by "
                f"deleting the folder {self.scratch}."
            )
        require_same(begun, plan, f"{self.store} holds an unfinished {operation}, to be removed ({self.scratch}) if it is not wanted")

    def abandon(self) -> None:
        """Forget an operation that made nothing of worth yet."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def commit(self, manifest: Manifest) -> None:
        """Make ``manifest`` the store's, and delete what it does not speak of."""
        manifest.write(self.store)
        self.clean_up(manifest)

    def clean_up(self, manifest: Manifest) -> None:
        """What follows a commit; also for one whose process was killed right after it."""
        delete_leftovers(self.store, manifest)
        # The plan last, so that an operation whose process is killed here is known to be finished.
        for entry in self.scratch.iterdir() if self.scratch.exists() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != SETTINGS:
                entry.unlink()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def place(self, source: Path, name: str) -> None:
        """Copy a finished file of the scratch folder into the store under ``name``."""
        target = self.store / name
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(target.name + ".tmp")
        with named(aside):
            shutil.copyfile(source, aside)
        sync_file(aside)
        aside.replace(target)
        sync_folder(target.parent)


def next_name(current: str | None) -> str:
    """The number that follows the one in ``current`` (``index/00003`` -> ``00004``), as new files are named."""
    number = Path(current).name.split(".")[0] if current else ""
    return f"{int(number) + 1 if number.isdigit() else int(current is not None):05d}"


def as_json(content: dict[str, Any]) -> bytes:
    """Settings as they are written."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


@contextmanager
def held(store: Path) -> Iterator[None]:
    """The folder ``store``, made if it is not there, locked; a refusal leaves nothing behind."""
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; --store names a folder.")
    store.mkdir(parents=True, exist_ok=True)
    try:
        with locked(store):
            yield
    finally:
        # A build that was refused before it began leaves no empty folder; one that holds something stays.
        with suppress(OSError):
            store.rmdir()


def is_complete(store: Path) -> bool:
    """Whether there is a finished datastore."""
    return (store / MANIFEST).exists()


def shard_files(receipts: Sequence[ShardReceipt], store: Path) -> dict[str, FileFacts]:
    """The files of shards, receipts among them, as a manifest lists them."""
    files: dict[str, FileFacts] = {}
    for receipt in receipts:
        folder = f"shards/{receipt.facts.name}"
        files |= {f"{folder}/{name}": facts for name, facts in receipt.files.items()}
        files[f"{folder}/{RECEIPT}"] = file_facts(store / folder / RECEIPT)
    return files


def now() -> str:
    """The time as manifests say it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

"""The audit log: a JSON line for each removal, append and compaction, before it takes effect. Never rewritten."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import knnlm
from knnlm.datastore.files import FileFacts, file_facts, named, sync_folder
from knnlm.datastore.manifest import Manifest

AUDIT_LOG = "audit.log"


def log_operation(store: Path, manifest: Manifest, operation: str, **facts: Any) -> FileFacts:
    """Append a line and return what the next manifest says of the log.

    ``facts``: what was done, in words of JSON. The line is on disk when this returns; if the process ends before the
    operation takes effect, the same command writes another one. No value of a document's metadata belongs here, since
    the log outlives the document.
    """
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "operation": operation,
        "knnlm_version": knnlm.__version__,
        "fingerprint_before": manifest.fingerprint,
        **facts,
    }
    path = store / AUDIT_LOG
    new = not path.exists()
    with named(path), path.open("ab+") as file:
        file.write(_line_end(file) + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(store)
    return file_facts(path)


def _line_end(file: BinaryIO) -> bytes:
    """What is missing at the end of the log where a process was ended while it wrote; nothing elsewhere."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def logged_operations(store: Path) -> int:
    """Number of lines in the audit log; 0 without one."""
    path = store / AUDIT_LOG
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)

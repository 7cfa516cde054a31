"""The audit log: a JSON line for each removal, append and compaction, before it takes effect. Never rewritten."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import knnlm
from knnlm.datastore.files import FileFacts, file_facts
from knnlm.datastore.manifest import Manifest

AUDIT_LOG = "audit.log"


def log_operation(store: Path, manifest: Manifest, operation: str, **facts: Any) -> FileFacts:
    """Append a line and return what the next manifest says of the log.

    ``facts``: what was done, in words of JSON. The line is on disk when this returns; if the process ends before the
    operation takes effect, the same command writes another one.
    """
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "operation": operation,
        "knnlm_version": knnlm.__version__,
        "fingerprint_before": manifest.fingerprint,
        **facts,
    }
    path = store / AUDIT_LOG
    with path.open("ab") as file:
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return file_facts(path)

"""Make the protos of now the ones that later changes are compared with: ``python scripts/release_protos.py``.

Run once at each release. ``make lint`` and ``tests/server/test_stubs.py`` let ``buf breaking`` compare ``protos/`` with
``tests/golden/protos/``, so that no client of the last release breaks unnoticed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
RELEASED = ROOT / "tests" / "golden" / "protos"


def release(source: Path = PROTOS, target: Path = RELEASED) -> None:
    """Replace ``target`` by a copy of the protos below ``source``."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)


if __name__ == "__main__":
    release()
    print(RELEASED)

"""Write the Python stubs of ``protos/`` into ``server/knnlm_server/pb/``: ``python scripts/generate_stubs.py [FOLDER]``.

protoc's virtual path gives the generated code the imports of its final place, so nothing is edited afterwards. The
stubs are committed; ``tests/server/test_stubs.py`` writes them anew and compares. Knows nothing of what they are for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc_tools  # type: ignore[import-untyped]
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "knnlm_server/pb"


def generate(folder: Path) -> list[Path]:
    """Write the stubs below ``folder`` (the one that holds the package ``knnlm_server``) and return their paths.

    Raises RuntimeError where protoc refuses a file; it has printed why.
    """
    folders = [ROOT / "protos" / "knnlm" / "v1", ROOT / "protos" / "knnlm" / "admin" / "v1"]
    sources = sorted(source for found in folders for source in found.glob("*.proto"))
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    paths = [f"-I{PACKAGE}={found}" for found in folders]
    included = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", *paths, f"-I{included}", *outputs, *(f"{PACKAGE}/{source.name}" for source in sources)]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")
    return [folder / PACKAGE / f"{source.stem}{ending}" for source in sources for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "server"):
        print(path)

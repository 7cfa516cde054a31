"""The committed stubs are what the protos give, and the protos are clean."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


def generate(folder: Path) -> list[Path]:
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "scripts" / "generate_stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    paths: list[Path] = module.generate(folder)
    return paths


def test_committed_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    fresh = {path.name: path.read_bytes() for path in generate(tmp_path)}
    committed = ROOT / "server" / "knnlm_server" / "pb"
    assert {path.name: path.read_bytes() for path in committed.glob("*_pb2*.py*")} == fresh, "run python scripts/generate_stubs.py"


@pytest.mark.skipif(BUF is None, reason="buf (PyPI buf-bin) is not installed")
def test_protos_pass_the_linter() -> None:
    found = subprocess.run([str(BUF), "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")

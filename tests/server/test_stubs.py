"""The committed stubs are what the protos give, the protos are clean, and they break no client of the last release."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "tests" / "golden" / "protos"
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


def buf(*arguments: str, folder: Path = ROOT) -> tuple[int, str]:
    """Exit status and output of buf, run where a ``buf.yaml`` lies."""
    assert BUF is not None, "buf is not installed (PyPI buf-bin, extra dev)"
    found = subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr


def test_protos_pass_the_linter() -> None:
    assert buf("lint") == (0, "")


def test_protos_break_no_client_of_the_last_release() -> None:
    assert buf("breaking", "--against", str(RELEASED)) == (0, ""), "python scripts/release_protos.py makes a release of them"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str], Path]:
    """A folder with the protos of the last release, in which one text is replaced by another wherever it stands."""

    def change(old: str, new: str) -> Path:
        shutil.copy(ROOT / "buf.yaml", tmp_path)
        for source in RELEASED.rglob("*.proto"):
            place = tmp_path / "protos" / source.relative_to(RELEASED)
            place.parent.mkdir(parents=True)
            place.write_text(source.read_text().replace(old, new))
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("optional double min_p = 4;", "optional float min_p = 4;", "changed type"),
        ("optional double min_p = 4;", "optional double min_p = 44;", "deleted"),
        ("optional double min_p = 4;", "double min_p = 4;", "cardinality"),
        ("  FINISH_REASON_LENGTH = 4;\n", "", "deleted"),
        ("  rpc Detokenize(DetokenizeRequest) returns (DetokenizeResponse);\n", "", "deleted"),
        ("returns (stream StreamGenerateResponse)", "returns (StreamGenerateResponse)", "streaming"),
        ("package knnlm.admin.v1;", "package knnlm.admin.v2;", "package"),
    ],
)
def test_a_breaking_change_is_found(changed: Callable[[str, str], Path], old: str, new: str, said: str) -> None:
    status, output = buf("breaking", "--against", str(RELEASED), folder=changed(old, new))
    assert status == 100
    assert said in output


def test_a_new_field_breaks_nobody(changed: Callable[[str, str], Path]) -> None:
    field = "optional double min_p = 4;"
    assert buf("breaking", "--against", str(RELEASED), folder=changed(field, f"{field}\n  optional double max_p = 100;")) == (0, "")

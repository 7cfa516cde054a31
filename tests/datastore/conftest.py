"""Models that are loaded once, and a datastore whose documents have metadata."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from knnlm.model import HFLanguageModel
from tests.stores import build, gpt2, llama
from tests.tiny import tiny_corpus

__all__ = ["gpt2", "llama"]

DOCUMENTS = 12


def metadata_of(number: int) -> dict[str, object]:
    """Fields of the document ``doc-N``: of several kinds, one named like a column, one that not all have."""
    fields: dict[str, object] = {
        "license": ("MIT", "CC-BY")[number % 2],
        "year": 2000 + number // 4,
        "checked": number > 8,
        "source": "web",
    }
    return fields if number % 3 else {**fields, "tags": ["a", number]}


@pytest.fixture(scope="session")
def documented(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of ``doc-0`` to ``doc-11`` out of two JSONL files, in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "corpus").mkdir()
    for name, numbers in (("one.jsonl", range(8)), ("two.jsonl", range(8, DOCUMENTS))):
        lines = [json.dumps({"id": f"doc-{n}", "text": tiny_corpus(DOCUMENTS)[n], **metadata_of(n)}) for n in numbers]
        (folder / "corpus" / name).write_text("\n".join(lines) + "\n")
    build(folder / "corpus", folder / "store", gpt2, index="IVF4,SQ8", shard_tokens=400, max_length=16)
    return folder / "store"


@pytest.fixture
def store(documented: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(documented, tmp_path / "store"))

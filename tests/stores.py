"""What tests about datastores share: building small ones, reading all their bytes, and running the command ``knnlm``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm import cli
from knnlm.datastore.manifest import Manifest
from knnlm.model import HFLanguageModel
from knnlm_index_builder.pipeline import BuildResult, build_datastore
from knnlm_index_builder.settings import BuildSettings, Resources

__all__ = ["Silent", "build", "command", "contents", "forget_settings", "gpt2", "knnlm", "llama", "text_folder", "token_folder"]


class Silent:
    """Progress that nobody watches."""

    def update(self, stage: str, done: int, total: int | None) -> None:
        pass


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2_path: Path) -> HFLanguageModel:
    """The tiny GPT-2, loaded once; its tokenizer adds no BOS."""
    return HFLanguageModel.load(tiny_gpt2_path)


@pytest.fixture(scope="session")
def llama(tiny_llama_path: Path) -> HFLanguageModel:
    """The tiny LLaMA, loaded once; its tokenizer adds BOS."""
    return HFLanguageModel.load(tiny_llama_path)


def text_folder(folder: Path, texts: Sequence[str]) -> Path:
    """A folder with one file for each text, in order."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"story-{number:04}.txt").write_text(text)
    return folder


def token_folder(folder: Path, documents: Sequence[Sequence[int]]) -> Path:
    """A folder with one ``.npy`` for each document, in order."""
    folder.mkdir(parents=True)
    for number, tokens in enumerate(documents):
        np.save(folder / f"{number:04}.npy", np.asarray(tokens, dtype=np.int32))
    return folder


def build(
    inputs: Path | Sequence[Path], store: Path, model: HFLanguageModel, *, batch_tokens: int | None = None, **settings: Any
) -> BuildResult:
    """Build a store; ``settings`` are those of :class:`BuildSettings`."""
    paths = [inputs] if isinstance(inputs, Path) else list(inputs)
    return build_datastore(paths, store, model, BuildSettings(**settings), Silent(), Resources(batch_tokens=batch_tokens))


def contents(store: Path, *, receipts: bool = True) -> dict[str, bytes]:
    """Every file of a store by name, without what the manifest says of its time of creation (and its checksum of that).

    ``receipts`` False leaves out how shards were made (batch size, device).
    """
    found = {path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
    if not receipts:
        found = {name: content for name, content in found.items() if not name.endswith("receipt.json")}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        del manifest["created"], manifest["checksum"]
        if not receipts:
            manifest["files"] = {name: facts for name, facts in manifest["files"].items() if not name.endswith("receipt.json")}
        found["manifest.json"] = json.dumps(manifest).encode()
    return found


def forget_settings(store: Path) -> None:
    """Make of a store what a build without measurement, as that of format version 1, left: searches go by rule."""
    manifest = Manifest.read(store)
    assert manifest.search is not None
    replace(manifest, search=None, files={name: facts for name, facts in manifest.files.items() if name != manifest.search}).write(store)
    (store / manifest.search).unlink()


def knnlm(*arguments: str | Path) -> int:
    """Run the command ``knnlm`` in this process; returns its exit status."""
    return cli.run(cli.load_commands(), [str(argument) for argument in arguments])


def environment() -> dict[str, str]:
    """Of a process that knows no model hub and no terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command ``knnlm`` in a process of its own."""
    line = [sys.executable, "-m", "knnlm", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=timeout, check=False)

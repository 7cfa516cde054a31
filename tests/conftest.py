"""Shared fixtures: tiny models as checkpoints on disk, made once for a test session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors gain nothing from threads, and the pools of torch and FAISS get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny import byte_fallback_tokenizer, save, tiny_corpus, tiny_gpt2, tiny_llama, tiny_tokenizer

__all__ = ["byte_fallback_tokenizer", "tiny_corpus", "tiny_tokenizer"]

settings.register_profile(
    "knnlm", deadline=None, derandomize=True, max_examples=60, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("knnlm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make crash-test`` crashes more."""
    parser.addoption("--crashes", type=int, default=1, help="multiply the crashes and kills of builds by this")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is a GPU only."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _logs_end_with_the_test() -> Iterator[None]:
    """``knnlm serve`` in this process logs to a standard error that is gone with the test."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_gpt2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like checkpoint whose tokenizer adds no BOS by itself."""
    return save(tiny_gpt2(), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like checkpoint whose tokenizer adds BOS by itself."""
    return save(tiny_llama(), tiny_tokenizer(adds_bos=True), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2_bos_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPT-2-like model with a tokenizer that adds BOS by itself."""
    return save(tiny_gpt2(), tiny_tokenizer(adds_bos=True), tmp_path_factory.mktemp("models") / "tiny-gpt2-bos")

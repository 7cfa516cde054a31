"""Models and stores that are made once."""

from tests.index_builder.crash_cases import cases, runner
from tests.stores import gpt2, llama

__all__ = ["cases", "gpt2", "llama", "runner"]

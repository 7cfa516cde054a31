"""Models that are loaded once."""

from tests.stores import gpt2, llama

__all__ = ["gpt2", "llama"]

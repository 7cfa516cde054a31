"""Fixtures of benchmark tests."""

from tests.stores import gpt2

__all__ = ["gpt2"]

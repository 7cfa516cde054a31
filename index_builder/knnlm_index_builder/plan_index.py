"""TEMP."""
from typing import Any
def require_buildable(factory: str, dimension: int, entries: int, *, device: str, memory: int, keys_stored: bool) -> None:
    """TEMP."""
def training_points(factory: str, entries: int, dimension: int, memory: int) -> int:
    """TEMP."""
    return 20000

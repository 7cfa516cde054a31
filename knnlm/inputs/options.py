"""What a user may choose of how input is read, and what holds where nothing is chosen. Light, for commands and clients."""

from __future__ import annotations

from typing import Literal

OnError = Literal["stop", "skip"]
DEFAULT_TEXT_FIELD, DEFAULT_ID_FIELD = "text", "id"

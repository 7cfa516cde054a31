"""Errors that only a server has; the rest are knnlm's own."""

from __future__ import annotations

from knnlm.errors import KNNLMError


class QueueFull(KNNLMError):
    """The waiting queue has no room for this request; nothing was computed for it, so it may be sent again later."""


class ShuttingDown(KNNLMError):
    """The server takes no new requests, since it is being stopped."""


class EngineFailed(KNNLMError):
    """Something in the engine failed while it worked on this request."""


class CannotListen(KNNLMError):
    """The address can't be listened on: its port is in use, not allowed, or the host is not this machine."""

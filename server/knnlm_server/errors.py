"""Errors that only a server has; the rest are knnlm's own."""

from __future__ import annotations

from knnlm.errors import KNNLMError

RETRY_SECONDS = 1.0
"""When to come again where nothing is known of the pace of answers."""


class QueueFull(KNNLMError):
    """The waiting queue has no room for this request; nothing was computed for it, so it may be sent again later.

    ``retry_seconds``: after how long, as far as the server can tell.
    """

    retry_seconds: float = RETRY_SECONDS


class DatastoreNotLoaded(KNNLMError):
    """No datastore of that name is served."""


class DatastoreLoaded(KNNLMError):
    """A datastore of that name is served already."""


class ReadTooSlowly(KNNLMError):
    """A stream's client is too far behind; its request was ended, and the others go on."""


class TokenMissing(KNNLMError):
    """The call has no bearer token, or one that the server does not know."""


class RoleMissing(KNNLMError):
    """The call's bearer token has not the role that the method asks for."""


class ShuttingDown(KNNLMError):
    """The server takes no new requests, since it is being stopped."""


class EngineFailed(KNNLMError):
    """Something in the engine failed while it worked on this request."""

    @classmethod
    def of(cls, error: Exception) -> EngineFailed:
        """What a request is told when something broke that it can't help; the rest stands in the log."""
        return cls(f"The engine failed on this request ({type(error).__name__}); the server's log says more.")


class CannotListen(KNNLMError):
    """The address can't be listened on: its port is in use, not allowed, or the host is not this machine."""

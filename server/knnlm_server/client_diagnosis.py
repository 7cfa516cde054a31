"""Why no server answered: whether one side speaks TLS and the other does not, which gRPC's own texts don't say. Imports no torch."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence

SECONDS = 1.0
# What OpenSSL calls bytes that are no TLS at all.
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"}


def tls_mismatch(targets: Sequence[str], encrypted: bool) -> str:
    """A sentence about the first of ``targets`` (HOST:PORT) that speaks TLS where the client does not, or the reverse; else empty.

    Knocks at each, which takes up to :data:`SECONDS`; nothing of a call is sent.
    """
    for target in targets:
        spoken = _speaks_tls(target)
        if spoken is True and not encrypted:
            return f"The server at {target} speaks TLS, but the client does not; give it tls (--ca or --tls on the command line)."
        if spoken is False and encrypted:
            return f"The server at {target} speaks no TLS, but the client does; leave tls out (--tls, --ca, --certificate and --key)."
    return ""


def _speaks_tls(target: str) -> bool | None:
    """Whether what listens there speaks TLS; None where nothing listens or nothing can be told."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal():
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # No secret is told, and whether the certificate is right is another question.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS) as connection, context.wrap_socket(connection):
            return True
    except ssl.SSLError as error:
        return None if error.reason is None else error.reason not in _NO_TLS
    except (OSError, OverflowError):
        return None

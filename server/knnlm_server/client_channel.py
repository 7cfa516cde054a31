"""How clients reach servers: addresses, TLS, bearer token, retries and load balancing. Imports no torch.

Retries, backoff and balancing are gRPC's own, asked for by its service configuration: a call that ends with UNAVAILABLE
or RESOURCE_EXHAUSTED before anything of its response has come is sent again, at another address where there is one,
after as long as the server says (``grpc-retry-pushback-ms``) or else after a wait that doubles, give or take a fifth.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from knnlm.errors import InvalidInput
from knnlm_server.client_diagnosis import tls_mismatch
from knnlm_server.sequence import REQUEST_ID as WELL_FORMED_ID

SERVICES = ("knnlm.v1.GenerationService",)
REQUEST_ID = "x-request-id"
MOST_ATTEMPTS = 5
"""gRPC makes no more, whatever is asked for."""

# A request is kept for retries up to this size. It is what a server takes by default, so one that is refused for its size, which
# gRPC says with a code that is tried again, is sent once.
_RETRY_BYTES = 16 * 1024 * 1024
# A host that vanished without a word is noticed in the end; more often, and servers would take it for an attack.
_KEEPALIVE_MS = 360_000


@dataclass(frozen=True)
class Tls:
    """TLS to the server, from PEM files.

    ``ca``: who may have signed the server's certificate (None: the authorities that gRPC knows). ``certificate`` and
    ``key``: the client's own, where the server asks for one (mTLS). ``server_name``: the name that the server's
    certificate must bear (None: the host of the target).
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


@dataclass(frozen=True)
class Retries:
    """How often a call is tried in all, 1 (never again) to 5; seconds before the second attempt, and at most before any."""

    attempts: int = MOST_ATTEMPTS
    first_seconds: float = 0.2
    longest_seconds: float = 5.0

    def validate(self) -> Retries:
        """Return self; raise :class:`InvalidInput` where a value is out of range."""
        if not 1 <= self.attempts <= MOST_ATTEMPTS:
            raise InvalidInput("retries.attempts", f"is {self.attempts}, but must be from 1 to {MOST_ATTEMPTS}.")
        # gRPC never comes back from a wait of a millisecond.
        if not 0.01 <= self.first_seconds <= self.longest_seconds <= 3600:
            raise InvalidInput(
                "retries.first_seconds",
                f"is {self.first_seconds}, with longest_seconds {self.longest_seconds}, but they must rise, from 0.01 to 3600.",
            )
        return self


class Connection:
    """What a channel is made of, for threads and for asyncio alike.

    ``target``: where the server is, ``host:port`` (or any other name that gRPC takes), or several, which share the calls
    by turns; one that doesn't answer, or says that it isn't ready, is left out until it does. Names among several are
    looked up here, once; a single name is followed as its addresses change. ``token``: sent with every call; without
    ``tls`` whoever carries the packets can read it.
    """

    def __init__(
        self, target: str | Sequence[str], tls: Tls | None = None, token: str | None = None, retries: Retries | None = None
    ) -> None:
        targets = [target] if isinstance(target, str) else list(dict.fromkeys(target))
        if not targets or not all(targets):
            raise InvalidInput("target", "is empty; give HOST:PORT, or several.")
        self.name = ", ".join(targets)
        self._uri = targets[0] if len(targets) == 1 else _uri(targets)
        self._targets = targets
        self._token = _checked_token(token)
        self._credentials = None if tls is None else _credentials(tls)
        config = _service_config((retries or Retries()).validate(), several=len(targets) > 1)
        self._options = [*_options(config), *_authority(targets, tls)]

    def channel(self) -> grpc.Channel:
        """A channel for threads."""
        if self._credentials is None:
            return grpc.insecure_channel(self._uri, options=self._options)
        return grpc.secure_channel(self._uri, self._credentials, options=self._options)

    def aio_channel(self) -> grpc.aio.Channel:
        """A channel for the running event loop."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._uri, options=self._options)
        return grpc.aio.secure_channel(self._uri, self._credentials, options=self._options)

    def diagnosis(self) -> str:
        """A sentence where no server answers since one side speaks TLS and the other does not; else empty. Takes a moment."""
        return tls_mismatch(self._targets, self._credentials is not None)

    def metadata(self, request_id: str | None) -> tuple[tuple[str, str], ...]:
        """What goes with a call beside its message."""
        given = () if request_id is None else ((REQUEST_ID, _checked_id(request_id)),)
        return (*given, ("authorization", f"Bearer {self._token}")) if self._token else given


def _service_config(retries: Retries, several: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries.attempts > 1:
        policy = {
            "maxAttempts": retries.attempts,
            "initialBackoff": f"{retries.first_seconds:.3f}s",
            "maxBackoff": f"{retries.longest_seconds:.3f}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        config["methodConfig"] = [{"name": [{"service": service} for service in SERVICES], "retryPolicy": policy}]
    if several:
        config["healthCheckConfig"] = {"serviceName": SERVICES[0]}
    return config


def _options(config: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BYTES),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        # A server that comes up is found within a second, not after gRPC's usual minute of growing waits.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def _authority(targets: Sequence[str], tls: Tls | None) -> list[tuple[str, Any]]:
    """By what name the servers are called, where their addresses don't say it."""
    if tls is not None and tls.server_name is not None:
        return [("grpc.ssl_target_name_override", tls.server_name), ("grpc.default_authority", tls.server_name)]
    if len(targets) == 1:
        return []
    hosts = {_split(target)[0] for target in targets}
    if tls is not None and len(hosts) > 1:
        raise InvalidInput("tls.server_name", f"must be given for targets with different hosts ({', '.join(sorted(hosts))}) under TLS.")
    return [("grpc.default_authority", targets[0])]


def _uri(targets: Sequence[str]) -> str:
    """One name for several addresses, all of one family: IPv6 can hold those of IPv4 too."""
    places = [place for host, port in [_split(target) for target in targets] for place in _look_up(host, port)]
    if all(address.version == 4 for address, _ in places):
        return "ipv4:" + ",".join(f"{address}:{port}" for address, port in places)
    return "ipv6:" + ",".join(f"[{'::ffff:' if address.version == 4 else ''}{address}]:{port}" for address, port in places)


def _look_up(host: str, port: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidInput("target", f"is {host}:{port}, whose host is unknown ({error.strerror}).") from error
    places = dict.fromkeys((ipaddress.ip_address(place[0]), port) for *_, place in found)
    # A server of both families would get twice its share.
    return [place for place in places if place[0].version == 4] or list(places)


def _split(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput("target", f"is {target!r}, but each of several must be HOST:PORT.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _checked_id(request_id: str) -> str:
    # A server gives a call an id of its own where it can't take the client's, and then nobody finds it under that.
    if not WELL_FORMED_ID.fullmatch(request_id):
        raise InvalidInput("request_id", f"is {request_id!r}, but must be 1 to 64 letters, digits, '.', '_', ':' and '-'.")
    return request_id


def _checked_token(token: str | None) -> str | None:
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise InvalidInput("token", "must be printable ASCII characters, without a space at either end.")
    return token


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise InvalidInput("tls.key" if tls.key is None else "tls.certificate", "is not set; a client's certificate needs both files.")
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.ca, "tls.ca"),
        private_key=_pem(tls.key, "tls.key"),
        certificate_chain=_pem(tls.certificate, "tls.certificate"),
    )


def _pem(path: str | Path | None, field: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(field, f"is {path}, which can't be read: {error.strerror}.") from error
    if b"-----BEGIN " not in content:
        raise InvalidInput(field, f"is {path}, which is not a PEM file.")
    return content

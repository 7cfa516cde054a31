"""Ports of the server: addresses that can be had, and gRPC servers on them."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from knnlm.errors import InvalidInput
from knnlm_server.errors import CannotListen

# A client that has gone without a word is noticed by pings; clients may ping as often as their own defaults do.
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True)
class Place:
    """A host and a port to listen on; port 0 takes a free one. ``option``: the one that chooses the port."""

    host: str = "127.0.0.1"
    port: int = 0
    option: str = "--port"

    @property
    def address(self) -> str:
        """As a gRPC target."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it; raises :class:`CannotListen` where the host is unknown."""
        return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in _addresses(self))

    def ensure_free(self) -> None:
        """Raise :class:`CannotListen`, in one sentence, where the port is in use or the host is unknown or another machine."""
        elsewhere, addresses = 0, _addresses(self)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does, so that connections of a server that has just ended don't count as in use.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except OSError as error:
                    _refuse(error, self)
                    elsewhere += error.errno == errno.EADDRNOTAVAIL
        if elsewhere == len(addresses):
            raise CannotListen(f"Can't listen on {self.address}: {self.host} is no address of this machine.")

    def ensure_apart(self, other: Place) -> None:
        """Raise :class:`InvalidInput` where this port is chosen for ``other`` too, on an address that both listen on."""
        if self.port != 0 and self.port == other.port and _meet(self._hosts, other._hosts):
            name = self.option.removeprefix("--").replace("-", "_")
            raise InvalidInput(name, f"is {self.port}, which is {other.option} too; choose another, or 0 for a free one.")

    @property
    def _hosts(self) -> set[str]:
        return {address[0] for *_, address in _addresses(self)}


class GRPCPort:
    """A gRPC server on one place, with health and, where asked for, reflection beside its ``services``.

    ``services``: what adds each to a server, by its full name. ``credentials`` None: no TLS.
    """

    def __init__(
        self,
        place: Place,
        services: Mapping[str, Callable[[grpc.aio.Server], None]],
        health_servicer: health.aio.HealthServicer,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        credentials: grpc.ServerCredentials | None,
        reflected: bool,
        max_message_bytes: int,
    ) -> None:
        place.ensure_free()  # before there is a gRPC server to be stopped again
        options = [*_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        for add in services.values():
            add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, self._server)
        if reflected:
            reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.place = self._bound(place, credentials)
        self._started = False

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()
        self._started = True

    async def stop(self, grace: float | None) -> None:
        """End what runs after ``grace`` seconds and free the port."""
        if not self._started:  # gRPC keeps the port of a server that is stopped before it was started
            await self.start()
        await self._server.stop(grace)

    def also_on_loopback(self) -> Place:
        """Listen on a free port of this machine too, without TLS; before :meth:`start`."""
        return self._bound(Place(), None)

    def _bound(self, place: Place, credentials: grpc.ServerCredentials | None) -> Place:
        try:
            if credentials is None:
                port = self._server.add_insecure_port(place.address)
            else:
                port = self._server.add_secure_port(place.address, credentials)
        except RuntimeError as error:
            raise CannotListen(f"Can't listen on {place.address}: {error}") from error
        return Place(place.host, port, place.option)


def _meet(some: set[str], others: set[str]) -> bool:
    """Whether an address is in both, or one of them is every address of this machine."""
    return bool(some & others) or any(ipaddress.ip_address(host.partition("%")[0]).is_unspecified for host in some | others)


def _addresses(place: Place) -> Sequence[Any]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(f"Can't listen on {place.address}: the host is unknown ({error}).") from error


def _refuse(error: OSError, place: Place) -> None:
    """Raise for what concerns the port; of several addresses of a host, one may be missing (IPv6 turned off)."""
    if error.errno == errno.EADDRINUSE:
        raise CannotListen(
            f"Port {place.port} on {place.host} is in use; choose another with {place.option}, or 0 for a free one."
        ) from error
    if error.errno == errno.EACCES:
        raise CannotListen(f"Port {place.port} on {place.host} may not be used by this user; choose one above 1023.") from error

"""The server's composition: service, health, reflection and port around an engine, and its life as a process.

Knows no torch: the engine comes in ready-made, or as a function that makes it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from knnlm_server.engine_protocol import Engine
from knnlm_server.errors import CannotListen
from knnlm_server.pb.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from knnlm_server.service import SERVICE_NAME, GenerationService, RequestGate

GRACE_SECONDS = 30.0
MAX_REQUEST_BYTES = 16 * 1024 * 1024
HEALTH_SERVICES = ("", SERVICE_NAME)

# What gRPC may take to hand out the last messages of requests that have ended; open health watches take all of it.
_FLUSH_SECONDS = 0.5

_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
]

_log = logging.getLogger(__name__)


class GenerationServer:
    """An engine behind a port: NOT_SERVING while it starts and stops, SERVING between.

    ``port`` 0 takes a free one; :attr:`port` says which once :meth:`start` has returned.
    """

    def __init__(self, engine: Engine, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.port = port
        self._engine = engine
        self._gate = RequestGate("The server is starting; try again soon.")
        self._health = health.aio.HealthServicer()

    @property
    def address(self) -> str:
        """Host and port as a gRPC target."""
        return _address(self.host, self.port)

    async def start(self) -> None:
        """Listen, start the engine, and take requests; raises :class:`CannotListen`."""
        self._server = grpc.aio.server(options=_OPTIONS)
        service = GenerationService(self._engine, self._gate)
        add_GenerationServiceServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]  # generated
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._bind()
        await self._server.start()
        try:
            await asyncio.to_thread(self._engine.start)
        except BaseException:
            await self._server.stop(None)
            raise
        self._gate.open()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Turn new requests away, let running ones finish within ``grace`` seconds, end the rest, and free the port."""
        self._gate.close("The server is being stopped and takes no new requests.")
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(grace):
                await self._gate.idle()
        except TimeoutError:
            _log.warning("ending requests that did not finish within %g seconds", grace)
        await asyncio.to_thread(self._engine.stop)
        await self._server.stop(_FLUSH_SECONDS)

    def _bind(self) -> None:
        ensure_can_listen(self.host, self.port)
        try:
            self.port = self._server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise CannotListen(f"Can't listen on {self.address}: {error}") from error

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in HEALTH_SERVICES:
            await self._health.set(service, status)


async def serve(
    engine_factory: Callable[[], Engine],
    host: str,
    port: int,
    *,
    grace: float = GRACE_SECONDS,
    on_ready: Callable[[GenerationServer], None],
) -> None:
    """Run a server until SIGTERM or SIGINT, then stop it within ``grace`` seconds; a second signal ends the process at once.

    A port that is in use is refused (:class:`CannotListen`) before the engine is made. ``on_ready`` is called when
    requests are taken. Only for the main thread of a process, since it takes over its signals.
    """
    ensure_can_listen(host, port)
    # asyncio.run would hold an interrupt back until the engine is loaded, and there is nothing to finish yet.
    _end_on_signals()
    server = GenerationServer(engine_factory(), host, port)
    stopping = _first_signal()
    await server.start()
    on_ready(server)
    await stopping.wait()
    _log.info("stopping; a second signal ends the process at once")
    await server.stop(grace)


def ensure_can_listen(host: str, port: int) -> None:
    """Raise :class:`CannotListen`, in one sentence, where the port is in use or the host is unknown."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(f"Can't listen on {_address(host, port)}: the host is unknown ({error}).") from error
    for family, kind, protocol, _, place in places:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does, so that connections of a server that has just ended don't count as in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                _refuse_address(error, host, port)


def _refuse_address(error: OSError, host: str, port: int) -> None:
    """Raise for what concerns the port; of several addresses of a host, one may be missing (IPv6 turned off)."""
    if error.errno == errno.EADDRINUSE:
        raise CannotListen(f"Port {port} on {host} is in use; choose another with --port, or 0 for a free one.") from error
    if error.errno == errno.EACCES:
        raise CannotListen(f"Port {port} on {host} may not be used by this user; choose one above 1023.") from error


def _first_signal() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; the next one ends the process."""
    stopping = asyncio.Event()

    def stop() -> None:
        stopping.set()
        _end_on_signals()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopping


def _end_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

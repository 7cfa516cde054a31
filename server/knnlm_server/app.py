"""The server's composition: services, health, reflection and ports around an engine, and its life as a process.

Knows no torch: the engine comes in ready-made, or as a function that makes it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2

from knnlm.errors import InvalidInput
from knnlm_server import self_check
from knnlm_server.access import ADMIN, GENERATE, Access, OpenAccess
from knnlm_server.admin_service import SERVICE_NAME as ADMIN_SERVICE_NAME
from knnlm_server.calls import Calls
from knnlm_server.engine_protocol import Engine
from knnlm_server.errors import EngineFailed
from knnlm_server.listening import GRPCPort, Place
from knnlm_server.metrics import Metrics, MetricsPort
from knnlm_server.pb.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from knnlm_server.pb.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from knnlm_server.reading_lanes import ReadingLanes
from knnlm_server.request_gate import RequestGate
from knnlm_server.service import SERVICE_NAME, STALL_SECONDS, GenerationService
from knnlm_server.tls import TLS
from knnlm_server.tracing import NoTracing, Tracing

GRACE_SECONDS = 30.0
ROLES = {SERVICE_NAME: GENERATE, ADMIN_SERVICE_NAME: ADMIN}

# What gRPC may take to hand out the last messages of requests that have ended; open health watches take all of it.
_FLUSH_SECONDS = 0.5
_SECONDS_BETWEEN_LOOKS = 0.5

E = TypeVar("E", bound=Engine)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Border:
    """What stands between clients and the engine. ``settings``: the resolved configuration, for GetServerInfo.

    ``admin``: where the admin service listens; None: beside the other services, if tokens say who may use it, else nowhere.
    ``metrics_place``: where Prometheus reads ``metrics``; None: nowhere.
    """

    tls: TLS | None = None
    access: Access = field(default_factory=OpenAccess)
    reflection: bool = True
    admin: Place | None = None
    metrics_place: Place | None = None
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=NoTracing)
    stall_seconds: float = STALL_SECONDS
    log_prompts: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


class GenerationServer:
    """An engine behind its ports: NOT_SERVING while it starts and stops, SERVING between.

    ``port`` 0 takes a free one; :attr:`port`, :attr:`admin_place` and :attr:`metrics_place` say which once :meth:`start`
    has returned. ``admin``: the servicer that changes datastores, where there is one. With ``check``, the main port's
    services answer on :attr:`check_place` too: a free port of this machine without TLS.
    """

    def __init__(
        self,
        engine: Engine,
        host: str = "127.0.0.1",
        port: int = 0,
        border: Border | None = None,
        admin: AdminServiceServicer | None = None,
        *,
        check: bool = False,
    ) -> None:
        self.place = Place(host, port)
        self.admin_place: Place | None = None
        self.metrics_place: Place | None = None
        self.check_place: Place | None = None
        self._engine, self._border, self._admin, self._check = engine, border or Border(), admin, check
        limits = engine.info.limits
        self._gate = RequestGate("The server is starting; try again soon.", limits.max_concurrent + limits.max_waiting_requests)
        self._reading = ReadingLanes()
        self._health = health.aio.HealthServicer()
        self._services: set[str] = set()
        self._ports: list[GRPCPort] = []
        self._metrics_port: MetricsPort | None = None
        self._watch: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()
        """Set when the engine was ended by an error; nothing is served from then on."""

    @property
    def port(self) -> int:
        """The main port."""
        return self.place.port

    @property
    def address(self) -> str:
        """Host and main port as a gRPC target."""
        return self.place.address

    async def start(self) -> None:
        """Listen, start the engine, and take requests; raises :class:`CannotListen`."""
        try:
            self._listen()
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            for port in self._ports:
                await port.start()
            await asyncio.to_thread(self._engine.start)
        except BaseException:
            await self._close(None)
            raise
        self._gate.open()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.create_task(self._watch_engine())

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Turn new requests away, let running ones finish within ``grace`` seconds, end the rest, and free the ports."""
        if self._watch is not None:
            self._watch.cancel()
        self._gate.close("The server is being stopped and takes no new requests.")
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(grace):
                await self._gate.idle()
        except TimeoutError:
            _log.warning("ending requests that did not finish within %g seconds", grace)
        await asyncio.to_thread(self._engine.stop)
        await self._close(_FLUSH_SECONDS)
        await asyncio.to_thread(self._border.tracing.stop)

    async def _watch_engine(self) -> None:
        while self._engine.working:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        _log.critical("the engine has ended, so nothing is served any more; what the log says of it before is why")
        self._gate.close("The server's engine has failed, and the server must be started again.")
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.failed.set()

    def _listen(self) -> None:
        border = self._border
        main = {SERVICE_NAME: partial(_add_generation, self._generation_service())}
        beside = {} if self._admin is None else {ADMIN_SERVICE_NAME: partial(_add_admin, self._admin)}
        if border.admin is None and border.access.asks_for_tokens:
            main |= beside
        main_port = self._open(self.place, main)
        self.place = main_port.place
        if self._check:
            self.check_place = main_port.place if border.tls is None else main_port.also_on_loopback()
        if border.admin is not None and beside:
            self.admin_place = self._open(border.admin, beside).place
        if border.metrics_place is not None:
            border.metrics.show(lambda: self._engine.info)
            self._metrics_port = MetricsPort(border.metrics, border.metrics_place.host, border.metrics_place.port)
            self.metrics_place = Place(border.metrics_place.host, self._metrics_port.port)

    def _generation_service(self) -> GenerationService:
        border = self._border
        return GenerationService(
            self._engine,
            self._gate,
            border.metrics,
            settings=dict(border.settings),
            stall_seconds=border.stall_seconds,
            log_prompts=border.log_prompts,
            reading=self._reading,
        )

    def _open(self, place: Place, services: Mapping[str, Callable[[grpc.aio.Server], None]]) -> GRPCPort:
        border = self._border
        port = GRPCPort(
            place,
            services,
            self._health,
            interceptors=[Calls({name: ROLES[name] for name in services}, border.access, border.metrics, border.tracing)],
            credentials=border.tls.credentials() if border.tls is not None else None,
            reflected=border.reflection,
            max_message_bytes=self._engine.info.limits.max_message_bytes,
        )
        self._ports.append(port)
        self._services |= set(services)
        return port

    async def _close(self, grace: float | None) -> None:
        await asyncio.gather(*(port.stop(grace) for port in self._ports))
        self._reading.close()
        if self._metrics_port is not None:
            await asyncio.to_thread(self._metrics_port.stop)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)


def _add_generation(service: GenerationService, server: grpc.aio.Server) -> None:
    add_GenerationServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated


def _add_admin(service: AdminServiceServicer, server: grpc.aio.Server) -> None:
    add_AdminServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated


async def serve(
    engine_factory: Callable[[], E],
    host: str,
    port: int,
    *,
    grace: float = GRACE_SECONDS,
    on_ready: Callable[[GenerationServer], None],
    border: Border | None = None,
    admin_of: Callable[[E], AdminServiceServicer] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then stop it within ``grace`` seconds; a second signal ends the process at once.

    Raises :class:`EngineFailed` where the engine ends by itself, so that whatever keeps the process running starts another.
    A port that is in use is refused (:class:`CannotListen`) before the engine is made. ``on_ready`` is called when
    requests are taken; ``admin_of`` makes the servicer that changes the engine's datastores. Only for the main thread of a
    process, since it takes over its signals.
    """
    border = border or Border()
    ensure_reachable_as_meant(Place(host, port), border)
    # Native code that crashes says nothing of itself: memory-mapped files that were cut short end the process with SIGBUS.
    faulthandler.enable(file=sys.__stderr__ or sys.stderr)
    # asyncio.run would hold an interrupt back until the engine is loaded, and there is nothing to finish yet.
    _end_on_signals()
    engine = engine_factory()
    server = GenerationServer(engine, host, port, border, admin_of(engine) if admin_of is not None else None)
    stopping = _first_signal()
    await server.start()
    on_ready(server)
    await _first((stopping, server.failed))
    _log.info("stopping; a second signal ends the process at once")
    await server.stop(grace)
    if server.failed.is_set():
        raise EngineFailed("The engine has failed, so the server ended; its log says why.")


async def _first(events: Sequence[asyncio.Event]) -> None:
    """Return when one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def check(
    engine_factory: Callable[[], Engine],
    host: str,
    port: int,
    *,
    border: Border | None = None,
    on_answer: Callable[[GenerationServer, int, float], None],
) -> None:
    """Start a server as :func:`serve` would, send it one request, and stop it; raises where any of that fails.

    ``on_answer`` is told how many tokens came in how many seconds.
    """
    border = border or Border()
    access = self_check.CheckAccess(border.access)
    ensure_reachable_as_meant(Place(host, port), border)
    server = GenerationServer(engine_factory(), host, port, replace(border, access=access), check=True)
    await server.start()
    try:
        assert server.check_place is not None
        began = time.monotonic()
        tokens = await self_check.check(server.check_place.address, access)
        on_answer(server, tokens, time.monotonic() - began)
    finally:
        await server.stop(0)


def ensure_reachable_as_meant(main: Place, border: Border) -> None:
    """Raise :class:`CannotListen` for a place that can't be had and :class:`InvalidInput` for one that is asked for twice and
    for an admin service that is open to a network; warn of others that are."""
    places = [place for place in (main, border.admin, border.metrics_place) if place is not None]
    for number, place in enumerate(places):
        for earlier in places[:number]:
            place.ensure_apart(earlier)
        place.ensure_free()
    tls, access = border.tls, border.access
    known = access.asks_for_tokens or (tls is not None and tls.asks_for_client_certificates)
    if border.admin is not None and not known and not border.admin.is_loopback:
        raise InvalidInput(
            "admin_host",
            f"is {border.admin.host}, where anyone could unload datastores; give --tokens or --tls-client-ca, or use 127.0.0.1.",
        )
    if main.is_loopback:
        return
    if not known:
        _log.warning("anyone who reaches %s may use this server; give --tokens or --tls-client-ca to say who may", main.address)
    if tls is None:
        _log.warning("prompts, completions and tokens cross the network to %s in the clear; give --tls-cert and --tls-key", main.address)


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

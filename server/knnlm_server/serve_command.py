"""The subcommand ``knnlm serve``: its options, and what is made of them. What needs torch or gRPC is imported when it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.byte_sizes import parse_bytes
from knnlm.cli import Device, Dtype, Model, TrustRemoteCode, Verify
from knnlm.errors import InvalidInput
from knnlm_server import configuration
from knnlm_server.logs import LogFormat, LogLevel, configure
from knnlm_server.serve_options import chosen_limits, named_datastores

if TYPE_CHECKING:
    from knnlm_server.app import Border, GenerationServer
    from knnlm_server.async_engine import AsyncEngine

# Paths of the server's machine say nothing to clients, who know datastores and the model by their names.
_NOT_FOR_CLIENTS = {"config", "tls_cert", "tls_key", "tls_client_ca", "tokens", "store", "datastores", "model"}

_log = logging.getLogger(__name__)


def _read_configuration(context: typer.Context, path: Path | None) -> Path | None:
    configuration.read_configuration(serve, context, path, os.environ)
    return path


def serve(
    context: typer.Context,
    store: Annotated[
        Path | None,
        typer.Argument(help="Folder of a datastore, served as `default`.", show_default=False, envvar=f"{configuration.PREFIX}_STORE"),
    ] = None,
    datastores: Annotated[
        list[str] | None,
        typer.Option(
            "--datastore",
            metavar="NAME=PATH",
            help="One more datastore; may be repeated. The first of all is the default one, and its model is served.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with any of these settings, named with _ for -; tables `datastores` and `limits`.",
            show_default=False,
            is_eager=True,
            callback=_read_configuration,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 50051,
    admin_host: Annotated[str, typer.Option(help="Address of --admin-port.")] = "127.0.0.1",
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of its own for knnlm.admin.v1.", show_default="on the main port with --tokens, else nowhere"
        ),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP port for Prometheus, path /metrics.", show_default="none")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file with the certificate and its chain; read again when it changes.", show_default="no TLS")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its key, not encrypted.", show_default=False)] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file with the authorities of client certificates, which are asked for then (mTLS).", show_default="none"),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with bearer tokens, their names and roles; read again when it changes.", show_default="everyone may call"
        ),
    ] = None,
    no_reflection: Annotated[bool, typer.Option("--no-reflection", help="Don't describe the services to clients that ask.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for the model, its cache and its logits, such as 8GB.", show_default="half of what is free; 90% on a GPU"
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(help="Memory for prompts' beginnings that are kept, such as 512MB; 0: none.", show_default="a part of --memory"),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(min=1, help="Completions that are made at the same time; others wait.", show_default="as many as fit, up to 32"),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of prompt and completion.", show_default="the model's context, as --memory allows"),
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens that one step of the engine reads.", show_default="the engine's")
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Search for one half of the completions while the model runs the other half.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that torch and FAISS each have.", show_default="the cores there are")
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=VALUE",
            help="A field of the message Limits, such as max_k=256; may be repeated.",
            show_default="as GetServerInfo says",
        ),
    ] = None,
    stall_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds after which a stream whose client reads nothing is ended.")] = 30.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running requests get when the server is stopped.")] = 30.0,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours per token.", show_default="profile or 64")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="profile or 10")] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="profile or 0.2")] = None,
    allow_unproven: Annotated[
        bool, typer.Option("--allow-unproven", help="Serve a model whose batched decoding was not shown to equal decoding alone.")
    ] = False,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Verify = False,
    log_format: Annotated[LogFormat, typer.Option(help="Lines of the log: as text or as JSON objects.")] = "text",
    log_level: Annotated[LogLevel, typer.Option(help="The least important lines that are logged.")] = "info",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts too, and texts of unexpected errors.")] = False,
    tracing: Annotated[bool, typer.Option("--tracing", help="Send traces by OTLP, as OpenTelemetry's variables say.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Load, answer one request through the own port, and exit.")] = False,
) -> None:
    """Serve datastores and their model over gRPC: generation, streaming, scoring, retrieval; health, reflection, metrics.

    Prints the line "listening on HOST:PORT" when it takes requests. SIGTERM or Ctrl-C lets running requests finish
    within --grace seconds; a second one ends it at once. --k, --knn-temperature and --weight are for requests that set none.

    Each setting can be given as an option, as a variable of the environment (KNNLM_SERVE_PORT for --port, several values
    with spaces between), or in the file of --config; options win over variables, and these over the file. What is unknown
    in either is refused.
    """
    configure(log_format, log_level, texts_of_exceptions=log_prompts)
    with configuration.blaming_the_source(context):
        _serve(named_datastores(store, datastores or []), context.params, configuration.resolved(context))


def _serve(stores: Mapping[str, Path], given: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Run the server, or its check; ``given``: the command's parameters."""
    import asyncio

    from knnlm_server import app
    from knnlm_server.admin_service import AdminService

    options, border = _engine_options(given), _border(given, settings)

    def engine() -> AsyncEngine:
        _log.info("settings: %s", ", ".join(f"{name}={value}" for name, value in settings.items()), extra={"settings": settings})
        # Imported here, so that an address that can't be used is refused at once.
        from knnlm.console import quiet_transformers
        from knnlm_server.engine_opening import build_async_engine

        quiet_transformers()
        return build_async_engine(stores=stores, observer=border.metrics, **options)

    host, port = given["host"], given["port"]
    if given["check"]:
        asyncio.run(app.check(engine, host, port, border=border, on_answer=_answered))
    else:
        made = app.serve(
            engine,
            host,
            port,
            border=border,
            grace=given["grace"],
            on_ready=_announce,
            admin_of=lambda engine: AdminService(engine.datastores),
        )
        asyncio.run(made)


def _engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine is told; what was not given is left to it."""
    same = (
        "k",
        "knn_temperature",
        "weight",
        "overlap",
        "allow_unproven",
        "model",
        "device",
        "dtype",
        "threads",
        "trust_remote_code",
        "verify",
    )
    options = {name: given[name] for name in same}
    options |= {"max_concurrent": given["max_concurrent"], "context": given["max_context"], "step_tokens": given["step_tokens"]}
    options |= {"memory_bytes": _bytes(given, "memory"), "prefix_cache_bytes": _bytes(given, "prefix_cache")}
    return {name: value for name, value in options.items() if value is not None} | {"limits": chosen_limits(given["limits"] or [])}


def _bytes(given: Mapping[str, Any], name: str) -> int | None:
    text = given[name]
    if text is None or (name == "prefix_cache" and text.strip() == "0"):
        return None if text is None else 0
    return parse_bytes(name, text)


def _border(given: Mapping[str, Any], settings: Mapping[str, str]) -> Border:
    """What stands between clients and the engine; raises :class:`InvalidInput` for files that can't be used."""
    from knnlm_server.access import OpenAccess, TokenAccess
    from knnlm_server.app import Border
    from knnlm_server.listening import Place
    from knnlm_server.tracing import NoTracing, OpenTelemetryTracing

    admin, metrics = given["admin_port"], given["metrics_port"]
    return Border(
        tls=_tls(given["tls_cert"], given["tls_key"], given["tls_client_ca"]),
        access=OpenAccess() if given["tokens"] is None else TokenAccess(given["tokens"]),
        reflection=not given["no_reflection"],
        admin=None if admin is None else Place(given["admin_host"], admin, "--admin-port"),
        metrics_place=None if metrics is None else Place(given["metrics_host"], metrics, "--metrics-port"),
        tracing=OpenTelemetryTracing() if given["tracing"] else NoTracing(),
        stall_seconds=given["stall_seconds"],
        log_prompts=given["log_prompts"],
        settings={name: value for name, value in settings.items() if name not in _NOT_FOR_CLIENTS},
    )


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Any:
    from knnlm_server.tls import TLS, TLSFiles

    if certificate is not None and key is not None:
        return TLS(TLSFiles(certificate, key, client_ca))
    for name, needed in (("tls_cert", certificate), ("tls_key", key)):
        if needed is None and (certificate or key or client_ca):
            raise InvalidInput(name, "is not given, but TLS needs --tls-cert and --tls-key.")
    return None


def _announce(server: GenerationServer) -> None:
    for what, place in (("admin", server.admin_place), ("metrics", server.metrics_place)):
        if place is not None:
            _log.info("%s on %s", what, place.address)
    print(f"listening on {server.address}", flush=True)


def _answered(server: GenerationServer, tokens: int, seconds: float) -> None:
    print(f"ok: {server.address} answered with {tokens} token in {seconds:.3f} seconds", flush=True)

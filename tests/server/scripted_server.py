"""A server that fails as it is told: gRPC's own, without anything of knnlm's but the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server


@dataclass(frozen=True)
class Failure:
    """A status, the milliseconds of its pushback, and how many messages of a stream come before it."""

    code: grpc.StatusCode
    pushback_ms: int | None = None
    after: int = 0


@dataclass
class Script(GenerationServiceServicer):
    """Fails once for each of ``failures``, then answers; ``metadata`` keeps what came with each attempt."""

    failures: list[Failure] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        return len(self.metadata)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        failure = self._next(context)
        if failure is not None:
            _fail(context, failure)
        return pb.DetokenizeResponse(text="done")

    def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> Iterator[pb.StreamGenerateResponse]:
        failure = self._next(context)
        for index in range(2 if failure is None else failure.after):
            yield pb.StreamGenerateResponse(token=pb.GeneratedToken(index=index, text="a"))
        if failure is not None:
            _fail(context, failure)
        yield pb.StreamGenerateResponse(finish=pb.Finish(finish_reason=pb.FINISH_REASON_LENGTH))

    def _next(self, context: Any) -> Failure | None:
        self.metadata.append(dict(context.invocation_metadata()))
        return self.failures.pop(0) if self.failures else None


def _fail(context: Any, failure: Failure) -> None:
    if failure.pushback_ms is not None:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", str(failure.pushback_ms)),))
    context.abort(failure.code, "as the script says")


@contextmanager
def scripted(
    script: Script,
    credentials: grpc.ServerCredentials | None = None,
    options: Sequence[tuple[str, Any]] = (),
    interceptors: Sequence[grpc.ServerInterceptor] = (),
) -> Iterator[str]:
    """Serve a script on a free port of 127.0.0.1; gives ``host:port``."""
    given = {"grpc.max_receive_message_length": -1, **dict(options)}
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), interceptors=interceptors, options=list(given.items()))
    add_GenerationServiceServicer_to_server(script, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0") if credentials is None else server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()

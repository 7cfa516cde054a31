"""``knnlm serve --check``: one request through the server's own port, as a client would send it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm_server.access import GENERATE, Access, Caller
from knnlm_server.errors import EngineFailed
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.service import SERVICE_NAME

TOKENS = 1
TIMEOUT_SECONDS = 60.0


class CheckAccess:
    """Callers as another access knows them, and the check itself by a token that nobody else has."""

    def __init__(self, access: Access) -> None:
        self.asks_for_tokens = access.asks_for_tokens
        self.metadatum = ("authorization", f"Bearer {secrets.token_urlsafe()}")
        self._access = access

    def caller(self, metadata: Iterable[tuple[str, str | bytes]], certified: str = "") -> Caller:
        """See :meth:`Access.caller`."""
        given = tuple(metadata)
        if self.metadatum in given:
            return Caller("check", frozenset({GENERATE}))
        return self._access.caller(given, certified)


async def check(address: str, access: CheckAccess) -> int:
    """Tokens that a server generated for one request; raises :class:`EngineFailed` where it does not serve or answer."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=TIMEOUT_SECONDS
            )
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                raise EngineFailed(
                    f"The server started, but its health is {health_pb2.HealthCheckResponse.ServingStatus.Name(health.status)}."
                )
            stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
            response = await stub.Generate(_request(), metadata=(access.metadatum,), timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise EngineFailed(f"The server started, but its answer to a request is {error.code().name}: {error.details()}") from error
    return sum(completion.completion_tokens for completion in response.completions)


def _request() -> pb.GenerateRequest:
    options = pb.GenerationOptions(
        sampling=pb.SamplingOptions(temperature=0.0), stopping=pb.StoppingOptions(max_new_tokens=TOKENS, ignore_eos=True)
    )
    return pb.GenerateRequest(prompt=pb.Input(token_ids=pb.TokenIds(ids=[0])), options=options)

"""How clients reach servers: retries, several addresses, TLS, tokens; over real sockets, with servers that fail, come late and die."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from knnlm.errors import InvalidInput
from knnlm_server.client import AsyncGenerationClient, GenerationClient, RequestFailed, Retries, ServerUnavailable, Tls
from knnlm_server.client_channel import MOST_ATTEMPTS, Connection
from knnlm_server.errors import QueueFull
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.sequence import FinishEvent, Limits, TokenEvent
from tests.server.conftest import WAIT_SECONDS, RunningServer, running
from tests.server.fake_engine import FakeEngine
from tests.server.fake_server import process
from tests.server.scripted_server import Failure, Script, scripted
from tests.server.test_client import free_port

Start = Callable[[FakeEngine], RunningServer]
Detokenize = Callable[..., str]

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
SOON = Retries(first_seconds=0.01, longest_seconds=0.01)
# Longer than any test waits: who answers in time did not wait by its own measure.
LATE = Retries(first_seconds=3600, longest_seconds=3600)


def sync_detokenize(target: str, retries: Retries, ids: list[int]) -> str:
    with GenerationClient(target, retries=retries) as client:
        return client.detokenize(ids, timeout=WAIT_SECONDS)


def async_detokenize(target: str, retries: Retries, ids: list[int]) -> str:
    async def use() -> str:
        async with AsyncGenerationClient(target, retries=retries) as client:
            return await client.detokenize(ids, timeout=WAIT_SECONDS)

    return asyncio.run(use())


@pytest.fixture(params=[sync_detokenize, async_detokenize], ids=["sync", "async"])
def detokenize(request: pytest.FixtureRequest) -> Detokenize:
    chosen: Detokenize = request.param
    return chosen


def test_what_passes_is_tried_again(detokenize: Detokenize) -> None:
    script = Script([Failure(UNAVAILABLE), Failure(EXHAUSTED), Failure(UNAVAILABLE)])
    with scripted(script) as target:
        assert detokenize(target, SOON, [1]) == "done"
    assert script.attempts == 4


def test_a_long_request_is_tried_again_too(detokenize: Detokenize) -> None:
    script = Script([Failure(UNAVAILABLE)])
    with scripted(script) as target:
        assert detokenize(target, SOON, [2**31] * 1_000_000) == "done"


class Arrivals(grpc.ServerInterceptor):
    """Counts calls as they arrive, those too whose message is never read."""

    def __init__(self) -> None:
        self.count = 0

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.count += 1
        return continuation(handler_call_details)


def test_a_request_larger_than_a_server_takes_by_default_is_sent_once() -> None:
    arrivals, limit = Arrivals(), Limits(context=64).max_message_bytes
    options = [("grpc.max_receive_message_length", limit)]
    with scripted(Script(), options=options, interceptors=[arrivals]) as target, GenerationClient(target, retries=SOON) as client:
        with pytest.raises(RequestFailed, match="larger than the server takes on, and will not be later") as caught:
            client.detokenize([0] * limit)
        assert (caught.value.code, caught.value.retry_seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)
    assert arrivals.count == 1


def test_attempts_come_to_an_end(detokenize: Detokenize) -> None:
    script = Script([Failure(UNAVAILABLE)] * 20)
    with scripted(script) as target, pytest.raises(ServerUnavailable, match="as the script says"):
        detokenize(target, SOON, [1])
    assert script.attempts == MOST_ATTEMPTS


@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED])
def test_one_attempt_is_one(detokenize: Detokenize, code: grpc.StatusCode) -> None:
    script = Script([Failure(code)])
    with scripted(script) as target, pytest.raises(RequestFailed) as caught:
        detokenize(target, Retries(attempts=1), [1])
    assert (caught.value.code, script.attempts) == (code, 1)


@pytest.mark.parametrize(
    "code",
    sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK, UNAVAILABLE, EXHAUSTED}, key=lambda code: code.value[0]),
    ids=lambda c: c.name,
)
def test_nothing_else_is_tried_again(code: grpc.StatusCode) -> None:
    script = Script([Failure(code)])
    with scripted(script) as target, pytest.raises(RequestFailed) as caught:
        sync_detokenize(target, SOON, [1])
    assert (caught.value.code, script.attempts) == (code, 1)


def test_the_server_says_when(detokenize: Detokenize) -> None:
    script = Script([Failure(EXHAUSTED, pushback_ms=1)])
    with scripted(script) as target:
        assert detokenize(target, LATE, [1]) == "done"


def test_the_server_may_say_never(detokenize: Detokenize) -> None:
    script = Script([Failure(EXHAUSTED, pushback_ms=-1)])
    with scripted(script) as target, pytest.raises(RequestFailed):
        detokenize(target, SOON, [1])
    assert script.attempts == 1


def test_a_full_queue_of_the_product_is_tried_again_when_it_says(start_server: Start) -> None:
    class FullAtFirst(FakeEngine):
        def _fail_if_asked(self, tokens: Any) -> None:
            if len(self.requests) == 1:
                raise QueueFull("full")

    engine = FullAtFirst()
    with GenerationClient(start_server(engine).target, retries=LATE) as client:
        assert client.generate("hi", max_new_tokens=8, timeout=WAIT_SECONDS).text == "ab!"
        assert [event.text for event in client.stream("hi", max_new_tokens=8, timeout=WAIT_SECONDS)] == ["a", "b", "!"]
    assert len(engine.requests) == 3


def test_a_stream_is_tried_again_before_its_first_message_only() -> None:
    script = Script([Failure(UNAVAILABLE), Failure(EXHAUSTED, after=1), Failure(UNAVAILABLE)])
    with scripted(script) as target, GenerationClient(target, retries=SOON) as client:
        events = client.stream("hi")
        assert isinstance(next(events), TokenEvent)
        with pytest.raises(RequestFailed) as caught:
            next(events)
        assert (caught.value.code, script.attempts) == (EXHAUSTED, 2)


@pytest.mark.parametrize(
    ("retries", "field"),
    [(Retries(attempts=0), "attempts"), (Retries(attempts=6), "attempts"), (Retries(first_seconds=0.001), "first_seconds")],
)
def test_retries_out_of_range_are_refused_by_name(retries: Retries, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        GenerationClient("localhost:1", retries=retries)
    assert caught.value.field == f"retries.{field}"


def test_a_server_that_comes_late_is_waited_for() -> None:
    port = free_port()
    with GenerationClient(f"127.0.0.1:{port}") as client, pytest.raises(ServerUnavailable):
        client.server_info(timeout=WAIT_SECONDS)
    found: list[str] = []
    with GenerationClient(f"127.0.0.1:{port}") as client:

        def use() -> None:
            client.wait_until_ready(WAIT_SECONDS)
            found.append(client.generate("hi", max_new_tokens=8).text)

        waiting = threading.Thread(target=use)
        waiting.start()
        with running(FakeEngine(), port=port):
            waiting.join(WAIT_SECONDS)
    assert found == ["ab!"]


def test_a_server_that_dies_ends_the_stream_and_its_successor_answers() -> None:
    port = free_port()
    with GenerationClient(f"127.0.0.1:{port}") as client:
        with process(port, hold_after=1) as server:
            events = client.stream("hi", max_new_tokens=8)
            assert next(events).text == "a"
            server.kill()
            with pytest.raises(ServerUnavailable):
                next(events)
        with running(FakeEngine(), port=port):
            client.wait_until_ready(WAIT_SECONDS)
            assert client.generate("hi", max_new_tokens=8).text == "ab!"


def use_both(client: GenerationClient, engines: tuple[FakeEngine, FakeEngine]) -> None:
    """Generate until both engines have had a request."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not all(engine.requests for engine in engines) and time.monotonic() < deadline:
        client.generate("hi", max_new_tokens=8)
    assert all(engine.requests for engine in engines)


def test_several_servers_share_the_calls_and_stand_in_for_each_other() -> None:
    first, second = FakeEngine(), FakeEngine()
    with running(second) as stays:
        with running(first) as goes, GenerationClient([goes.target, stays.target]) as client:
            use_both(client, (first, second))
            before = len(first.requests), len(second.requests)
            for _ in range(20):
                client.generate("hi", max_new_tokens=8)
            assert (len(first.requests) - before[0], len(second.requests) - before[1]) == (10, 10)
            target = goes.target
        with GenerationClient([target, stays.target]) as client:
            assert [client.generate("hi", max_new_tokens=8).text for _ in range(20)] == ["ab!"] * 20


def test_a_server_that_goes_while_calls_come_is_not_noticed() -> None:
    first, second = FakeEngine(), FakeEngine()
    with running(second) as stays:
        with running(first) as goes:
            client = GenerationClient([goes.target, stays.target])
            use_both(client, (first, second))
        with closing(client):
            before = len(second.requests)
            assert [client.generate("hi", max_new_tokens=8).text for _ in range(20)] == ["ab!"] * 20
            assert len(second.requests) - before == 20


def test_an_async_client_balances_too(start_server: Start) -> None:
    engines = FakeEngine(), FakeEngine()

    async def use(targets: list[str]) -> None:
        async with AsyncGenerationClient(targets) as client:
            await client.wait_until_ready(WAIT_SECONDS)
            for _ in range(1000):
                await client.generate("hi", max_new_tokens=8)
                if all(engine.requests for engine in engines):
                    return

    asyncio.run(use([start_server(engine).target for engine in engines]))
    assert all(engine.requests for engine in engines)


def test_no_server_among_several_is_a_typed_error_that_names_them() -> None:
    targets = [f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"]
    with GenerationClient(targets, retries=SOON) as client, pytest.raises(ServerUnavailable) as caught:
        client.generate("hi")
    assert all(target in caught.value.message for target in targets)


@pytest.mark.parametrize(
    ("target", "problem"), [([], "is empty"), ("", "is empty"), (["a:1", "b"], "HOST:PORT"), (["a:1", "no.such.host.invalid:2"], "unknown")]
)
def test_targets_that_cannot_be_used_are_refused(target: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as caught:
        GenerationClient(target)
    assert caught.value.field == "target"


def test_a_token_and_an_id_go_with_every_call() -> None:
    script = Script()
    with scripted(script) as target, GenerationClient(target, token="open sesame") as client:
        client.detokenize([1], request_id="mine")
        list(client.stream("hi", request_id="other"))
        client.detokenize([1])
    assert [found["authorization"] for found in script.metadata] == ["Bearer open sesame"] * 3
    assert [found.get("x-request-id") for found in script.metadata] == ["mine", "other", None]


@pytest.mark.parametrize("request_id", ["", "two words", "line\n", "caf\u00e9", "x" * 65])
def test_an_id_that_servers_would_replace_is_refused(request_id: str) -> None:
    with GenerationClient("127.0.0.1:1") as client, pytest.raises(InvalidInput, match="64") as caught:
        client.detokenize([1], request_id=request_id)
    assert caught.value.field == "request_id"


@pytest.mark.parametrize("token", ["", "two\nlines", "später", " secret"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        GenerationClient("localhost:1", token=token)
    assert caught.value.field == "token"
    assert not token.strip() or token not in str(caught.value)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def server_credentials(authority: trustme.CA, name: str, *, mutual: bool = False) -> grpc.ServerCredentials:
    certificate = authority.issue_cert(name)
    pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    roots = authority.cert_pem.bytes() if mutual else None
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=mutual)


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    issued = authority.issue_cert("client.test")
    paths = {"certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
    issued.cert_chain_pems[0].write_to_path(paths["certificate"])
    issued.private_key_pem.write_to_path(paths["key"])
    return paths


def test_tls(authority: trustme.CA, ca: Path) -> None:
    with scripted(Script(), server_credentials(authority, "127.0.0.1")) as target:
        with GenerationClient(target, tls=Tls(ca), token="t0ken") as client:
            assert client.detokenize([1]) == "done"
        for tls in (None, Tls()):
            with GenerationClient(target, tls=tls, retries=SOON) as client, pytest.raises(ServerUnavailable):
                client.detokenize([1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("encrypted", [True, False])
def test_tls_on_one_side_alone_is_said_in_a_sentence(authority: trustme.CA, ca: Path, encrypted: bool, host: str) -> None:
    said = "speaks no TLS, but the client does; leave tls out" if encrypted else "speaks TLS, but the client does not; give it tls"

    async def use(target: str) -> None:
        async with AsyncGenerationClient(target, tls=Tls(ca) if encrypted else None, retries=SOON) as client:
            with pytest.raises(ServerUnavailable, match=said):
                await client.detokenize([1])
            with pytest.raises(ServerUnavailable, match=said):
                _ = [event async for event in client.stream("a")]

    with scripted(Script(), None if encrypted else server_credentials(authority, "localhost")) as address:
        target = f"{host}:{address.rpartition(':')[2]}"
        with GenerationClient(target, tls=Tls(ca) if encrypted else None, retries=SOON) as client:
            with pytest.raises(ServerUnavailable, match=f"The server at {target} {said}"):
                client.detokenize([1])
            with pytest.raises(ServerUnavailable, match=said):
                list(client.stream("a"))
            with pytest.raises(ServerUnavailable, match=said):
                client.wait_until_ready(timeout=0.5)
        asyncio.run(use(target))


def test_where_both_sides_agree_on_tls_nothing_is_said_of_it(authority: trustme.CA, ca: Path) -> None:
    with scripted(Script(), server_credentials(authority, "knnlm.test")) as target:
        with GenerationClient(target, tls=Tls(ca), retries=SOON) as client, pytest.raises(ServerUnavailable, match=r"\.$") as caught:
            client.detokenize([1])
        assert "speaks" not in str(caught.value)
    with GenerationClient(target, retries=SOON) as client, pytest.raises(ServerUnavailable) as caught:  # nobody listens now
        client.detokenize([1])
    assert "speaks" not in str(caught.value)


def test_mutual_tls(authority: trustme.CA, ca: Path, certificate: dict[str, Path]) -> None:
    async def use(target: str) -> str:
        async with AsyncGenerationClient(target, tls=Tls(ca, **certificate)) as client:
            return await client.detokenize([1])

    with scripted(Script(), server_credentials(authority, "127.0.0.1", mutual=True)) as target:
        assert asyncio.run(use(target)) == "done"
        with GenerationClient(target, tls=Tls(ca), retries=SOON) as client, pytest.raises(ServerUnavailable):
            client.detokenize([1])


def test_a_server_of_another_name_is_not_trusted_unless_told(authority: trustme.CA, ca: Path) -> None:
    with scripted(Script(), server_credentials(authority, "knnlm.test")) as target:
        with GenerationClient(target, tls=Tls(ca), retries=SOON) as client, pytest.raises(ServerUnavailable):
            client.detokenize([1])
        with GenerationClient(target, tls=Tls(ca, server_name="knnlm.test")) as client:
            assert client.detokenize([1]) == "done"


def test_several_servers_under_tls_bear_one_name(authority: trustme.CA, ca: Path) -> None:
    credentials = server_credentials(authority, "localhost")
    with scripted(Script(), credentials) as first, scripted(Script(), credentials) as second:
        ports = [target.rpartition(":")[2] for target in (first, second)]
        with GenerationClient([f"localhost:{port}" for port in ports], tls=Tls(ca)) as client:
            assert [client.detokenize([1]) for _ in range(4)] == ["done"] * 4
        with pytest.raises(InvalidInput, match="different hosts") as caught:
            GenerationClient([first, f"localhost:{ports[1]}"], tls=Tls(ca))
        assert caught.value.field == "tls.server_name"
        with GenerationClient([first, f"localhost:{ports[1]}"], tls=Tls(ca, server_name="localhost")) as client:
            assert client.detokenize([1]) == "done"


def test_files_of_tls_that_cannot_be_used_are_refused_by_name(tmp_path: Path, certificate: dict[str, Path]) -> None:
    (tmp_path / "text").write_text("no certificate")
    bad = {
        "tls.ca": Tls(ca=tmp_path / "none.pem"),
        "tls.certificate": Tls(key=certificate["key"]),
        "tls.key": Tls(certificate=certificate["certificate"], key=tmp_path / "text"),
    }
    for field, tls in bad.items():
        with pytest.raises(InvalidInput) as caught:
            GenerationClient("localhost:1", tls=tls)
        assert caught.value.field == field


def test_addresses_of_both_families_are_one_name() -> None:
    assert Connection(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"])._uri == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert Connection(["127.0.0.1:1", "[::1]:2"])._uri == "ipv6:[::ffff:127.0.0.1]:1,[::1]:2"


def test_the_id_of_a_call_comes_back(start_server: Start) -> None:
    with grpc.insecure_channel(start_server(FakeEngine()).target) as channel:
        _, call = GenerationServiceStub(channel).Tokenize.with_call(  # type: ignore[no-untyped-call]  # generated
            pb.TokenizeRequest(text="a"), metadata=(("x-request-id", "mine"),)
        )
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"


def test_the_end_of_a_stream_is_its_finish() -> None:
    with scripted(Script()) as target, GenerationClient(target) as client:
        assert isinstance(list(client.stream("hi"))[-1], FinishEvent)

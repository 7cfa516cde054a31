"""TLS on a real port with real certificates: who is let in, and certificates that are renewed while the server runs."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme

from knnlm.errors import InvalidInput
from knnlm_server.access import TokenAccess
from knnlm_server.app import Border
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.tls import TLS, TLSFiles
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import FakeEngine

Start = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> TLSFiles:
    return issue(tmp_path, authority)


def issue(folder: Path, authority: trustme.CA, *, client_ca: trustme.CA | None = None) -> TLSFiles:
    """Files of a new certificate for this machine, put in place as a whole."""
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    write(folder / "key.pem", certificate.private_key_pem.bytes())
    write(folder / "cert.pem", b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    if client_ca is not None:
        write(folder / "ca.pem", client_ca.cert_pem.bytes())
    return TLSFiles(folder / "cert.pem", folder / "key.pem", folder / "ca.pem" if client_ca is not None else None)


def write(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".new")
    aside.write_bytes(content)
    aside.replace(path)


def model(target: str, credentials: grpc.ChannelCredentials) -> str:
    """What the server says it serves, over a connection of its own."""
    with grpc.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        name: str = GenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_SECONDS).model
    return name


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())


def presented(server: RunningServer) -> bytes:
    """The certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.server.port), WAIT_SECONDS) as connection,
        context.wrap_socket(connection) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""


def test_clients_that_trust_the_authority_are_answered_and_others_are_not(
    start_server: Start, authority: trustme.CA, files: TLSFiles
) -> None:
    server = start_server(FakeEngine(), border=Border(tls=TLS(files)))
    assert model(server.target, trusting(authority)) == "tiny"
    with pytest.raises(grpc.RpcError) as caught:
        model(server.target, trusting(trustme.CA()))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError):
        GenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_SECONDS)


def test_client_certificates_are_asked_for_and_must_be_of_the_authority(start_server: Start, authority: trustme.CA, tmp_path: Path) -> None:
    clients = trustme.CA()
    server = start_server(FakeEngine(), border=Border(tls=TLS(issue(tmp_path, authority, client_ca=clients))))
    assert model(server.target, trusting(authority, clients.issue_cert("client@example.org"))) == "tiny"
    for client in (None, trustme.CA().issue_cert("client@example.org")):
        with pytest.raises(grpc.RpcError) as caught:
            model(server.target, trusting(authority, client))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_new_connections_get_a_renewed_certificate_and_open_ones_go_on(start_server: Start, authority: trustme.CA, tmp_path: Path) -> None:
    server = start_server(FakeEngine(), border=Border(tls=TLS(issue(tmp_path, authority))))
    with grpc.secure_channel(server.target, trusting(authority)) as open_channel:
        stub = GenerationServiceStub(open_channel)
        assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_SECONDS).model == "tiny"
        before = presented(server)
        assert presented(server) == before
        issue(tmp_path, authority)
        assert presented(server) != before
        assert model(server.target, trusting(authority)) == "tiny"
        assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_SECONDS).model == "tiny"


def test_another_client_authority_takes_over(start_server: Start, authority: trustme.CA, tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    server = start_server(FakeEngine(), border=Border(tls=TLS(issue(tmp_path, authority, client_ca=first))))
    issue(tmp_path, authority, client_ca=second)
    assert model(server.target, trusting(authority, second.issue_cert("client@example.org"))) == "tiny"
    with pytest.raises(grpc.RpcError):
        model(server.target, trusting(authority, first.issue_cert("client@example.org")))


def test_files_that_are_half_renewed_leave_the_old_certificate_in_force(
    start_server: Start, authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = issue(tmp_path, authority)
    server = start_server(FakeEngine(), border=Border(tls=TLS(files)))
    before = presented(server)
    other = authority.issue_cert("localhost", "127.0.0.1")
    with caplog.at_level(logging.ERROR):
        write(files.certificate, other.cert_chain_pems[0].bytes())
        assert presented(server) == before
        assert "what was read before stays in force" in caplog.text
    write(files.key, other.private_key_pem.bytes())
    assert presented(server) != before
    assert model(server.target, trusting(authority)) == "tiny"


def encrypted_key(authority: trustme.CA) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(authority.issue_cert("localhost").private_key_pem.bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret"))
    return key.private_bytes(*form)


@pytest.mark.parametrize(
    ("damage", "field", "words"),
    [
        (lambda files, _: files.certificate.unlink(), "tls_cert", "there is no such file"),
        (lambda files, _: files.key.unlink(), "tls_key", "there is no such file"),
        (lambda files, _: files.certificate.write_text("no PEM"), "tls_cert", "no certificate that can be used"),
        (lambda files, authority: issue_key(files, authority), "tls_cert", "key values mismatch"),
        (lambda files, authority: files.key.write_bytes(encrypted_key(authority)), "tls_cert", "no certificate that can be used"),
        (lambda files, _: files.client_ca.unlink(), "tls_client_ca", "there is no such file"),
        (lambda files, _: files.client_ca.write_text("no PEM"), "tls_client_ca", "no certificates that can be used"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, authority: trustme.CA, damage: Callable[[TLSFiles, trustme.CA], None], field: str, words: str
) -> None:
    files = issue(tmp_path, authority, client_ca=authority)
    damage(files, authority)
    with pytest.raises(InvalidInput, match=words) as caught:
        TLS(files)
    assert caught.value.field == field


def issue_key(files: TLSFiles, authority: trustme.CA) -> None:
    files.key.write_bytes(authority.issue_cert("localhost").private_key_pem.bytes())


@pytest.mark.parametrize(
    ("names", "common_name", "tenant"),
    [
        (["app.example"], "search-team", "search-team"),
        (["app.example", "other.example"], None, "app.example"),
        (["app.example"], "Büro", "Büro"),
    ],
)
def test_a_client_certificate_names_the_tenant(
    start_server: Start, tmp_path: Path, authority: trustme.CA, names: list[str], common_name: str | None, tenant: str
) -> None:
    engine, clients = FakeEngine(), trustme.CA()
    tls = TLS(issue(tmp_path, authority, client_ca=clients))
    client = clients.issue_cert(*names, common_name=common_name)
    target = start_server(engine, border=Border(tls=tls)).target
    with grpc.secure_channel(target, trusting(authority, client), options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = GenerationServiceStub(channel)
        text, stopping = pb.Input(text="hi"), pb.StoppingOptions(max_new_tokens=8)
        stub.Generate(pb.GenerateRequest(prompt=text, options=pb.GenerationOptions(stopping=stopping)), timeout=WAIT_SECONDS)
        stub.Score(pb.ScoreRequest(input=text), timeout=WAIT_SECONDS)
        stub.Retrieve(pb.RetrieveRequest(context=text), timeout=WAIT_SECONDS)
    assert [found[0].tenant for found in (engine.requests, engine.scored, engine.retrieved)] == [tenant] * 3


def test_a_token_names_the_tenant_whatever_the_certificate_says(start_server: Start, tmp_path: Path, authority: trustme.CA) -> None:
    engine, clients = FakeEngine(), trustme.CA()
    tls = TLS(issue(tmp_path, authority, client_ca=clients))
    write(tmp_path / "tokens.toml", b'[[tokens]]\nname = "bob"\ntoken = "0123456789abcdef"\nroles = ["generate"]\n')
    border = Border(tls=tls, access=TokenAccess(tmp_path / "tokens.toml"))
    target = start_server(engine, border=border).target
    client = clients.issue_cert("c.example", common_name="alice")
    with grpc.secure_channel(target, trusting(authority, client), options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        bearer = (("authorization", "Bearer 0123456789abcdef"),)
        GenerationServiceStub(channel).Score(pb.ScoreRequest(input=pb.Input(text="hi")), metadata=bearer, timeout=WAIT_SECONDS)
    assert engine.scored[0].tenant == "bob"


def test_without_certificates_there_is_one_tenant(start_server: Start, files: TLSFiles, authority: trustme.CA) -> None:
    engine = FakeEngine()
    target = start_server(engine, border=Border(tls=TLS(files))).target
    with grpc.secure_channel(target, trusting(authority)) as channel:
        GenerationServiceStub(channel).Score(pb.ScoreRequest(input=pb.Input(text="hi")), timeout=WAIT_SECONDS)
    assert engine.scored[0].tenant == ""

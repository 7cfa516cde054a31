"""``knnlm serve`` as an operator runs it: a configuration file, TLS, tokens, metrics, administration, a check, a signal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme

from knnlm.model import HFLanguageModel
from knnlm_server.pb import admin_pb2
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceStub
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from tests.stores import build, environment, text_folder
from tests.tiny import tiny_corpus

PATIENCE = 120.0
USER, ROOT = "user-0123456789-token", "root-0123456789-token"
PROMPT = "The farmer sold a secret"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2_path: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("operator")
    model = HFLanguageModel.load(tiny_gpt2_path)
    for name, count in (("one", 12), ("two", 5)):
        build(text_folder(folder / f"{name}-text", tiny_corpus(count)), folder / name, model, index="Flat")
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def configuration(tmp_path: Path, stores: tuple[Path, Path], authority: trustme.CA) -> Path:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tables = (f'[[tokens]]\nname = "{name}"\ntoken = "{token}"\nroles = ["{role}"]\n' for name, token, role in
              (("user", USER, "generate"), ("root", ROOT, "admin")))  # fmt: skip
    (tmp_path / "tokens.toml").write_text("".join(tables))
    path = tmp_path / "serve.toml"
    path.write_text(
        f'store = "{stores[0]}"\nport = 0\nmetrics_port = 0\nlog_format = "json"\nmax_concurrent = 2\n'
        f'memory = "1GB"\nprefix_cache = "10MB"\n'
        f'tls_cert = "{tmp_path}/cert.pem"\ntls_key = "{tmp_path}/key.pem"\ntokens = "{tmp_path}/tokens.toml"\n'
        f'[datastores]\ntwo = "{stores[1]}"\n[limits]\nmax_samples = 2\n'
    )
    return path


class Server:
    """A process of the command; ``log``: its lines as objects, once it has ended."""

    def __init__(self, configuration: Path) -> None:
        line = [sys.executable, "-m", "knnlm", "serve", "--config", str(configuration)]
        self.errors = configuration.with_name("log")
        with self.errors.open("w") as errors:
            env = environment() | {"KNNLM_SERVE_GRACE": "7"}
            self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        assert self.process.stdout is not None
        found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", self.process.stdout.readline())
        assert found, self.errors.read_text()
        self.target = f"localhost:{found[1]}"

    def log(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.errors.read_text().splitlines()]

    def metrics(self) -> str:
        (address,) = re.findall(r"metrics on (\S+?)\"", self.errors.read_text())
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
        return text


@pytest.fixture
def server(configuration: Path) -> Iterator[Server]:
    started = Server(configuration)
    yield started
    started.process.kill()
    started.process.communicate()


def test_the_whole_border_at_once(server: Server, authority: trustme.CA) -> None:
    user, root = ((("authorization", f"Bearer {token}"),) for token in (USER, ROOT))
    options = pb.GenerationOptions(
        stopping=pb.StoppingOptions(max_new_tokens=4, ignore_eos=True), num_samples=2,
        retrieval=pb.RetrievalOptions(datastores=[pb.DatastoreWeight(name="default"), pb.DatastoreWeight(name="two")]),
    )  # fmt: skip
    with grpc.secure_channel(server.target, grpc.ssl_channel_credentials(authority.cert_pem.bytes())) as channel:
        stub, admin = GenerationServiceStub(channel), AdminServiceStub(channel)
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=user, timeout=PATIENCE)
        assert [store.name for store in info.datastores] == ["default", "two"]
        assert (info.limits.max_samples, info.limits.max_concurrent) == (2, 2)
        assert info.settings["port"] == "0 (file)"
        assert info.settings["grace"] == "7.0 (environment)"
        request = pb.GenerateRequest(prompt=pb.Input(text=PROMPT), options=options)
        response = stub.Generate(request, metadata=user, timeout=PATIENCE)
        assert [len(completion.tokens) for completion in response.completions] == [4, 4]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request, timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        admin.UnloadDatastore(admin_pb2.UnloadDatastoreRequest(name="two"), metadata=root, timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request, metadata=user, timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    counted = server.metrics()
    assert 'knnlm_requests_rejected_total{reason="TOKEN_MISSING"} 1.0' in counted
    assert 'knnlm_request_success_total{finished_reason="length"} 2.0' in counted
    assert "knnlm_generation_tokens_total 8.0" in counted
    assert 'knnlm_datastore_entries{datastore="default"}' in counted
    assert 'datastore="two"' not in counted
    for stepped in ("knnlm_step_time_seconds_count", "knnlm_request_queue_time_seconds_count", "knnlm_forward_time_seconds_count"):
        (value,) = re.findall(rf"^{stepped} (\S+)$", counted, re.MULTILINE)
        assert float(value) > 0
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    written = server.errors.read_text()
    assert "secret" not in written
    assert "0123456789" not in written
    assert {line.get("tenant") for line in server.log() if line["message"].startswith("call ended")} == {"user", "root", ""}


def test_a_crash_leaves_a_word_in_the_log(server: Server) -> None:
    server.process.send_signal(signal.SIGBUS)
    assert server.process.wait(PATIENCE) == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in server.errors.read_text()


def test_check_says_whether_it_would_serve(configuration: Path) -> None:
    line = [sys.executable, "-m", "knnlm", "serve", "--config", str(configuration), "--check"]
    found = subprocess.run(line, capture_output=True, text=True, check=False, env=environment(), timeout=PATIENCE)
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"ok: 127\.0\.0\.1:\d+ answered with 1 token in \d+\.\d{3} seconds\n", found.stdout)
    (configuration.parent / "tokens.toml").write_text("")
    found = subprocess.run(line, capture_output=True, text=True, check=False, env=environment(), timeout=PATIENCE)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(f"error: {configuration}: tokens is ")

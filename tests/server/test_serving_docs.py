"""``docs/serving.md`` and ``docs/operating.md`` name everything that a client or an operator can meet."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from knnlm.errors import KNNLMError
from knnlm_server import serve_command
from knnlm_server.client_errors import RequestFailed
from knnlm_server.configuration import settings_of
from knnlm_server.metrics import Metrics
from knnlm_server.pb import admin_pb2, generation_pb2
from knnlm_server.sequence import Limits
from knnlm_server.status import CODES, code_of, reason_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SERVING, OPERATING = (FENCED.sub("", (DOCS / name).read_text()) for name in ("serving.md", "operating.md"))
FILES = (generation_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)

# Holders that a reader sees through: what they hold is named.
HOLDERS = {"content", "ids", "tokens", "event", "completions", "completion", "finish", "token", "evidence", "request"}


def words(text: str) -> set[str]:
    """Names in code, those in paths and lists too."""
    return set(re.findall(r"\w+", code(text)))


def code(text: str) -> str:
    """What stands between single back ticks."""
    return " ".join(re.findall(r"`([^`]+)`", text))


def fields() -> list[str]:
    return sorted({field.name for file in FILES for message in file.message_types_by_name.values() for field in message.fields} - HOLDERS)


@pytest.mark.parametrize("name", fields())
def test_fields(name: str) -> None:
    assert name in words(SERVING) | words(OPERATING)


def test_rpcs() -> None:
    methods = {method.name for file in FILES for service in file.services_by_name.values() for method in service.methods}
    assert methods <= words(SERVING)


def test_reasons_of_finishes() -> None:
    names = {value.name for value in generation_pb2.FinishReason.DESCRIPTOR.values}
    assert names - {"FINISH_REASON_UNSPECIFIED"} <= words(SERVING)


def errors() -> list[type[KNNLMError]]:
    """Every class that has a status of its own, and those that take its status from one."""
    own = set(CODES) - {KNNLMError}
    # Clients have errors of their own, which are made of those of the server.
    inherited = {below for kind in own for below in kind.__subclasses__() if not issubclass(below, RequestFailed)}
    return sorted(own | inherited, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", errors())
def test_errors(kind: type[KNNLMError]) -> None:
    """In a line with its status."""
    error = kind.__new__(kind)
    status, reason = code_of(error).name, reason_of(error)
    assert any(re.match(rf"\| {status} \|.*`{reason}`", line) for line in SERVING.splitlines()), (reason, status)


def test_metrics() -> None:
    families = {family.name for family in Metrics().registry.collect()}
    families |= {"knnlm_datastore_entries", "knnlm_datastore_documents", "knnlm_server_info"}
    named = {word.removesuffix("_total") for word in words(OPERATING) if word.startswith("knnlm_")}
    assert named == families


def test_limits() -> None:
    assert {field.name for field in dataclasses.fields(Limits)} <= words(OPERATING)


def test_every_option_that_is_named_is_one() -> None:
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", code(OPERATING)))
    options = {name.replace("_", "-") for name in settings_of(serve_command.serve)} | {"datastore", "limit", "build-arg"}
    assert named <= options

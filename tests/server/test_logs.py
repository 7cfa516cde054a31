"""Lines of the log: one object or one line for each record, and no text of an exception that might quote a request."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable

import pytest

from knnlm.errors import StoreDamaged
from knnlm_server import logs


def record_of(failing: Callable[[], None]) -> logging.LogRecord:
    try:
        failing()
    except Exception:
        record = logging.LogRecord("knnlm_server.x", logging.ERROR, "x.py", 1, "request %s failed", ("r1",), sys.exc_info())
        logs.add_request_id(record)
        return record
    raise AssertionError("did not fail")


PROMPT = "a secret prompt"


def chained() -> None:
    try:
        raise KeyError(PROMPT)
    except KeyError as error:
        raise ValueError(f"about {PROMPT!r}") from error


def known() -> None:
    raise StoreDamaged("keys.npy is truncated.")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_names_types_and_places_but_quotes_nothing(log_format: logs.LogFormat) -> None:
    line = logs.formatter(log_format, texts_of_exceptions=False).format(record_of(chained))
    assert "secret" not in line
    for word in ("KeyError", "ValueError", "test_logs.py", "in chained", "which led to"):
        assert word in line


def test_what_knnlm_says_itself_is_kept() -> None:
    assert "StoreDamaged: keys.npy is truncated." in logs.formatter("text", texts_of_exceptions=False).format(record_of(known))


def test_texts_are_there_when_asked_for() -> None:
    assert "a secret prompt" in logs.formatter("text", texts_of_exceptions=True).format(record_of(chained))


def test_one_formatter_does_not_spoil_the_record_for_another() -> None:
    record = record_of(chained)
    assert "secret" in logs.formatter("text", texts_of_exceptions=True).format(record)
    assert "secret" not in logs.formatter("text", texts_of_exceptions=False).format(record)


def test_json_lines_hold_the_request_and_further_fields() -> None:
    token = logs.request_id.set("r1")
    try:
        record = logging.makeLogRecord({"name": "knnlm_server.x", "levelname": "INFO", "msg": "two\nlines", "tenant": "alice"})
        logs.add_request_id(record)
    finally:
        logs.request_id.reset(token)
    line = logs.formatter("json", texts_of_exceptions=False).format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("time")
    assert fields == {"level": "INFO", "logger": "knnlm_server.x", "message": "two\nlines", "tenant": "alice", "request_id": "r1"}


def test_a_line_of_text_begins_with_the_request_where_there_is_one() -> None:
    record = logging.makeLogRecord({"name": "knnlm_server.x", "levelname": "INFO", "msg": "hello"})
    logs.add_request_id(record)
    assert logs.formatter("text", texts_of_exceptions=False).format(record).endswith("INFO knnlm_server.x: hello")

"""The server's log: text or JSON lines on standard error, each with the id of the request that it is about.

Nothing that a client sent goes into it unless that is asked for. What knnlm logs itself holds counts and names only;
texts of exceptions, which may quote a prompt, are left out of tracebacks here.
"""

from __future__ import annotations

import copy
import logging
import traceback
from contextvars import ContextVar
from types import TracebackType
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from knnlm.errors import KNNLMError

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the running task works on; empty outside of one."""

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_FIELDS = ("asctime", "levelname", "name", "message")


def configure(log_format: LogFormat, level: LogLevel, *, texts_of_exceptions: bool) -> None:
    """Set the process's log up. ``texts_of_exceptions``: also those that may quote what a client sent."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format, texts_of_exceptions=texts_of_exceptions))
    handler.addFilter(add_request_id)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("knnlm_server").setLevel(level.upper())


def formatter(log_format: LogFormat, *, texts_of_exceptions: bool) -> logging.Formatter:
    """How a record becomes a line."""
    if log_format == "json":
        return _JSON(texts_of_exceptions)
    return _Text(texts_of_exceptions)


class _Discreet(logging.Formatter):
    """Leaves the texts of exceptions out, which may quote a prompt, except for those that knnlm wrote itself."""

    texts_of_exceptions: bool

    def format(self, record: logging.LogRecord) -> str:
        # A record keeps the traceback that another formatter may have made of it.
        own = copy.copy(record)
        own.exc_text = None
        return super().format(own)

    def formatException(self, ei: ExceptionInfo) -> str:
        if self.texts_of_exceptions or ei[1] is None:
            return super().formatException(ei)
        return "".join(_lines(ei[1])).rstrip()


class _Text(_Discreet):
    def __init__(self, texts_of_exceptions: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(about)s%(message)s")
        self.texts_of_exceptions = texts_of_exceptions


class _JSON(_Discreet, JsonFormatter):
    def __init__(self, texts_of_exceptions: bool) -> None:
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        JsonFormatter.__init__(
            self, list(_FIELDS), rename_fields=names, reserved_attrs=[*_RESERVED, "about"], json_ensure_ascii=False, exc_info_as_array=False
        )
        self.texts_of_exceptions = texts_of_exceptions


_RESERVED = [*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"]


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter that gives records the id of the request that the running task works on."""
    current = request_id.get()
    record.about = f"[{current}] " if current else ""
    if current:
        record.request_id = current
    return True


def _lines(error: BaseException) -> list[str]:
    """A traceback with its causes, each exception by its type alone."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    above = [*_lines(earlier), "\nwhich led to:\n\n"] if earlier is not None else []
    said = f": {error}" if isinstance(error, KNNLMError) else " (its text is left out, since it may quote a request)"
    return [*above, *traceback.format_tb(error.__traceback__), f"{type(error).__qualname__}{said}\n"]

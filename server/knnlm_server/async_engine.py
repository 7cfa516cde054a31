"""The engine on a thread of this process, beside an event loop."""

from __future__ import annotations

import logging
import threading
from operator import methodcaller

from knnlm.thread_pools import size_thread_pools
from knnlm.tokenization import TextTokenizer
from knnlm_server.datastores import Datastores
from knnlm_server.engine import DecodingEngine
from knnlm_server.engine_loop import EngineLoop
from knnlm_server.engine_parts import EngineParts
from knnlm_server.errors import ShuttingDown
from knnlm_server.sequence import Limits, ServerInfo
from knnlm_server.streaming_engine import StreamingEngine
from knnlm_server.telemetry import EngineObserver

_log = logging.getLogger(__name__)


class AsyncEngine(StreamingEngine):
    """A :class:`DecodingEngine` of ``parts`` on its own thread, for asyncio: the server's
    :class:`~knnlm_server.engine_protocol.Engine`. ``observer`` is told of its steps."""

    def __init__(self, parts: EngineParts, observer: EngineObserver | None = None) -> None:
        super().__init__()
        self._parts, self._observer = parts, observer
        self._loop = EngineLoop(self._tell)
        self._thread: threading.Thread | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model that is served."""
        return self._parts.tokenizer

    @property
    def datastores(self) -> Datastores:
        """The datastores that are served, to be changed while requests run."""
        return self._parts.datastores

    @property
    def info(self) -> ServerInfo:
        """What is served now, the limits in force and the resolved configuration."""
        return self._parts.info_now

    @property
    def _limits(self) -> Limits:
        return self._parts.info.limits

    def start(self) -> None:
        """Warm model and datastores up and begin to work."""
        engine = self._parts.warm_engine(self._observer)
        self._thread = threading.Thread(target=self._run, args=(engine,), name="knnlm-engine", daemon=True)
        self._open = True
        self._thread.start()

    def stop(self) -> None:
        """End at once: running requests raise :class:`ShuttingDown`."""
        self._close()
        self._loop.stop()
        if self._thread is not None:
            self._thread.join()

    def _submit(self, request_id: str, command: methodcaller) -> None:
        self._loop.submit(request_id, command)

    def _forget(self, request_id: str) -> None:
        self._loop.submit(request_id, methodcaller("cancel", request_id))

    def _run(self, engine: DecodingEngine) -> None:
        """The thread's whole life; however it ends, nobody is left waiting."""
        try:
            # Counted for each thread by itself.
            if self._parts.threads is not None:
                size_thread_pools(self._parts.threads)
            self._loop.run(engine)
        except Exception:
            _log.critical("the engine's thread failed; the server must be started again", exc_info=True)
        finally:
            self._end_all(ShuttingDown("The server was stopped while it worked on this request."))

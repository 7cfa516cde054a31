"""The life of a decoding engine between its first step and its last: obey, step, hand out. Knows no asyncio and no gRPC.

It runs on one thread, which owns the engine; commands come from any. :mod:`knnlm_server.async_engine` runs it beside an
event loop.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence

from knnlm.errors import KNNLMError
from knnlm_server.engine import DecodingEngine
from knnlm_server.errors import EngineFailed
from knnlm_server.sequence import FinishEvent, RetrieveResult, ScoreResult, TokenEvent
from knnlm_server.store_watch import SECONDS_BETWEEN_LOOKS

_log = logging.getLogger(__name__)

Content = TokenEvent | FinishEvent | ScoreResult | RetrieveResult | KNNLMError
Deliveries = Sequence[tuple[str, Content]]
Command = Callable[[DecodingEngine], None]


class EngineLoop:
    """Steps an engine. ``tell`` is given what each step has for which request, on the thread of :meth:`run`."""

    def __init__(self, tell: Callable[[Deliveries], None]) -> None:
        self._tell = tell
        self._commands: queue.SimpleQueue[tuple[str, Command] | None] = queue.SimpleQueue()

    def submit(self, request_id: str, command: Command) -> None:
        """Carry out a command before the next step; an error of it is told to its request alone."""
        self._commands.put((request_id, command))

    def stop(self) -> None:
        """Return from :meth:`run` before the next step."""
        self._commands.put(None)

    def run(self, engine: DecodingEngine) -> None:
        """Obey and step until :meth:`stop`."""
        settled = True  # whether the observer was told of the last change
        while self._obey(engine, settled):
            worked = not engine.idle
            try:
                outputs = engine.step()
                settled = engine.idle
            except Exception as error:  # a step as a whole broke: its requests end, the server goes on
                _log.exception("a step failed")
                outputs = engine.fail_all(error)
                settled = not worked
            self._tell([(output.request_id, output.content) for output in outputs])

    def _obey(self, engine: DecodingEngine, settled: bool) -> bool:
        """Carry out all commands that wait (or wait for one where there is nothing to do); False at the end.

        Those that come meanwhile are left for the next time, so that no flood of them holds the steps up. Where the last
        request was cancelled there is one step more, by which the observer learns that nothing runs.
        """
        left = self._commands.qsize()
        while (idle := engine.idle and settled) or left > 0:
            try:
                command = self._commands.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                self._look(engine)
                continue
            if command is None:
                return False
            self._carry_out(engine, *command)
            left = self._commands.qsize() if idle else left - 1
        return True

    def _carry_out(self, engine: DecodingEngine, request_id: str, command: Command) -> None:
        try:
            command(engine)
        except KNNLMError as error:
            self._tell([(request_id, error)])
        except Exception as error:  # it ends this request alone
            _log.exception("request %s failed", request_id)
            self._tell([(request_id, EngineFailed.of(error))])

    def _look(self, engine: DecodingEngine) -> None:
        """Between requests too, since what is told of datastores is what was seen last."""
        try:
            engine.look()
        except Exception:
            _log.exception("removals from datastores can't be looked for")

"""The one thread that owns the engine, and the asyncio streams of its requests.

Commands go to the thread by a queue; events come back by ``call_soon_threadsafe``, once per step for all requests.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from knnlm.errors import KNNLMError
from knnlm.model import HFLanguageModel
from knnlm.sampling import SamplingParams
from knnlm.thread_pools import size_thread_pools
from knnlm.tokenization import TextTokenizer
from knnlm_server.datastores import Datastores
from knnlm_server.engine import DecodingEngine, Output
from knnlm_server.errors import EngineFailed, ShuttingDown
from knnlm_server.listeners import Content, Listener, deliver
from knnlm_server.sequence import (
    FinishEvent,
    GenerationRequest,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    StoppingParams,
    TokenEvent,
)
from knnlm_server.store_watch import SECONDS_BETWEEN_LOOKS

logger = logging.getLogger(__name__)

Command = Callable[[DecodingEngine], None]


class AsyncEngine:
    """A :class:`DecodingEngine` on its own thread, for asyncio. The server's :class:`~knnlm_server.engine_protocol.Engine`.

    ``info``: what is told of the server, but for its datastores. ``threads`` that torch and FAISS each have on the engine's
    thread (None: as they are). ``engine_options``: further ones of :class:`DecodingEngine`.
    """

    def __init__(
        self, model: HFLanguageModel, tokenizer: TextTokenizer, datastores: Datastores, info: ServerInfo, *, threads: int | None = None,
        **engine_options: Any,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._datastores, self._info = model, tokenizer, datastores, info
        self._threads, self._engine_options = threads, engine_options
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._thread: threading.Thread | None = None
        # Held to take a request in or to close the door, so that none slips in after the last look at the listeners.
        self._door = threading.Lock()
        self._open = False

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model that is served."""
        return self._tokenizer

    @property
    def datastores(self) -> Datastores:
        """The datastores that are served, to be changed while requests run."""
        return self._datastores

    @property
    def info(self) -> ServerInfo:
        """What is served now, the limits in force and the resolved configuration."""
        return replace(self._info, datastores=self._datastores.info)

    @property
    def working(self) -> bool:
        """Whether requests are answered: from :meth:`start` to :meth:`stop`, or to an error that ended the engine's thread."""
        return self._open

    def start(self) -> None:
        """Warm model and datastores up and begin to work."""
        self._size_pools()
        engine = DecodingEngine(self._model, self._tokenizer, self._datastores, self._info.limits, **self._engine_options)
        self._datastores.warm_up()
        self._warm_up(engine)
        self._thread = threading.Thread(target=self._run, args=(engine,), name="knnlm-engine", daemon=True)
        self._open = True
        self._thread.start()

    def stop(self) -> None:
        """End at once: running requests raise :class:`ShuttingDown`."""
        self._close()
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """Token events, and one finish event for each sample; closing the generator cancels the request.

        Raises :class:`~knnlm_server.errors.QueueFull` where there is no room to wait,
        :class:`~knnlm_server.errors.DatastoreNotLoaded` for a name that is not known, and :class:`ReadTooSlowly` where too
        many events were left unread.
        """
        listener = self._submit(request.request_id, lambda engine: engine.add(request))
        running = request.samples
        try:
            while running:
                content = await listener.contents.get()
                if isinstance(content, KNNLMError):
                    raise content
                assert isinstance(content, TokenEvent | FinishEvent)
                running -= isinstance(content, FinishEvent)
                yield content
        finally:
            self._leave(request.request_id)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of given tokens; cancelling the task cancels the request."""
        result = await self._result(request.request_id, lambda engine: engine.add_score(request))
        assert isinstance(result, ScoreResult)
        return result

    async def retrieve(self, request: RetrieveRequest) -> RetrieveResult:
        """Neighbours of a context; cancelling the task cancels the request."""
        result = await self._result(request.request_id, lambda engine: engine.add_retrieve(request))
        assert isinstance(result, RetrieveResult)
        return result

    async def _result(self, request_id: str, command: Command) -> Content:
        """The one thing that a request is answered with."""
        listener = self._submit(request_id, command)
        try:
            content = await listener.contents.get()
        finally:
            self._leave(request_id)
        if isinstance(content, KNNLMError):
            raise content
        return content

    def _submit(self, request_id: str, command: Command) -> Listener:
        listener = Listener(self._info.limits.max_unread_events, lambda: self._leave(request_id))

        def run(engine: DecodingEngine) -> None:
            try:
                command(engine)
            except KNNLMError as error:
                self._tell([(request_id, error)])
            except Exception as error:  # it ends this request alone
                logger.exception("request %s failed", request_id)
                self._tell([(request_id, EngineFailed.of(error))])

        with self._door:
            if not self._open:
                raise ShuttingDown("The server is being stopped and takes no new requests.")
            self._listeners[request_id] = listener
            self._commands.put(run)
        return listener

    def _leave(self, request_id: str) -> None:
        """Forget a request; if it still runs, the engine frees its row before the next step."""
        if self._listeners.pop(request_id, None) is not None:
            self._commands.put(lambda engine: engine.cancel(request_id))

    def _close(self) -> None:
        with self._door:
            self._open = False

    def _size_pools(self) -> None:
        """For the calling thread: FAISS counts them for each thread by itself."""
        if self._threads is not None:
            size_thread_pools(self._threads)

    def _run(self, engine: DecodingEngine) -> None:
        """The thread's whole life; however it ends, nobody is left waiting."""
        try:
            self._size_pools()
            self._work(engine)
        except Exception:
            logger.critical("the engine's thread failed; the server must be started again", exc_info=True)
        finally:
            self._close()
            stopped = ShuttingDown("The server was stopped while it worked on this request.")
            self._tell([(request_id, stopped) for request_id in list(self._listeners)])

    def _work(self, engine: DecodingEngine) -> None:
        settled = True  # whether the observer was told of the last change
        while self._obey(engine, settled):
            worked = not engine.idle
            try:
                outputs = engine.step()
                settled = engine.idle
            except Exception as error:  # a step as a whole broke: its requests end, the server goes on
                logger.exception("a step failed")
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
            command(engine)
            left = self._commands.qsize() if idle else left - 1
        return True

    def _look(self, engine: DecodingEngine) -> None:
        """Between requests too, since what is told of datastores is what was seen last."""
        try:
            engine.look()
        except Exception:
            logger.exception("removals from datastores can't be looked for")

    def _tell(self, contents: Sequence[tuple[str, Content]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Listener, Content]]] = {}
        for request_id, content in contents:
            listener = self._listeners.get(request_id)
            if listener is not None:
                by_loop.setdefault(listener.loop, []).append((listener, content))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(deliver, deliveries)
            except RuntimeError:
                logger.info("an event loop closed before its %d events arrived", len(deliveries))

    def _warm_up(self, engine: DecodingEngine) -> None:
        """Two tokens for a short prompt: every part runs once before the first request."""
        served = self._datastores.info
        retrieval = served[0].default_retrieval if served else RetrievalParams(0.0, 1, 1.0)
        stopping = StoppingParams(max_new_tokens=2, ignore_eos=True)
        engine.add(GenerationRequest("warm-up", (0, 0), SamplingParams(temperature=0.0), stopping, retrieval))
        outputs: list[Output] = []
        while not engine.idle:
            outputs += engine.step()
        for output in outputs:
            if isinstance(output.content, KNNLMError):
                raise output.content

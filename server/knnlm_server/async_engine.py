"""The one thread that owns the engine, and the asyncio streams of its requests.

Commands go to the thread by a queue; events come back by ``call_soon_threadsafe``, once per step for all requests.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import knnlm
from knnlm.errors import InvalidInput, KNNLMError
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.sampling import SamplingParams
from knnlm.thread_pools import available_threads, size_thread_pools, thread_changes, thread_facts
from knnlm.tokenization import TextTokenizer
from knnlm_server.datastores import Datastores, StoreOptions
from knnlm_server.engine import DecodingEngine, Output
from knnlm_server.errors import EngineFailed, ReadTooSlowly, ShuttingDown
from knnlm_server.memory_plan import SHARE, free_memory, measured_costs, plan_memory
from knnlm_server.scheduler import STEP_TOKENS
from knnlm_server.sequence import (
    FinishEvent,
    GenerationRequest,
    Limits,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    StoppingParams,
    TokenEvent,
)
from knnlm_server.serving_check import check_servable
from knnlm_server.store_watch import SECONDS_BETWEEN_LOOKS
from knnlm_server.telemetry import EngineObserver

logger = logging.getLogger(__name__)

Content = TokenEvent | FinishEvent | ScoreResult | RetrieveResult | KNNLMError
Command = Callable[[DecodingEngine], None]


SECONDS_TO_CATCH_UP = 1.0


class _Listener:
    """One request's way back: what the engine hands out arrives in the event loop of the request.

    One who is more than ``most_unread`` events behind, and some time later still, is ended: what was not read is dropped
    for a :class:`ReadTooSlowly`, and ``leave`` is called.
    """

    def __init__(self, most_unread: int, leave: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.contents: asyncio.Queue[Content] = asyncio.Queue()
        self._most_unread, self._leave = most_unread, leave
        self._judging: asyncio.TimerHandle | None = None
        self._ended = False

    def take(self, content: Content) -> None:
        """Keep what the engine handed out, to be read from ``contents``."""
        if self._ended:
            return
        self.contents.put_nowait(content)
        if self._judging is None and self.contents.qsize() > self._most_unread:
            # Not at once: where the loop itself was busy, events of many steps arrive together.
            self._judging = self.loop.call_later(SECONDS_TO_CATCH_UP, self._judge)

    def _judge(self) -> None:
        self._judging = None
        behind = self.contents.qsize()
        if behind <= self._most_unread:
            return
        self._ended = True
        while not self.contents.empty():
            self.contents.get_nowait()
        self.contents.put_nowait(
            ReadTooSlowly(f"The client is {behind} events behind, and at most {self._most_unread} are kept; read them as they come.")
        )
        self._leave()


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
        self._listeners: dict[str, _Listener] = {}
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

    def _submit(self, request_id: str, command: Command) -> _Listener:
        listener = _Listener(self._info.limits.max_unread_events, lambda: self._leave(request_id))

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
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Content]]] = {}
        for request_id, content in contents:
            listener = self._listeners.get(request_id)
            if listener is not None:
                by_loop.setdefault(listener.loop, []).append((listener, content))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
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


def _deliver(deliveries: list[tuple[_Listener, Content]]) -> None:
    for listener, content in deliveries:
        listener.take(content)


def build_async_engine(
    stores: Mapping[str, Path],
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    max_concurrent: int | None = None,
    context: int | None = None,
    memory_bytes: int | None = None,
    prefix_cache_bytes: int | None = None,
    limits: Mapping[str, Any] | None = None,
    step_tokens: int = STEP_TOKENS,
    overlap: bool = False,
    weight: float | None = None,
    k: int | None = None,
    knn_temperature: float | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    allow_unproven: bool = False,
    threads: int | None = None,
    settings: Mapping[str, str] | None = None,
    observer: EngineObserver | None = None,
) -> AsyncEngine:
    """Open the datastores (by name, the default first) and their model, check that it can be served, and put an engine around them.

    ``context``: most tokens of prompt and completion (None: the model's context, as far as it fits). ``max_concurrent``: None
    for as many as fit. ``memory_bytes`` and ``prefix_cache_bytes``: see :func:`~knnlm_server.memory_plan.plan_memory`.
    ``limits``: other fields of :class:`Limits` by name. ``step_tokens``, ``overlap``: see
    :class:`~knnlm_server.engine.DecodingEngine`.
    ``weight``, ``k`` and ``knn_temperature`` go before the settings of every datastore.
    ``allow_unproven`` serves a model whose batched decoding was not shown to equal decoding alone. ``threads`` of torch and
    of FAISS (None: the cores there are). ``settings``: more of the resolved configuration, for GetServerInfo. Raises the
    errors of :mod:`knnlm.errors`.
    """
    if not stores:
        raise InvalidInput("stores", "is empty, but the first datastore says which model is served.")
    threads = available_threads() if threads is None else threads
    size_thread_pools(threads)
    for change in thread_changes(thread_facts()):
        logger.warning("%s", change)
    (name, path), *others = stores.items()
    opened = open_store(
        path, model=model, device=device, dtype=dtype, verify=verify, trust_remote_code=trust_remote_code,
        k=k, temperature=knn_temperature, weight=weight,
    )  # fmt: skip
    plan = plan_memory(
        measured_costs(opened.model), free_memory(opened.model.device), SHARE[opened.model.device.type], budget=memory_bytes,
        slots=max_concurrent, context=_context(opened.model, context), prefix_bytes=prefix_cache_bytes, step_tokens=step_tokens,
    )  # fmt: skip
    for line in plan.describe():
        logger.info("%s", line)
    made = Limits(**{**(limits or {}), "context": plan.context, "max_concurrent": plan.slots})
    if not allow_unproven:
        check_servable(opened.model, made.context)
    options = StoreOptions(device, k, knn_temperature, weight, verify)
    datastores = Datastores(opened.model, opened.knn_lm.tokenizer, options)
    datastores.serve(name, opened.searchable)
    for other, its_path in others:
        datastores.load(other, its_path)
    facts = {"dtype": opened.model.dtype, "device": str(opened.model.device), "attention": opened.model.attention, "threads": str(threads)}
    facts |= {"memory": str(plan.needed), "prefix_cache": str(plan.prefix_bytes)}
    info = _info(opened, made, {**facts, **(settings or {})})
    return AsyncEngine(
        opened.model, opened.knn_lm.tokenizer, datastores, info, threads=threads, step_tokens=step_tokens, observer=observer,
        prefix_bytes=plan.prefix_bytes, overlap=overlap,
    )  # fmt: skip


def _context(model: HFLanguageModel, context: int | None) -> int | None:
    if context is not None and context > model.context:
        raise InvalidInput("max_context", f"is {context}, but the model's context is {model.context} tokens.")
    return context


def _info(opened: OpenedKNNLM, limits: Limits, settings: dict[str, str]) -> ServerInfo:
    facts = opened.store.manifest.model
    return ServerInfo(
        version=knnlm.__version__,
        model=_known_name(opened.model.name),
        model_fingerprint=facts.fingerprint.weights,
        tokenizer_fingerprint=facts.fingerprint.tokenizer,
        vocabulary_size=facts.vocabulary_size,
        datastores=(),
        limits=limits,
        settings=settings,
    )


def _known_name(model: str) -> str:
    """A model's name without the folders of this machine that it lies in."""
    return Path(model).name if Path(model).is_dir() else model

"""The one thread that owns the engine, and the asyncio streams of its requests.

Commands go to the thread by a queue; events come back by ``call_soon_threadsafe``, once per step for all requests.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import knnlm
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidInput, KNNLMError
from knnlm.knn_lm import KNNLanguageModel
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.sampling import SamplingParams
from knnlm.tokenization import TextTokenizer
from knnlm_server.engine import DecodingEngine, Output
from knnlm_server.errors import EngineFailed, ShuttingDown
from knnlm_server.sequence import (
    DatastoreInfo,
    FinishEvent,
    GenerationRequest,
    Limits,
    RetrievalParams,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    StoppingParams,
    TokenEvent,
)
from knnlm_server.serving_check import check_servable

logger = logging.getLogger(__name__)

Content = TokenEvent | FinishEvent | ScoreResult | KNNLMError
Command = Callable[[DecodingEngine], None]


class _Listener:
    """One request's way back: what the engine hands out arrives in the event loop of the request."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.contents: asyncio.Queue[Content] = asyncio.Queue()


class AsyncEngine:
    """A :class:`DecodingEngine` on its own thread, for asyncio. The server's :class:`~knnlm_server.engine_protocol.Engine`."""

    def __init__(self, knn_lm: KNNLanguageModel, model: HFLanguageModel, store: Datastore, info: ServerInfo) -> None:
        self._parts = (knn_lm, model, store, info.limits)
        self._info, self._tokenizer = info, knn_lm.tokenizer
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
    def info(self) -> ServerInfo:
        """What is served, the limits in force and the default mixture."""
        return self._info

    def start(self) -> None:
        """Warm the model up and begin to work."""
        engine = DecodingEngine(*self._parts)
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
        """Token events, then one finish event; closing the generator cancels the request.

        Raises :class:`~knnlm_server.errors.QueueFull` where there is no room to wait.
        """
        listener = self._submit(request.request_id, lambda engine: engine.add(request))
        try:
            while True:
                content = await listener.contents.get()
                if isinstance(content, KNNLMError):
                    raise content
                assert isinstance(content, TokenEvent | FinishEvent)
                yield content
                if isinstance(content, FinishEvent):
                    return
        finally:
            self._leave(request.request_id)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of given tokens; cancelling the task cancels the request."""
        listener = self._submit(request.request_id, lambda engine: engine.add_score(request))
        try:
            content = await listener.contents.get()
        finally:
            self._leave(request.request_id)
        if isinstance(content, KNNLMError):
            raise content
        assert isinstance(content, ScoreResult)
        return content

    def _submit(self, request_id: str, command: Command) -> _Listener:
        listener = _Listener()

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

    def _run(self, engine: DecodingEngine) -> None:
        """The thread's whole life; however it ends, nobody is left waiting."""
        try:
            self._work(engine)
        except Exception:
            logger.critical("the engine's thread failed; the server must be started again", exc_info=True)
        finally:
            self._close()
            stopped = ShuttingDown("The server was stopped while it worked on this request.")
            self._tell([(request_id, stopped) for request_id in list(self._listeners)])

    def _work(self, engine: DecodingEngine) -> None:
        while self._obey(engine):
            try:
                outputs = engine.step()
            except Exception as error:  # a step as a whole broke: its requests end, the server goes on
                logger.exception("a step failed")
                outputs = engine.fail_all(error)
            self._tell([(output.request_id, output.content) for output in outputs])

    def _obey(self, engine: DecodingEngine) -> bool:
        """Carry out all commands that wait (or wait for one where there is nothing to do); False at the end."""
        while True:
            try:
                command = self._commands.get(block=engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

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
        retrieval = self._info.datastores[0].default_retrieval
        engine.add(
            GenerationRequest(
                "warm-up", (0, 0), SamplingParams(temperature=0.0), StoppingParams(max_new_tokens=2, ignore_eos=True), retrieval
            )
        )
        outputs: list[Output] = []
        while not engine.idle:
            outputs += engine.step()
        for output in outputs:
            if isinstance(output.content, KNNLMError):
                raise output.content


def _deliver(deliveries: list[tuple[_Listener, Content]]) -> None:
    for listener, content in deliveries:
        listener.contents.put_nowait(content)


def build_async_engine(
    store: Path,
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    max_concurrent: int = 8,
    context: int | None = None,
    weight: float | None = None,
    k: int | None = None,
    knn_temperature: float | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    allow_unproven: bool = False,
) -> AsyncEngine:
    """Open the store with its model and index, check that the model can be served, and put an engine around them.

    ``context``: most tokens of prompt and completion (None: the model's context). ``allow_unproven`` serves a model
    whose batched decoding was not shown to equal decoding alone. Raises the errors of :mod:`knnlm.errors`.
    """
    opened = open_store(
        store, model=model, device=device, dtype=dtype, k=k, temperature=knn_temperature, weight=weight, verify=verify,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    limits = Limits(context=_context(opened.model, context), max_concurrent=max_concurrent)
    if not allow_unproven:
        check_servable(opened.model, limits.context)
    return AsyncEngine(opened.knn_lm, opened.model, opened.store, _info(opened, limits))


def _context(model: HFLanguageModel, context: int | None) -> int:
    if context is not None and context > model.context:
        raise InvalidInput("max_context", f"is {context}, but the model's context is {model.context} tokens.")
    return context or model.context


def _info(opened: OpenedKNNLM, limits: Limits) -> ServerInfo:
    manifest, mixture = opened.store.manifest, opened.knn_lm.mixture
    datastore = DatastoreInfo(
        name="default",
        fingerprint=manifest.fingerprint,
        entries=manifest.live_entries,
        documents=manifest.live_documents,
        index=opened.retriever.index.description,
        key_layer=f"{manifest.key.layer.kind} ({manifest.key.layer.module})",
        key_dimension=manifest.key.dimension,
        distance=opened.retriever.distance,
        default_retrieval=RetrievalParams(mixture.weight, mixture.k, mixture.temperature),
        defaults_source=opened.mixture_source,
    )
    return ServerInfo(
        version=knnlm.__version__,
        model=opened.model.name,
        model_fingerprint=manifest.model.fingerprint.weights,
        tokenizer_fingerprint=manifest.model.fingerprint.tokenizer,
        vocabulary_size=manifest.model.vocabulary_size,
        datastores=(datastore,),
        limits=limits,
        settings={"dtype": opened.model.dtype, "device": str(opened.model.device), "attention": opened.model.attention},
    )

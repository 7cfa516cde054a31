"""From paths of datastores to an engine that serves them: their model opened and proven, and its memory planned."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import knnlm
from knnlm.errors import InvalidInput
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.thread_pools import available_threads, size_thread_pools, thread_changes, thread_facts
from knnlm_server.async_engine import AsyncEngine
from knnlm_server.datastores import Datastores, StoreOptions
from knnlm_server.memory_plan import SHARE, free_memory, measured_costs, plan_memory
from knnlm_server.scheduler import STEP_TOKENS
from knnlm_server.sequence import Limits, ServerInfo
from knnlm_server.serving_check import check_servable
from knnlm_server.telemetry import EngineObserver

logger = logging.getLogger(__name__)


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

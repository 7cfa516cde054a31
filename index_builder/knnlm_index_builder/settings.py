"""What a build is asked for: settings that the store's bytes depend on, and resources that they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knnlm.errors import InvalidInput, KeyOverflow
from knnlm.model import LanguageModel
from knnlm.tokenization import BosMode
from knnlm.windows import Windowing
from knnlm_index_builder.executors import Executor, SerialExecutor
from knnlm_index_builder.machine import total_memory

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32_768
KEY_DTYPES = ("float16", "float32", "none")


@dataclass(frozen=True)
class BuildSettings:
    """What the bytes of a store depend on, beside model and corpus.

    ``index``: ``auto``, ``exact`` or a FAISS factory string; ``keys``: float16, float32, or ``none``: keys go as codes
    into the index and nowhere else; ``on_overflow``: ``stop`` at a key that float16 can't hold, or go over to
    ``float32``; ``max_length`` and ``stride`` of windows (None: the defaults of :class:`knnlm.windows.Windowing`);
    ``bos``, ``eos`` and ``split_documents`` as in :class:`knnlm.tokenization.TextTokenizer` and
    :class:`knnlm.corpus.Corpus`; ``shard_tokens``: tokens in a shard at most, the unit of work that a killed build does
    again.
    """

    index: str = "auto"
    keys: str = "float16"
    on_overflow: str = "stop"
    max_length: int | None = None
    stride: int | None = None
    bos: BosMode = "auto"
    eos: bool = False
    split_documents: str | None = None
    shard_tokens: int = 262_144

    def validate(self) -> BuildSettings:
        """Return self; raise :class:`InvalidInput` naming the field that is out of range."""
        if self.keys not in KEY_DTYPES:
            raise InvalidInput("keys", f"is {self.keys!r}, but must be float16, float32 or none.")
        if self.on_overflow not in ("stop", "float32"):
            raise InvalidInput("on_overflow", f"is {self.on_overflow!r}, but must be stop or float32.")
        if self.bos not in ("auto", "yes", "no"):
            raise InvalidInput("bos", f"is {self.bos!r}, but must be auto, yes or no.")
        if self.shard_tokens < 1:
            raise InvalidInput("shard_tokens", f"is {self.shard_tokens}, but must be 1 or more.")
        return self

    def plan(self, model: LanguageModel, windowing: Windowing) -> dict[str, Any]:
        """Everything that the store's bytes depend on beside the text, flat, so that a difference can be named."""
        return {
            **{f"model {part}": value for part, value in asdict(model.fingerprint).items()},
            "dtype": model.dtype,
            "key layer": f"{model.key_layer.kind} ({model.key_layer.module})",
            **asdict(self),
            "max_length": windowing.max_length,
            "stride": windowing.stride,
        }


def with_advice(overflow: KeyOverflow, extended: Path | None) -> KeyOverflow:
    """The same error with what to do: about a new store, or about the one at ``extended`` that is appended to."""
    advice = "build with --keys float32, or with --on-overflow float32 to go over to it when it happens."
    if extended is not None:
        advice = f"{extended} keeps its keys as float16, so leave this document out, or build all anew with --keys float32."
    return KeyOverflow(f"{overflow}; {advice}")


@dataclass(frozen=True)
class Resources:
    """What a build may use. No byte of the store depends on it, but for ``memory`` where it caps the training sample.

    ``batch_tokens`` in one forward pass (None: 2,048 on a CPU, 32,768 on a GPU); ``executor`` that runs the shards (None:
    this process); ``memory`` in bytes for training and filling the index (default: half of the machine's).
    """

    memory: int = field(default_factory=lambda: total_memory() // 2)
    batch_tokens: int | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InvalidInput("batch_size", f"is {self.batch_tokens}, but must be 1 or more.")

    def batch(self, model: LanguageModel) -> int:
        """Tokens in one forward pass."""
        return self.batch_tokens or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS)

    def executor_for(self, model: LanguageModel) -> Executor:
        """Who runs the shards."""
        return self.executor or SerialExecutor(model)

"""Language models: tokens in, logits and keys out.

A *key* is the hidden state of the base LM that the datastore is indexed by (Khandelwal et al., 2020, section 3). The
adapter finds the layer that gives it by structure, reads it with a hook and hands it back as a return value. Knows
nothing of datastores, search or mixing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from knnlm.errors import InvalidInput, KeyLayerNotFound, ModelError
from knnlm.tokenization import BosMode, TextTokenizer

KeyKind = Literal["last_ffn_input", "last_hidden", "module_input"]
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class KeyLayer:
    """Where keys come from.

    ``kind``: ``last_ffn_input`` (the tensor that enters the last block's feed-forward network), ``last_hidden`` (the
    final normed state that feeds the LM head), or ``module_input`` (the input of a module named by the user).
    ``module``: that module's name in the model. ``normalized``: whether the tensor is the output of a normalisation.
    """

    kind: KeyKind
    module: str
    normalized: bool


@dataclass(frozen=True)
class ModelFingerprint:
    """xxh3 of the configuration, of the tokenizer, and of all tensors by name as stored in the checkpoint.

    Not of files: a model that was moved or saved again still has the same fingerprint; one with another tensor has not.
    """

    configuration: str
    tokenizer: str
    weights: str


@dataclass(frozen=True)
class ModelOutput:
    """``logits`` [batch, columns, vocabulary] or None where not asked for; ``keys`` [batch, length, dimension]."""

    logits: Tensor | None
    keys: Tensor


class LanguageModel(Protocol):
    """What the rest of knnlm needs of a causal LM."""

    name: str
    key_layer: KeyLayer
    key_dimension: int
    vocabulary_size: int
    context: int
    fingerprint: ModelFingerprint

    @property
    def dtype(self) -> str:
        """In what it computes: float32, float16, bfloat16 or float64."""

    def tokenizer(self, bos: BosMode = "auto", eos: bool = False) -> TextTokenizer:
        """Its tokenizer with special tokens as asked."""

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""

    def forward(
        self,
        tokens: Tensor,
        *,
        logits: bool = True,
        columns: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> ModelOutput:
        """Read ``tokens`` [batch, length] int64 and return logits and keys.

        ``logits`` False runs the model without its head. ``columns`` [c] int64: positions within ``tokens`` whose
        logits are wanted (all if None). ``positions`` [batch, length], ``attention_mask`` (4-D) and ``cache`` serve
        decoding; without them each row is read from position 0.
        """


class HFLanguageModel:
    """Any Hugging Face ``AutoModelForCausalLM``. See :meth:`load`. For one thread at a time: its hook keeps one key."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, key_layer: str = "last_ffn_input", key_module: str | None = None) -> None:
        self.name = name
        self.fingerprint = fingerprint(model, tokenizer)
        self.raw_tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.vocabulary_size = int(self.config.vocab_size)
        self.context = _context_length(self.config)
        self._model = model.eval()
        self._base = model.base_model
        self._extractor, self.key_layer, self.key_dimension = _attach(model, key_layer, key_module)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        key_layer: str = "last_ffn_input",
        key_module: str | None = None,
        attention: str | None = None,
    ) -> HFLanguageModel:
        """Load a model by hub name or local path.

        ``dtype``: float32, float16, bfloat16 or float64; default float32 on a CPU, else the checkpoint's. ``key_layer``:
        ``last_ffn_input`` or ``last_hidden``; ``key_module``: take the input of this module instead. Raises
        :class:`ModelError` if there is no such model, :class:`KeyLayerNotFound` if its structure hides the key layer.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype is not None and dtype not in DTYPES:
            raise InvalidInput("dtype", f"is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
        check_device(device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name), **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(name), dtype="auto", attn_implementation=attention, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise not_loaded("model", name, error) from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            # transformers would fill them with random numbers.
            raise ModelError(f"The model {str(name)!r} can't be loaded: its checkpoint lacks {len(missing)} tensors ({missing[0]}, …).")
        # A path is kept whole, so that a store finds its model from any folder.
        place = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
        adapter = cls(model, tokenizer, name=place, key_layer=key_layer, key_module=key_module)
        wanted = DTYPES[dtype] if dtype else (torch.float32 if device == "cpu" else model.dtype)
        _cast_(model, wanted)
        nn.Module.to(model, device=device)
        return adapter

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return torch.device(self._model.device)

    @property
    def dtype(self) -> str:
        """Name of the dtype that it computes in."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text by the model's own account."""
        said = [self._model.generation_config.eos_token_id, self.config.eos_token_id, self.raw_tokenizer.eos_token_id]
        return frozenset(int(token) for ids in said if ids is not None for token in (ids if isinstance(ids, list) else [ids]))

    @property
    def layers(self) -> int:
        """Number of blocks, each with keys and values of its own in a cache."""
        return int(self.config.num_hidden_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights and buffers in memory; what two modules share counts once."""
        tensors = {t.data_ptr(): t for t in (*self._model.parameters(), *self._model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def attention_window(self) -> int | None:
        """Tokens that the most short-sighted layers look back; None if all of them see the whole text."""
        local = getattr(self.config, "window_size", None) if "local" in getattr(self.config, "attention_layers", ()) else None
        sliding = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and not any("sliding" in kind or "chunked" in kind for kind in kinds):
            sliding = None
        chunk = getattr(self.config, "attention_chunk_size", None)
        windows = [int(size) for size in (local, sliding, chunk) if size]
        return min(windows) if windows else None

    def attention_mask(self, visible: Tensor) -> Tensor:
        """The 4-D mask that this model's attention adds to its scores, from ``visible`` [batch, 1, new, length] bool.

        Eager attention adds a boolean too, which would be silently wrong; SDPA is faster with what it need not convert in
        each layer.
        """
        return torch.zeros(visible.shape, dtype=self._model.dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(self._model.dtype).min
        )

    @property
    def attention(self) -> str:
        """Attention implementation in use (``sdpa``, ``eager``, …)."""
        return str(self.config._attn_implementation)

    def tokenizer(self, bos: BosMode = "auto", eos: bool = False) -> TextTokenizer:
        """The model's tokenizer with special tokens as asked."""
        return TextTokenizer(self.raw_tokenizer, bos, eos)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        *,
        logits: bool = True,
        columns: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> ModelOutput:
        """See :meth:`LanguageModel.forward`. Logits come from the model's own head, never from one re-applied by hand."""
        options: dict[str, Any] = {"use_cache": cache is not None}
        for option, value in (("position_ids", positions), ("attention_mask", attention_mask), ("past_key_values", cache)):
            if value is not None:
                options[option] = value
        if logits:
            out, keys = self.run(input_ids=tokens, logits_to_keep=0 if columns is None else columns, **options)
            return ModelOutput(out.logits, keys)
        with self._extractor.capture() as captured:
            self._base(input_ids=tokens, **options)
        return ModelOutput(None, self._keys(captured, tokens))

    def run(self, *, input_ids: Tensor, **options: Any) -> tuple[Any, Tensor]:
        """Run the Hugging Face model with its own ``options``; its output, and the keys [batch, length, dimension] of ``input_ids``."""
        with self._extractor.capture() as captured:
            out = self._model(input_ids=input_ids, **options)
        return out, self._keys(captured, input_ids)

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model itself."""
        return self._model

    def _keys(self, captured: list[Tensor], tokens: Tensor) -> Tensor:
        return captured[0].reshape(*tokens.shape, self.key_dimension)


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights in place, one by one. Buffers that no checkpoint holds (rotary frequencies) keep their precision."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def check_device(device: str) -> None:
    """Raise :class:`InvalidInput` for a device that torch does not know or that is not there."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise InvalidInput("device", f"is {device!r}, but must be cpu, cuda or cuda:N.")
    if not torch.cuda.is_available():
        raise InvalidInput("device", f"is {device!r}, but torch finds no CUDA device here; use --device cpu.")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise InvalidInput(
            "device", f"is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices here; use cpu, or a lower N."
        )


class KeyExtractor:
    """Reads one tensor of a running model by a hook that is registered once and keeps nothing between calls."""

    def __init__(self) -> None:
        self._captured: list[Tensor] | None = None

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """The list that holds exactly one tensor after a forward pass within the block."""
        captured: list[Tensor] = []
        self._captured = captured
        try:
            yield captured
        finally:
            self._captured = None
        if len(captured) != 1:
            raise ModelError(f"The key layer ran {len(captured)} times in one forward pass; name another module with --key-module.")

    def read_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keep the module's first tensor argument."""
        self._keep(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def read_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keep the module's (first) output."""
        self._keep(output if isinstance(output, Tensor) else output[0])

    def _keep(self, tensor: Tensor) -> None:
        if self._captured is not None:
            self._captured.append(tensor)


def _attach(model: Any, key_layer: str, key_module: str | None) -> tuple[KeyExtractor, KeyLayer, int]:
    extractor = KeyExtractor()
    if key_module is None and key_layer == "last_hidden":
        # OPT's head calls the decoder within its base model, past the base model's own hooks.
        handle_module: nn.Module = getattr(model.base_model, "decoder", model.base_model)
        handle_module.register_forward_hook(extractor.read_output)
        name, kind = _name_of(model, handle_module), key_layer
    elif key_module is not None:
        modules = dict(model.named_modules())
        if key_module not in modules:
            near = [name for name in modules if name.rsplit(".", 1)[-1] == key_module.rsplit(".", 1)[-1]][-3:]
            near = near or difflib.get_close_matches(key_module, modules)
            raise KeyLayerNotFound(f"The model has no module {key_module!r}" + (f"; it has {', '.join(near)}." if near else "."))
        name, kind = key_module, "module_input"
        modules[name].register_forward_pre_hook(extractor.read_input, with_kwargs=True)
    elif key_layer == "last_ffn_input":
        name, kind = find_last_feed_forward(model), key_layer
        model.get_submodule(name).register_forward_pre_hook(extractor.read_input, with_kwargs=True)
    else:
        raise InvalidInput("key_layer", f"is {key_layer!r}, but must be last_ffn_input or last_hidden.")
    dimension, normalized = _probe(model, extractor)
    return extractor, KeyLayer(kind, name, normalized or kind == "last_hidden"), dimension  # type: ignore[arg-type]


def find_last_feed_forward(model: Any) -> str:
    """Name of the module whose input is the key ``last_ffn_input``, found by structure.

    The blocks are the module list with one entry per hidden layer, each with an attention. In the last one, what has
    weight matrices and is no attention is the feed-forward network: one module (``mlp``, a mixture of experts), or
    plain linear layers in the block itself (OPT's ``fc1`` and ``fc2``), of which the first counts. Raises
    :class:`KeyLayerNotFound` where that does not single out one module.
    """
    layers = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and any(map(_is_attention, module[-1].modules()))
    ]
    if len(lists) != 1:
        raise _not_found(model, f"{len(lists)} lists of {layers} blocks with attention")
    list_name, blocks = lists[0]
    candidates = [(n, child) for n, child in blocks[-1].named_children() if _has_matrices(child) and not _holds_attention(child)]
    linear = [entry for entry in candidates if not list(entry[1].children())]
    if len(candidates) > 1 and len(linear) < len(candidates):
        raise _not_found(model, f"{len(candidates)} feed-forward modules in the last block ({', '.join(n for n, _ in candidates)})")
    if not candidates:
        raise _not_found(model, "no feed-forward module in the last block")
    return f"{list_name}.{layers - 1}.{candidates[0][0]}"


def _not_found(model: Any, found: str) -> KeyLayerNotFound:
    return KeyLayerNotFound(
        f"{type(model).__name__} has {found}, so the key layer is not certain; "
        "name the module whose input is the key with --key-module NAME, or use --key-layer last_hidden."
    )


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _holds_attention(module: nn.Module) -> bool:
    return any(map(_is_attention, module.modules()))


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


@torch.inference_mode()
def _probe(model: Any, extractor: KeyExtractor) -> tuple[int, bool]:
    """Key dimension, and whether the key is some normalisation's output, seen in one forward pass over two tokens."""
    norm_outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            norm_outputs.append(output)

    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    handles = [norm.register_forward_hook(keep) for norm in norms]
    try:
        with extractor.capture() as captured:
            model.base_model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    key = captured[0]
    if not key.is_floating_point() or key.numel() != 2 * key.shape[-1]:
        raise KeyLayerNotFound(
            f"The module gives {key.dtype} {list(key.shape)} for 2 tokens, which is no key for each; name another with --key-module NAME."
        )
    return int(key.shape[-1]), any(
        output.numel() == key.numel() and torch.equal(output.flatten(), key.flatten()) for output in norm_outputs
    )


def _context_length(config: Any) -> int:
    for attribute in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(config, attribute, None), int) and length > 0:
            return length
    # Models without learned or limited positions (ALiBi) state no length.
    return 2048


def not_loaded(what: str, name: str | Path, error: Exception) -> ModelError:
    """What to say where the model or tokenizer (``what``) called ``name`` can't be loaded."""
    if str(name).startswith(("/", ".", "~")) and not Path(name).is_dir():
        return ModelError(f"There is no folder {str(name)!r}; name a model on the hub, or the folder of one.")
    reason = str(error).strip().split("\n")[0]
    return ModelError(f"The {what} {str(name)!r} can't be loaded: {reason}")


def fingerprint(model: Any, tokenizer: Any) -> ModelFingerprint:
    """Fingerprint of a model as loaded from its checkpoint (before any change of dtype) and of its fast tokenizer."""
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return ModelFingerprint(_config_fingerprint(model.config), tokenizer_fingerprint(tokenizer), weights.hexdigest())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer as loaded: of its JSON and special ids, or of its vocabulary where it has no JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = _without_settings(backend.to_str()) if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    specials = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id])
    return _digest(said + specials)


def _without_settings(tokenizer: str) -> str:
    """A tokenizer's JSON less its truncation and padding, which each use may change and TextTokenizer never applies."""
    return json.dumps({**json.loads(tokenizer), "truncation": None, "padding": None}, sort_keys=True)


def _config_fingerprint(config: Any) -> str:
    """Of what defines the model's function; not of where it lay, which version wrote it, or in what dtype it runs."""
    incidental = {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "_attn_implementation",
        "attn_implementation",
    }

    def essential(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): essential(v) for k, v in value.items() if k not in incidental}
        return [essential(v) for v in value] if isinstance(value, list | tuple) else value

    return _digest(json.dumps(essential(config.to_dict()), sort_keys=True, default=str))


def _digest(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()

"""Which models are served: those whose decoding in a batch equals reading alone, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from knnlm.errors import ModelError
from knnlm.model import HFLanguageModel
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings
from knnlm_server import serving_check
from knnlm_server.engine_opening import build_async_engine
from knnlm_server.serving_check import batched_key_error, check_servable
from tests.engine.harness import Quiet
from tests.tiny import save, tiny_gpt2, tiny_tokenizer

CONTEXT = 64
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
    "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
HEADS_OF_8: dict[str, Any] = {**GROUPED, "head_dim": 8}
OPT_SIZES: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
OLD_NAMES: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEO_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

SERVED: dict[str, Any] = {
    "gpt2": tf.GPT2Config(**OLD_NAMES),
    "opt": tf.OPTConfig(**OPT_SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "opt post-norm": tf.OPTConfig(**OPT_SIZES, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt-neox": tf.GPTNeoXConfig(**SIZES),
    "gpt-j": tf.GPTJConfig(**OLD_NAMES, rotary_dim=4),
    "llama": tf.LlamaConfig(**GROUPED),
    "mistral": tf.MistralConfig(**GROUPED, sliding_window=None),
    "mistral with a window beyond the context": tf.MistralConfig(**GROUPED, sliding_window=4096),
    "qwen2": tf.Qwen2Config(**GROUPED),
    "qwen3": tf.Qwen3Config(**HEADS_OF_8),
    "phi": tf.PhiConfig(**SIZES),
    "phi3": tf.Phi3Config(**GROUPED),
    "gemma": tf.GemmaConfig(**HEADS_OF_8),
    "gemma2": tf.Gemma2Config(**HEADS_OF_8, sliding_window=4096),
    "gemma3": tf.Gemma3TextConfig(**HEADS_OF_8, sliding_window=4096),
    "glm": tf.GlmConfig(**HEADS_OF_8),
    "olmo2": tf.Olmo2Config(**SIZES),
    "mixtral": tf.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "qwen2-moe": tf.Qwen2MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2
    ),
    "qwen3-moe": tf.Qwen3MoeConfig(**HEADS_OF_8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}  # fmt: skip

REFUSED: dict[str, tuple[Any, str]] = {
    # Its attention cuts a triangle of its own from the place of a token in the pass, which is not that of every row.
    "gpt-neo without local layers": (tf.GPTNeoConfig(**NEO_SIZES, attention_types=[[["global"], 2]]), "gpt_neo"),
    "gpt-neo with local layers": (tf.GPTNeoConfig(**NEO_SIZES, attention_types=[[["global", "local"], 1]], window_size=8), "gpt_neo"),
    "bloom": (tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "bloom"),
    "mistral with a window": (tf.MistralConfig(**GROUPED, sliding_window=8), "mistral"),
    "gemma2 with a window": (tf.Gemma2Config(**HEADS_OF_8, sliding_window=8), "gemma2"),
    "gemma3 with a window": (tf.Gemma3TextConfig(**HEADS_OF_8, sliding_window=8), "gemma3"),
    "mamba": (tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "mamba"),
    "rwkv": (tf.RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=CONTEXT), "rwkv"),
}


def adapter(config: Any, key_layer: str = "last_ffn_input") -> HFLanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights of the usual 0.02 make attention so flat that a wrong mask hardly shows.
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return HFLanguageModel(model, tiny_tokenizer(), name="tiny", key_layer=key_layer)


@pytest.mark.parametrize("family", SERVED)
def test_families_whose_batches_equal_each_row_alone_are_served(family: str) -> None:
    model = adapter(SERVED[family])
    check_servable(model, CONTEXT)
    assert batched_key_error(model) < 2e-5


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_a_slot_cache_would_get_wrong_are_refused_by_name(family: str) -> None:
    config, name = REFUSED[family]
    model = adapter(config, "last_hidden")
    with pytest.raises(ModelError, match=rf"\b{name}") as caught:
        check_servable(model, CONTEXT)
    assert any(way in str(caught.value) for way in ("--max-context", "Building and comparing work with it")), "the message says what to do"


def test_a_model_with_a_window_is_served_up_to_it() -> None:
    model = adapter(tf.MistralConfig(**GROUPED, sliding_window=16))
    check_servable(model, 16)
    with pytest.raises(ModelError, match="--max-context 16"):
        check_servable(model, 17)


def test_a_wrong_mask_is_found_by_the_check_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at configurations, the comparison of keys still finds a row that sees what it must not."""
    model = adapter(SERVED["llama"])
    monkeypatch.setattr(HFLanguageModel, "attention_mask", lambda self, visible: torch.ones_like(visible))
    assert batched_key_error(model) > 1e-3
    with pytest.raises(ModelError, match="llama can't be served: its keys in a batch differ"):
        check_servable(model, CONTEXT)


def test_keys_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_check, "batched_key_error", lambda model: float("nan"))
    with pytest.raises(ModelError, match="differ"):
        check_servable(adapter(SERVED["gpt2"]), CONTEXT)


def test_positions_matter_to_the_check() -> None:
    """GPT-2 with positions that all rows share would be wrong for every row but one; the check must see it."""
    model = adapter(SERVED["gpt2"])
    forward = model.forward

    def shared_positions(tokens: torch.Tensor, **options: Any) -> Any:
        if options.get("positions") is not None:
            options["positions"] = options["positions"].clone().clamp_(max=2)
        return forward(tokens, **options)

    model.forward = shared_positions  # type: ignore[method-assign]
    assert batched_key_error(model) > 1e-3


@pytest.fixture(scope="module")
def windowed_store(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model looks back only 16 tokens."""
    folder = tmp_path_factory.mktemp("windowed")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tf.MistralConfig(**{**GROUPED, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}, sliding_window=16), dtype=torch.float32
    )
    path = save(model, tiny_tokenizer(), folder / "model")
    build_datastore([corpus_folder], folder / "store", HFLanguageModel.load(path), BuildSettings(index="exact", keys="float32"), Quiet())
    return folder / "store"


def test_an_unproven_model_is_served_only_when_told_to(windowed_store: Path) -> None:
    with pytest.raises(ModelError, match="--max-context 16"):
        build_async_engine({"default": windowed_store})
    assert build_async_engine({"default": windowed_store}, context=16).info.limits.context == 16
    unproven = build_async_engine({"default": windowed_store}, allow_unproven=True)
    assert unproven.info.limits.context == CONTEXT
    assert unproven.info.model == "model"  # not where it lies
    unproven.start()
    unproven.stop()


def test_the_tiny_models_of_these_tests_are_servable(tiny_gpt2_path: Path, tiny_llama_path: Path) -> None:
    for path in (tiny_gpt2_path, tiny_llama_path):
        for dtype, most in (("float64", 1e-12), ("float32", 2e-5), ("bfloat16", 0.1)):
            model = HFLanguageModel.load(path, dtype=dtype)
            check_servable(model, model.context)
            assert batched_key_error(model) < most


def test_other_attention_kernels_are_refused_by_name() -> None:
    model = HFLanguageModel(tiny_gpt2(), tiny_tokenizer(), name="tiny")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="gpt2 can't be served with flex_attention"):
        check_servable(model, CONTEXT)

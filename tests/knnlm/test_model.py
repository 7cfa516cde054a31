"""The model adapter: for each family the key is what the architecture says, and a model is known by what it computes."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from knnlm.errors import InvalidInput, KeyLayerNotFound, ModelError
from knnlm.model import HFLanguageModel, KeyLayer, find_last_feed_forward, fingerprint
from tests.tiny import save, tiny_corpus, tiny_gpt2, tiny_llama, tiny_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED: dict[str, Any] = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**GATED, "num_experts_per_tok": 2}
CONFIGURATIONS: dict[str, Any] = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, attention_types=[[["global", "local"], 1]]
    ),
    "opt": lambda: tf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "opt_post_norm": lambda: tf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt_neox_serial": lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=48, use_parallel_residual=False),
    "gptj": lambda: tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "llama": lambda: tf.LlamaConfig(**GATED),
    "mistral": lambda: tf.MistralConfig(**GATED),
    "qwen2": lambda: tf.Qwen2Config(**GATED),
    "qwen3": lambda: tf.Qwen3Config(**GATED, head_dim=8),
    "phi": lambda: tf.PhiConfig(**GATED),
    "gemma": lambda: tf.GemmaConfig(**GATED, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**GATED, head_dim=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**GATED, head_dim=8),
    "glm": lambda: tf.GlmConfig(**GATED, head_dim=8, pad_token_id=0),
    "glm4": lambda: tf.Glm4Config(**GATED, head_dim=8, pad_token_id=0),
    "bloom": lambda: tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mixtral": lambda: tf.MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**{**EXPERTS, "head_dim": 8}, num_experts=4, moe_intermediate_size=16),
    "olmo2": lambda: tf.Olmo2Config(**GATED),
}
# What enters the last feed-forward network is the output of this norm, read off each architecture's paper and code ...
NORM_BEFORE_FEED_FORWARD = {
    "gpt2": "transformer.h.1.ln_2",
    "gpt_neo": "transformer.h.1.ln_2",
    "opt": "model.decoder.layers.1.final_layer_norm",
    "opt_post_norm": "model.decoder.layers.1.self_attn_layer_norm",
    "gpt_neox": "gpt_neox.layers.1.post_attention_layernorm",
    "gpt_neox_serial": "gpt_neox.layers.1.post_attention_layernorm",
    "gptj": "transformer.h.1.ln_1",
    "llama": "model.layers.1.post_attention_layernorm",
    "mistral": "model.layers.1.post_attention_layernorm",
    "qwen2": "model.layers.1.post_attention_layernorm",
    "qwen3": "model.layers.1.post_attention_layernorm",
    "phi": "model.layers.1.input_layernorm",
    "gemma": "model.layers.1.post_attention_layernorm",
    "gemma2": "model.layers.1.pre_feedforward_layernorm",
    "gemma3": "model.layers.1.pre_feedforward_layernorm",
    "glm": "model.layers.1.post_attention_layernorm",
    "glm4": "model.layers.1.post_attention_layernorm",
    "bloom": "transformer.h.1.post_attention_layernorm",
    "mixtral": "model.layers.1.post_attention_layernorm",
    "qwen2_moe": "model.layers.1.post_attention_layernorm",
    "qwen3_moe": "model.layers.1.post_attention_layernorm",
}
# ... but here, where norms come after attention and MLP, it is the residual stream itself: not normalised.
UNNORMALISED = {"olmo2": ("model.layers.1", "model.layers.1.post_attention_layernorm")}
SOFT_CAPPED = {"gemma2"}
FAMILIES = sorted(CONFIGURATIONS)
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])


@cache
def hf_model(family: str) -> Any:
    """A random model whose norms and biases are not the identity, so that before and after a norm differ."""
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(CONFIGURATIONS[family]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def adapter(family: str, key_layer: str = "last_ffn_input") -> HFLanguageModel:
    return HFLanguageModel(hf_model(family), tiny_tokenizer(), name=family, key_layer=key_layer)


def watched(model: Any, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """A full forward pass of transformers itself, with the inputs and outputs of the modules named."""
    seen: dict[str, Tensor] = {}

    def keep_input(name: str) -> Any:
        return lambda _m, args, kwargs: seen.update({name: (args[0] if args else kwargs["hidden_states"]).clone()})

    def keep_output(name: str) -> Any:
        return lambda _m, _a, out: seen.update({name: out.clone()})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep_input(name), with_kwargs=True) for name in inputs]
    handles += [model.get_submodule(name).register_forward_hook(keep_output(name)) for name in outputs]
    try:
        with torch.inference_mode():
            return model(input_ids=IDS), seen
    finally:
        for handle in handles:
            handle.remove()


def expected_key(family: str) -> tuple[Tensor, Tensor]:
    """The key of an independent forward pass, and its logits."""
    if family in UNNORMALISED:
        block, norm = UNNORMALISED[family]
        out, seen = watched(hf_model(family), inputs=(block,), outputs=(norm,))
        return seen[block] + seen[norm], out.logits
    norm = NORM_BEFORE_FEED_FORWARD[family]
    out, seen = watched(hf_model(family), outputs=(norm,))
    return seen[norm].reshape(*IDS.shape, -1), out.logits


def test_every_family_that_is_promised_is_tested() -> None:
    assert set(FAMILIES) == set(NORM_BEFORE_FEED_FORWARD) | set(UNNORMALISED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_is_what_enters_the_last_feed_forward_network(family: str) -> None:
    key, logits = expected_key(family)
    out = adapter(family).forward(IDS)
    assert out.keys.shape == (*IDS.shape, adapter(family).key_dimension)
    torch.testing.assert_close(out.keys, key, rtol=1e-6, atol=1e-6)
    assert out.logits is not None
    torch.testing.assert_close(out.logits, logits, rtol=1e-6, atol=1e-6)
    assert out.keys.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_layer_is_described(family: str) -> None:
    model = adapter(family)
    assert model.key_layer.kind == "last_ffn_input"
    assert model.key_layer.normalized == (family not in UNNORMALISED)
    assert ".1." in model.key_layer.module
    assert model.key_layer.module == find_last_feed_forward(hf_model(family))
    assert (model.key_dimension, model.vocabulary_size) == (32, 64)
    assert model.context == (2048 if family == "bloom" else 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_head_the_keys_are_the_same(family: str) -> None:
    out = adapter(family).forward(IDS, logits=False)
    assert out.logits is None
    assert torch.equal(out.keys, adapter(family).forward(IDS).keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("columns", [[5], [0, 3], [4, 1], list(range(6))])
def test_columns_pick_the_logits_and_leave_the_keys(family: str, columns: list[int]) -> None:
    full, some = adapter(family).forward(IDS), adapter(family).forward(IDS, columns=torch.tensor(columns))
    assert full.logits is not None
    assert some.logits is not None
    torch.testing.assert_close(some.logits, full.logits[:, columns], rtol=1e-5, atol=1e-5)
    assert torch.equal(some.keys, full.keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_is_what_the_head_reads(family: str) -> None:
    model = adapter(family, "last_hidden")
    assert (model.key_layer.kind, model.key_layer.normalized) == ("last_hidden", True)
    out = model.forward(IDS)
    assert out.logits is not None
    assert out.keys.shape[-1] == model.key_dimension == (16 if family == "opt_post_norm" else 32)
    if family not in SOFT_CAPPED:
        with torch.inference_mode():
            torch.testing.assert_close(hf_model(family).get_output_embeddings()(out.keys), out.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_has_the_key_that_it_has_alone(family: str) -> None:
    both, alone = adapter(family).forward(IDS), adapter(family).forward(IDS[1:])
    torch.testing.assert_close(both.keys[1:], alone.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_a_cache_gives_the_keys_of_the_whole(family: str) -> None:
    model, kept = adapter(family), tf.DynamicCache()
    first, second = model.forward(IDS[:, :4], cache=kept), model.forward(IDS[:, 4:], cache=kept)
    torch.testing.assert_close(torch.cat([first.keys, second.keys], 1), model.forward(IDS).keys, rtol=1e-5, atol=1e-5)


@cache
def mamba() -> Any:
    return tf.AutoModelForCausalLM.from_config(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)).eval()


def test_a_model_without_feed_forward_network_says_which_option_helps() -> None:
    with pytest.raises(KeyLayerNotFound, match=r"MambaForCausalLM.*--key-module NAME.*--key-layer last_hidden"):
        HFLanguageModel(mamba(), tiny_tokenizer(), name="mamba")
    assert HFLanguageModel(mamba(), tiny_tokenizer(), name="mamba", key_layer="last_hidden").forward(IDS).keys.shape == (2, 6, 32)
    named = HFLanguageModel(mamba(), tiny_tokenizer(), name="mamba", key_module="backbone.layers.1.mixer")
    assert named.forward(IDS).keys.shape == (2, 6, 32)


def test_a_module_that_is_named_gives_its_input() -> None:
    model = HFLanguageModel(hf_model("gpt2"), tiny_tokenizer(), name="x", key_module="transformer.h.0.mlp")
    assert model.key_layer == KeyLayer("module_input", "transformer.h.0.mlp", True)
    _, seen = watched(hf_model("gpt2"), outputs=("transformer.h.0.ln_2",))
    torch.testing.assert_close(model.forward(IDS).keys, seen["transformer.h.0.ln_2"])
    raw = HFLanguageModel(hf_model("gpt2"), tiny_tokenizer(), name="x", key_module="transformer.h.1.ln_2")
    assert not raw.key_layer.normalized


@pytest.mark.parametrize("wrong", ["h.1.mlp", "transformer.h.1.mpl", "transformer.h.9.mlp", "Transformer.h.1.mlp"])
def test_a_module_that_is_not_there_is_refused_with_near_names(wrong: str) -> None:
    with pytest.raises(KeyLayerNotFound, match=r"transformer\.h\.1\.mlp") as refused:
        HFLanguageModel(hf_model("gpt2"), tiny_tokenizer(), name="x", key_module=wrong)
    assert repr(wrong) in str(refused.value)


@pytest.mark.parametrize("module", ["", "transformer", "transformer.wte", "transformer.h", "lm_head", "transformer.wpe"])
def test_modules_whose_input_is_no_key_are_refused_in_words(module: str) -> None:
    with pytest.raises(ModelError, match="--key-module"):
        HFLanguageModel(hf_model("gpt2"), tiny_tokenizer(), name="x", key_module=module)


def test_an_unknown_key_layer_is_refused_by_field() -> None:
    with pytest.raises(InvalidInput, match="last_ffn_input or last_hidden") as refused:
        HFLanguageModel(hf_model("gpt2"), tiny_tokenizer(), name="x", key_layer="first")
    assert refused.value.field == "key_layer"


def test_reading_keys_leaves_no_hook_behind_that_changes_the_model() -> None:
    before = hf_model("gpt2")(input_ids=IDS).logits
    adapter("gpt2").forward(IDS)
    assert torch.equal(hf_model("gpt2")(input_ids=IDS).logits, before)


# Loading, dtype and device


def test_a_checkpoint_is_loaded_as_it_was_saved(tiny_gpt2_path: Path, tiny_llama_path: Path) -> None:
    for path, made in ((tiny_gpt2_path, tiny_gpt2()), (tiny_llama_path, tiny_llama())):
        model = HFLanguageModel.load(path)
        out = model.forward(IDS)
        assert out.logits is not None
        torch.testing.assert_close(out.logits, made(input_ids=IDS).logits)
        assert (model.name, model.context, model.vocabulary_size, model.device.type, model.dtype) == (str(path), 64, 300, "cpu", "float32")
        assert not out.logits.requires_grad


@pytest.fixture(scope="module")
def half_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama().half(), tiny_tokenizer(adds_bos=True), tmp_path_factory.mktemp("half"))


def test_a_float16_checkpoint_runs_in_float32_on_a_cpu_unless_told_otherwise(half_path: Path) -> None:
    default = HFLanguageModel.load(half_path)
    assert default.dtype == "float32"
    assert default.forward(IDS).keys.dtype == torch.float32
    for dtype in ("float16", "bfloat16", "float64"):
        other = HFLanguageModel.load(half_path, dtype=dtype)
        assert other.dtype == dtype
        assert other.fingerprint == default.fingerprint
        torch.testing.assert_close(other.forward(IDS).keys.float(), default.forward(IDS).keys, rtol=0.1, atol=0.1)


def test_float64_is_computed_in_float64(tiny_gpt2_path: Path) -> None:
    keys = HFLanguageModel.load(tiny_gpt2_path, dtype="float64").forward(IDS).keys
    assert keys.dtype == torch.float64
    assert not torch.equal(keys, keys.float().double())


def test_attention_is_chosen_and_changes_no_fingerprint(tiny_llama_path: Path) -> None:
    eager, default = HFLanguageModel.load(tiny_llama_path, attention="eager"), HFLanguageModel.load(tiny_llama_path)
    assert (eager.attention, default.attention) == ("eager", "sdpa")
    assert eager.fingerprint == default.fingerprint
    torch.testing.assert_close(eager.forward(IDS).keys, default.forward(IDS).keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "half", "torch.float32", ""])
def test_an_unknown_dtype_is_refused_by_field(tiny_gpt2_path: Path, dtype: str) -> None:
    with pytest.raises(InvalidInput, match="float32") as refused:
        HFLanguageModel.load(tiny_gpt2_path, dtype=dtype)
    assert refused.value.field == "dtype"


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", "mps", "cpu:0", "cuda:x", "tpu"])
def test_a_device_that_is_not_there_is_refused_by_field(tiny_gpt2_path: Path, device: str) -> None:
    with pytest.raises(InvalidInput, match="cpu") as refused:
        HFLanguageModel.load(tiny_gpt2_path, device=device)
    assert refused.value.field == "device"
    assert repr(device) in str(refused.value)


def damaged(source: Path, folder: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(source, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["nowhere", "no-such/model-at-all", "../x y"])
def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, name: str) -> None:
    for place in (name, str(tmp_path / name)):
        with pytest.raises(ModelError) as refused:
            HFLanguageModel.load(place)
        assert repr(place) in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", None), ("config.json", b"{"), ("config.json", b"{}"), ("model.safetensors", None), ("model.safetensors", b"\0" * 100),
     ("model.safetensors", b""), ("tokenizer.json", None), ("tokenizer.json", b"{}"), ("tokenizer.json", b"{")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, tiny_gpt2_path: Path, file: str, content: bytes | None) -> None:
    path = damaged(tiny_gpt2_path, tmp_path / "model", file, content)
    with pytest.raises(ModelError, match=str(path)) as refused:
        HFLanguageModel.load(path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_cut_short_or_lack_a_tensor_are_refused(tmp_path: Path, tiny_gpt2_path: Path) -> None:
    content = (tiny_gpt2_path / "model.safetensors").read_bytes()
    with pytest.raises(ModelError):
        HFLanguageModel.load(damaged(tiny_gpt2_path, tmp_path / "cut", "model.safetensors", content[: len(content) // 2]))
    from safetensors.torch import load, save_file

    tensors = load(content)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    path = damaged(tiny_gpt2_path, tmp_path / "lacking", "model.safetensors", None)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight"):
        HFLanguageModel.load(path)


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tmp_path: Path, tiny_gpt2_path: Path) -> None:
    path = shutil.copytree(tiny_gpt2_path, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "surprise"
    config["auto_map"] = {"AutoConfig": "surprise.Config", "AutoModelForCausalLM": "surprise.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "surprise.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        HFLanguageModel.load(path)
    assert not (tmp_path / "ran").exists()


# Fingerprints


def test_moved_or_saved_again_it_is_the_same_model(tmp_path: Path, tiny_gpt2_path: Path, tiny_llama_path: Path) -> None:
    for path in (tiny_gpt2_path, tiny_llama_path):
        original = HFLanguageModel.load(path)
        loaded = tf.AutoModelForCausalLM.from_pretrained(path)
        tokenizer = tf.AutoTokenizer.from_pretrained(path)
        again = save(loaded, tokenizer, tmp_path / path.name / "again")
        shards = save(loaded, tokenizer, tmp_path / path.name / "shards", max_shard_size="20KB")
        assert len(list(shards.glob("*.safetensors"))) > 1
        moved = shutil.copytree(path, tmp_path / path.name / "moved")
        for other in (again, shards, moved):
            assert HFLanguageModel.load(other).fingerprint == original.fingerprint


def test_one_changed_weight_is_another_model(tmp_path: Path, tiny_gpt2_path: Path) -> None:
    original = HFLanguageModel.load(tiny_gpt2_path).fingerprint
    model = tiny_gpt2()
    with torch.no_grad():
        model.get_parameter("transformer.h.0.attn.c_attn.weight")[3, 4] += 1e-3
    changed = HFLanguageModel.load(save(model, tiny_tokenizer(), tmp_path / "changed")).fingerprint
    assert changed.weights != original.weights
    assert (changed.configuration, changed.tokenizer) == (original.configuration, original.tokenizer)


def test_another_dtype_of_the_checkpoint_is_another_model(half_path: Path, tiny_llama_path: Path) -> None:
    assert HFLanguageModel.load(half_path).fingerprint.weights != HFLanguageModel.load(tiny_llama_path).fingerprint.weights


def test_another_configuration_of_equal_shapes_is_another_model(tmp_path: Path, tiny_llama_path: Path) -> None:
    path = shutil.copytree(tiny_llama_path, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    original, changed = (HFLanguageModel.load(p).fingerprint for p in (tiny_llama_path, path))
    assert changed.configuration != original.configuration
    assert changed.weights == original.weights


def test_another_tokenizer_is_another_model(tmp_path: Path, tiny_gpt2_path: Path, tiny_gpt2_bos_path: Path) -> None:
    original, other = (HFLanguageModel.load(path).fingerprint for path in (tiny_gpt2_path, tiny_gpt2_bos_path))
    assert other.tokenizer != original.tokenizer
    assert (other.weights, other.configuration) == (original.weights, original.configuration)
    bigger = tiny_tokenizer()
    bigger.add_tokens(["<extra>"])
    assert fingerprint(tiny_gpt2(), bigger).tokenizer != original.tokenizer


def test_using_a_tokenizer_changes_no_fingerprint() -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    before = fingerprint(model, tokenizer)
    tokenizer(tiny_corpus(3), truncation=True, max_length=5, padding="max_length")
    assert fingerprint(model, tokenizer) == before


def test_two_families_never_share_a_fingerprint() -> None:
    assert len({adapter(family).fingerprint.configuration for family in FAMILIES}) == len(FAMILIES)

"""Tiny models, tokenizers and texts that the tests make for themselves: nothing is downloaded, every seed is fixed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    # Seconds to import, which processes that have a fake model do without.
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 300
CONTEXT = 64
HIDDEN = 32

_SUBJECTS = ("The farmer", "A sailor", "Our teacher", "The old king", "My neighbour", "The engineer", "A young doctor", "The miller")
_VERBS = ("carried", "sold", "found", "repaired", "counted", "painted", "forgot", "described")
_OBJECTS = ("a wooden boat", "seven apples", "the broken clock", "an iron bridge", "the long letter", "two grey horses", "the last map")
_PLACES = ("near the river", "in the village", "behind the mill", "on the market", "before sunrise", "after the storm", "without a word")


def tiny_corpus(n_documents: int, seed: int = 0) -> list[str]:
    """English-like documents of 2 to 9 sentences in lines, with repetitions that a datastore can find again."""
    chance = random.Random(seed)
    documents = []
    for number in range(n_documents):
        lines = [
            f"{chance.choice(_SUBJECTS)} {chance.choice(_VERBS)} {chance.choice(_OBJECTS)} {chance.choice(_PLACES)}."
            for _ in range(chance.randint(2, 9))
        ]
        documents.append(f"Story {number}\n" + "\n".join(lines) + "\n")
    return documents


def tiny_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; with ``adds_bos`` its post-processor puts ``<|endoftext|>`` in front by itself."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(tiny_corpus(200, seed=1), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    assert len(fast) == VOCABULARY
    return fast


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words with a leading ▁, and bytes for every character that it does not know."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2's structure: learned positions, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.eval()
    return model


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """LLaMA's structure: rotary positions, grouped heads, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def save(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    """Save both as a Hugging Face checkpoint and return the folder."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder

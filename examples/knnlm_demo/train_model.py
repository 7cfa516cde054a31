"""Train the demo's language model: ``python -m knnlm_demo.train_model --output examples/knnlm_demo/model``.

A LLaMA-shaped model of 5.3 M parameters with a byte-level BPE of 6,144 tokens learns from the standard library's
sources, without any text of the demo's datastore or held-out documents (:mod:`knnlm_demo.documents`). Deterministic:
two threads, one seed, the documents in a seeded order; another Python version has other sources and so another model.
Hidden matrices are trained by Muon (Jordan et al., 2024), embeddings and norms by AdamW. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knnlm_demo.documents import Document, training_documents

CONTEXT = 512
VOCABULARY = 6144
BATCH = 8
SEED = 0
THREADS = 2
END = "<|endoftext|>"
VALIDATION_ONE_IN = 40


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; each text begins with ``<|endoftext|>``, added by the tokenizer itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False)


def new_model() -> LlamaForCausalLM:
    """The untrained model, from the project's seed."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[list[int]]:
    """Token ids of each document, the leading ``<|endoftext|>`` included."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])]


def blocks(stream: list[list[int]], shuffle: random.Random | None) -> torch.Tensor:
    """Documents joined (in a new order per epoch if ``shuffle``) and cut into rows of CONTEXT + 1 tokens."""
    order = list(range(len(stream)))
    if shuffle:
        shuffle.shuffle(order)
    flat = torch.tensor([token for index in order for token in stream[index]])
    offset = shuffle.randrange(CONTEXT) if shuffle else 0
    count = (len(flat) - offset - 1) // CONTEXT
    return torch.stack([flat[offset + i * CONTEXT : offset + (i + 1) * CONTEXT + 1] for i in range(count)])


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats over all targets of the validation rows."""
    losses = [token_losses(model, batch).mean() * len(batch) for batch in rows.split(BATCH)]
    return float(sum(losses) / len(rows))


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each target of ``rows`` [n, CONTEXT + 1], flat."""
    logits = model(input_ids=rows[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


def train(steps: int, output: Path) -> None:
    """Train for ``steps`` optimizer steps and write the model to ``output`` every 500 steps and at the end."""
    torch.set_num_threads(THREADS)
    documents = list(training_documents())
    training = [d for d in documents if zlib.crc32(d.name.split(":")[0].encode()) % VALIDATION_ONE_IN]
    validation = [d for d in documents if d not in training and ":" not in d.name]
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    validation_rows = blocks(token_stream(tokenizer, validation), None)
    model = new_model()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=6e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 50, 1 - step / steps)) for o in optimizers]
    shuffle = random.Random(SEED)
    rows, log, started = blocks(stream, shuffle), [], time.time()
    tokens_an_epoch, used, epoch = rows[:, 1:].numel(), 0, 1
    for step in range(1, steps + 1):
        if used + BATCH > len(rows):
            rows, used, epoch = blocks(stream, shuffle), 0, epoch + 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_losses(model, rows[used : used + BATCH]).mean()
        used += BATCH
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(
                f"step {step}/{steps} epoch {epoch} loss {loss.item():.3f} {step * BATCH * CONTEXT / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            log.append({"step": step, "validation_loss": validation_loss(model, validation_rows)})
            print(log[-1], flush=True)
            save(
                model,
                tokenizer,
                output,
                steps=step,
                epoch_tokens=tokens_an_epoch,
                validation_tokens=validation_rows[:, 1:].numel(),
                log=log,
            )


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    *,
    steps: int,
    epoch_tokens: int,
    validation_tokens: int,
    log: list[dict[str, float]],
) -> None:
    """Write weights (float16 safetensors), tokenizer, ``training.json`` and the model card."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_per_step": BATCH * CONTEXT,
        "tokens_per_epoch": epoch_tokens,
        "validation_tokens": validation_tokens,
        "validation_perplexity": round(math.exp(log[-1]["validation_loss"]), 2),
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "README.md").write_text(
        CARD.format(
            **facts, epochs=steps * BATCH * CONTEXT / epoch_tokens, context=CONTEXT, vocabulary=VOCABULARY, one_in=VALIDATION_ONE_IN
        )
    )


CARD = """# The demo's language model

A causal LM for `knnlm demo`, small enough to ship with the package. Not for any other use.

- **Architecture**: LLaMA (RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings), 5 layers, width 256, context
  {context}, {parameters:,} parameters in float16.
- **Tokenizer**: byte-level BPE of {vocabulary:,} tokens, trained on the same text; a text begins with `<|endoftext|>`.
- **Training text**: sources of the CPython {python} standard library, and their docstrings once more as prose. No tests,
  no module of the demo's datastore or held-out documents, not the language reference (`knnlm_demo/documents.py` has the
  lists).
- **Steps**: {steps:,} of {tokens_per_step:,} tokens, {epochs:.1f} epochs of {tokens_per_epoch:,} tokens; Muon and AdamW,
  bfloat16 autocast.
- **Validation perplexity**: **{validation_perplexity}** over {validation_tokens:,} tokens of source files held out of
  training (one file in {one_in}).
- **Made by**: `python -m knnlm_demo.train_model --output MODEL`, torch {torch}, two threads, seeded. `training.json` has
  the validation losses along the way.

The training text is part of CPython, under the Python Software Foundation License 2.0.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and model card")
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps of 4,096 tokens (default 2600)")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.output)

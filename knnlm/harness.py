"""A kNN-LM as a model of EleutherAI's lm-evaluation-harness (extra ``harness``), by its ``LM`` interface.

::

    from lm_eval import simple_evaluate
    from knnlm.harness import KNNLM

    simple_evaluate(model=KNNLM("store/"), tasks=["wikitext"])

From the command line, ``python -m knnlm.harness`` is ``lm_eval`` that knows the model ``knnlm``, since the harness looks for
models nowhere but in itself: ``python -m knnlm.harness run --model knnlm --model_args store=store/ --tasks wikitext``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from knnlm.errors import InvalidInput, MissingDependency
from knnlm.evaluation.scoring import read_windows, score
from knnlm.generation import generate_tokens
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.sampling import SamplingParams
from knnlm.tokenization import IncrementalDetokenizer
from knnlm.windows import Window

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependency('knnlm.harness needs lm-evaluation-harness; install it with: pip install "knnlm[harness]"') from error

HarnessWindows = Literal["harness", "knnlm"]
SAMPLING_FIELDS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed"})
HARNESS_DEVICE = "cuda:0"

log = logging.getLogger(__name__)


@register_model("knnlm")
class KNNLM(TemplateLM):  # type: ignore[misc]
    """An opened kNN-LM, or the store at a path with the options of :func:`knnlm.open_store` (``k``, ``weight``, ``device``, …).

    Tokens are as in the datastore: text gets BOS where its documents have it. ``windows`` of ``loglikelihood_rolling``:
    ``harness`` cuts a text as the harness does for every model (disjoint pieces of the model's context); ``knnlm`` as the
    store was built, so that sums are those of ``knnlm compare`` (the first token of a text is no target there). Contexts that
    are too long lose their beginning, as in the harness's own models, and a warning counts them. Sequences of one length
    share a forward pass of up to ``batch_tokens`` tokens; the harness's ``batch_size`` can be 1 (its default) or ``auto``,
    which both mean that. Generation goes one by one.
    """

    def __init__(
        self,
        store: str | Path | OpenedKNNLM,
        *,
        windows: HarnessWindows = "harness",
        batch_tokens: int = 2048,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if windows not in ("harness", "knnlm"):
            raise InvalidInput("windows", f"is {windows!r}, but must be harness or knnlm.")
        if batch_size not in (1, "1", "auto"):
            raise InvalidInput("batch_size", f"is {batch_size!r}, but batches are counted in tokens; give batch_tokens instead.")
        if isinstance(store, OpenedKNNLM) and options:
            raise InvalidInput(next(iter(options)), "is given, but the store is open already; give it to open_store.")
        if options.get("device") == HARNESS_DEVICE and not torch.cuda.is_available():
            log.warning("there is no CUDA device, which the harness takes if --device is not given; running on the CPU")
            options["device"] = "cpu"
        self.opened = store if isinstance(store, OpenedKNNLM) else open_store(store, **options)
        self.knn_lm, self.max_length = self.opened.knn_lm, self.opened.model.context
        self.tokenizer = self.opened.model.raw_tokenizer
        self.max_gen_toks, self._windows, self._batch_tokens = max_gen_toks, windows, batch_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise InvalidInput("tokenizer", "has no EOS token, which the harness needs.")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS for tokenizers without it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Which tokenizer a cache of requests belongs to."""
        return f"{self.opened.model.name}-{self.opened.model.fingerprint.tokenizer}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; BOS in front where the datastore's documents have it, unless it is there already or not wanted."""
        ids, bos = self.knn_lm.tokenizer.encode_plain(string), self.knn_lm.tokenizer.bos_id
        return ids if bos is None or add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's own template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = sum(len(context) + len(continuation) - 1 > self.max_length for _, context, continuation in requests)
        if cut:
            log.warning("%d contexts were cut at their beginning to the %d tokens that the model reads", cut, self.max_length)
        found = self._scored([(context, continuation) for _, context, continuation in requests], disable_tqdm=disable_tqdm)
        for (request, _, _), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as chosen."""
        texts = [request.args[0] for request in requests]
        totals = self._in_our_windows(texts) if self._windows == "knnlm" else self._in_harness_windows(texts, disable_tqdm)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop string, the model's end of text, or so many tokens."""
        answers = []
        for context, options in _progress((request.args for request in requests), len(requests), "generating", disable_tqdm):
            answers.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]], *, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation after its context, and whether every token of it is the most probable."""
        counts = [len(continuation) for _, continuation in pairs]
        log_probs, best = np.empty(sum(counts)), np.empty(sum(counts), bool)
        batches = read_windows(self.opened.model, (self._window(*pair) for pair in pairs), batch_tokens=self._batch_tokens)
        for batch in _progress(batches, None, "scoring", disable_tqdm):
            mixed = self.knn_lm.mix_all(batch.log_probs, batch.queries, None, batch.contexts).log_probs
            log_probs[batch.rows.numpy()] = mixed.gather(1, batch.targets[:, None])[:, 0].numpy()
            best[batch.rows.numpy()] = (mixed.argmax(1) == batch.targets).numpy()
        ends = np.cumsum(counts, dtype=np.int64)
        return [(float(log_probs[end - n : end].sum()), bool(best[end - n : end].all())) for n, end in zip(counts, ends, strict=True)]

    def _window(self, context: list[int], continuation: list[int]) -> tuple[np.ndarray[Any, Any], list[Window]]:
        if len(continuation) > self.max_length:
            raise InvalidInput("continuation", f"has {len(continuation)} tokens, but the model reads {self.max_length} at most.")
        ids = np.array([*(context or [self.prefix_token_id]), *continuation][-self.max_length - 1 :], np.int64)
        # An empty continuation has no window, and probability 1.
        return ids, [Window(0, len(ids) - len(continuation), len(ids))] if continuation else []

    def _in_our_windows(self, texts: Sequence[str]) -> list[float]:
        ids = [np.array(encoding.ids, np.int64) for encoding in self.knn_lm.tokenizer.encode_documents(texts)]
        counts = [max(len(tokens) - 1, 0) for tokens in ids]
        log_probs = np.empty(sum(counts))
        for batch in score(self.knn_lm, ids, self.opened.store.manifest.windowing, batch_tokens=self._batch_tokens):
            log_probs[batch.rows.numpy()] = batch.log_probs.numpy()
        return [float(part.sum()) for part in np.split(log_probs, np.cumsum(counts)[:-1])] if texts else []

    def _in_harness_windows(self, texts: Sequence[str], disable_tqdm: bool) -> list[float]:
        pieces = [list(self._rolling(self.tok_encode(text, add_special_tokens=False))) for text in texts]
        found = iter(self._scored([pair for pairs in pieces for pair in pairs], disable_tqdm=disable_tqdm))
        return [sum(next(found)[0] for _ in pairs) for pairs in pieces]

    def _rolling(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Context and continuation of each window of the harness."""
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return (make_disjoint_window(pair) for pair in rolling)

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        asked = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        stops, count = [stop for stop in asked.pop("until") if stop], asked.pop("max_gen_toks")
        if not asked.pop("do_sample"):
            asked["temperature"] = 0.0
        if unknown := sorted(set(asked) - SAMPLING_FIELDS):
            raise InvalidInput("generation_kwargs", f"has {', '.join(unknown)}, but can have {', '.join(sorted(SAMPLING_FIELDS))}.")
        room = self.max_length - count
        if room < 1:
            raise InvalidInput("max_gen_toks", f"is {count}, but the model's context is {self.max_length} tokens, prompt included.")
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        detokenizer, text = IncrementalDetokenizer(self.knn_lm.tokenizer, prompt), ""
        for token in generate_tokens(self.knn_lm, self.opened.model, prompt, max_new_tokens=count, sampling=SamplingParams(**asked)):
            text += detokenizer.push(token)
            if any(stop in text for stop in stops):
                return _before(text, stops)
        return _before(text + detokenizer.finish(), stops)


def _before(text: str, stops: Iterable[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _progress(items: Iterable[Any], total: int | None, what: str, disable: bool) -> Iterable[Any]:
    """``items`` with a bar on standard error, as the harness's own models show one."""
    shown: Iterable[Any] = tqdm(items, desc=what, total=total, disable=disable)
    return shown


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

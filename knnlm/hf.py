"""A kNN language model as a Hugging Face model: ``generate``, ``pipeline`` and whatever else takes a causal LM run on it.

::

    model = KNNLMForCausalLM.from_store("store/")
    model.generate(**model.tokenizer("The try statement", return_tensors="pt"), max_new_tokens=32, num_beams=4)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from knnlm.errors import InvalidInput
from knnlm.following import contexts_of
from knnlm.hub import export_store, read_hub_folder
from knnlm.mixture import Mixture
from knnlm.opening import OpenedKNNLM, open_store


class KNNLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The mixture of a base LM and its datastore, as a causal LM of Hugging Face transformers. For inference alone.

    Its logits are normalised log-probabilities of the mixture, so penalties of ``generate`` work on these, as the
    server's do (``docs/definition.md``, Sampling); with ``labels`` its loss is the mixture's. ``mixture``: None takes the
    datastore's, with its adaptive weight. ``tokenizer`` is the Hugging Face tokenizer of the base LM.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, opened: OpenedKNNLM, mixture: Mixture | None = None) -> None:
        super().__init__(opened.model.config)
        self.opened, self.mixture = opened, None if mixture is None else mixture.validate()
        self.base = opened.model.hf_model
        self.tokenizer = opened.model.raw_tokenizer
        self.generation_config = self.base.generation_config

    @classmethod
    def from_store(cls, store: str | Path, *, mixture: Mixture | None = None, **options: Any) -> Self:
        """Open the datastore at ``store`` with its model; ``options`` and errors are those of :func:`knnlm.open_store`."""
        return cls(open_store(store, **options), mixture)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, mixture: Mixture | None = None, model: str | None = None, **options: Any
    ) -> Self:
        """Open a folder that :meth:`save_pretrained` wrote, wherever it was copied to; no network is asked for the datastore.

        ``model``: where the base model lies, if it is not in the folder and not where it was at the build; ``options`` and
        errors are those of :func:`knnlm.open_store`, and those of :func:`knnlm.hub.read_hub_folder`.
        """
        found = read_hub_folder(folder)
        chosen = model if model is not None or found.model is None else str(found.model)
        return cls(open_store(found.store, model=chosen, **options), mixture)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, *, with_model: bool = False, reports: Sequence[Path] = ()
    ) -> None:
        """Write the datastore as a new folder in a model hub's layout, with the base model if asked for; as
        :func:`knnlm.hub.export_store`. The settings of this object are not part of it: the datastore's profile is."""
        export_store(self.opened.store.path, folder, with_model=with_model, reports=reports)

    @property
    def device(self) -> torch.device:
        """Where the base LM's tensors live."""
        return torch.device(self.base.device)

    def get_input_embeddings(self) -> Any:
        """Those of the base LM."""
        return self.base.get_input_embeddings()

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What transformers prepares, and all tokens so far, by whose last ones an adaptive weight follows documents."""
        return {**super().prepare_inputs_for_generation(input_ids, *args, **kwargs), "tokens_read": input_ids}  # type: ignore[misc]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        tokens_read: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the mixture as ``logits`` [batch, columns, vocabulary]; arguments are those of the base LM.

        ``logits_to_keep``: the last so many columns, or their numbers (0: all). ``tokens_read`` [batch, any]: ``input_ids`` and
        the tokens before them that ``past_key_values`` holds (None: ``input_ids`` alone), which only an adaptive weight looks
        at. Raises :class:`InvalidInput` without ``input_ids``: there is no key for embeddings that stand for no token.
        """
        if input_ids is None:
            raise InvalidInput("input_ids", "must be given; inputs_embeds can't be used.")
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        given = {name: value for name, value in options.items() if value is not None}
        out, keys = self.opened.model.run(input_ids=input_ids, logits_to_keep=logits_to_keep, **given, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        queries = keys[:, kept] if not isinstance(kept, int) else keys
        contexts = _contexts(input_ids if tokens_read is None else tokens_read, attention_mask)[:, -input_ids.shape[1] :]
        log_probs = self._mix(out.logits, queries, contexts[:, kept] if not isinstance(kept, int) else contexts)
        loss = None if labels is None else self.loss_function(logits=log_probs, labels=labels, vocab_size=log_probs.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, past_key_values=out.past_key_values)

    def _mix(self, logits: Tensor, queries: Tensor, contexts: Tensor) -> Tensor:
        """Log-probabilities of the mixture for logits [batch, columns, vocabulary], queries [batch, columns, dimension] and
        contexts [batch, columns, 16]."""
        lm = logits.float().log_softmax(-1).flatten(0, 1).cpu()
        mixed = self.opened.knn_lm.mix_all(lm, queries.flatten(0, 1).float().cpu(), self.mixture, contexts.flatten(0, 1).cpu())
        return mixed.log_probs.view(logits.shape).to(logits.device)


def _contexts(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last tokens that were read at each column of ``tokens`` [batch, length], padding left out: [batch, length, 16]."""
    if attention_mask is not None and attention_mask.ndim == 2:
        tokens = torch.where(attention_mask[:, -tokens.shape[1] :] > 0, tokens, -1)
    return contexts_of(tokens)

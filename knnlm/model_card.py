"""The model card of an exported kNN-LM: what the manifest knows, and nothing that it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import Profile

NO_LICENCE = (
    "Not stated. The datastore holds its texts, token by token, so their licences apply to it, and the base model's to the base "
    "model; say here, and as `license` at the top, what they are before you hand this on."
)


def model_card(manifest: Manifest, profile: Profile | None, size: int, *, with_model: bool, reports: Sequence[str]) -> str:
    """Markdown with a metadata block, as hubs show it. ``size``: bytes of the datastore's files."""
    facts = [f"| {name} | {value} |" for name, value in _facts(manifest, profile, size, with_model=with_model).items()]
    linked = [f"- [{name}]({name})" for name in reports]
    given = "" if with_model or not _is_path(manifest.model.name) else ', model="PATH"'
    parts = [
        *_metadata(manifest),
        "",
        "# A kNN language model",
        "",
        "A base language model and a datastore of its hidden states over a text, mixed at every token (Khandelwal et al., 2020):",
        "p = λ·p_kNN + (1-λ)·p_LM.",
        "",
        "| fact | value |",
        "|---|---|",
        *facts,
        "",
        "## Use",
        "",
        "```python",
        "from knnlm.hf import KNNLMForCausalLM",
        "",
        f'model = KNNLMForCausalLM.from_pretrained("THIS_FOLDER"{given})',
        "```",
        "",
        "Commands of knnlm take the folder `datastore` as their store" + (" and `model` as `--model`." if with_model else "."),
        "",
        *(["## Evaluation", "", *linked, ""] if linked else []),
        "## Licence",
        "",
        NO_LICENCE,
    ]
    return "\n".join(parts) + "\n"


def _metadata(manifest: Manifest) -> list[str]:
    # A path on the machine of the build names no model for others.
    base = [] if _is_path(manifest.model.name) else [f"base_model: {json.dumps(manifest.model.name)}"]
    return ["---", "library_name: knnlm", "pipeline_tag: text-generation", *base, "tags:", "- knn-lm", "- retrieval-augmented", "---"]


def _is_path(name: str) -> bool:
    return Path(name).is_absolute()


def public_name(model: str) -> str:
    """The model's name on a hub; of a path, which says nothing elsewhere, the last folder alone."""
    return Path(model).name if _is_path(model) else model


def _facts(manifest: Manifest, profile: Profile | None, size: int, *, with_model: bool) -> dict[str, str]:
    model, key, text, counts, windowing = manifest.model, manifest.key, manifest.text, manifest.counts, manifest.windowing
    revision = "" if model.revision is None else f" (revision {model.revision})"
    place = "in `model/`" if with_model else "not included"
    mixture = "the defaults"
    if profile is not None:
        chosen = profile.mixture
        adaptive = "" if profile.gate is None else ", adaptive per token"
        mixture = f"k={chosen.k}, kNN temperature={chosen.temperature:g}, weight={chosen.weight:g}{adaptive}; calibrated"
    specials = [name for name, added in (("BOS", text.bos_id), ("EOS", text.eos_id)) if added is not None]
    return {
        "base model": f"{public_name(model.name)}{revision}, {place}",
        "weights (fingerprint)": f"`{model.fingerprint.weights}`",
        "documents": f"{counts.documents:,}",
        "tokens": f"{counts.tokens:,}",
        "entries": f"{counts.entries:,}",
        "keys": f"{key.layer.kind} ({key.layer.module}), {key.dimension} wide, stored as {key.dtype}, computed in {model.dtype}",
        "documents' special tokens": " and ".join(specials) or "none",
        "windows": f"{windowing.max_length} tokens, stride {windowing.stride}",
        "mixture": mixture,
        "size of the datastore": f"{size:,} bytes",
        "datastore (fingerprint)": f"`{manifest.fingerprint}`",
        "built": f"{manifest.created} with knnlm {manifest.knnlm_version}",
    }

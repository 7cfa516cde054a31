"""Which datastores fit together, and fit the prompts of a server. Compares manifests; opens nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from knnlm.datastore.manifest import Manifest
from knnlm.errors import StoreMismatch
from knnlm.tokenization import TextTokenizer


def require_mixable(manifests: Mapping[str, Manifest]) -> None:
    """Raise :class:`StoreMismatch`, naming both sides, unless all datastores (by name) may share one softmax.

    They must have the model, tokenizer, special tokens, key layer, width of keys and kind of distance in common.
    """
    (first, expected), *others = manifests.items()
    for name, manifest in others:
        for wanted, its in zip(_facts(expected), _facts(manifest), strict=True):
            if its.value != wanted.value:
                both = f"{its.part} of {first!r} is {wanted.shown}, of {name!r} {its.shown}"
                raise StoreMismatch(f"The datastores {first!r} and {name!r} can't be mixed: {both}.")


def require_special_tokens(manifest: Manifest, tokenizer: TextTokenizer) -> None:
    """Raise :class:`StoreMismatch` unless prompts and documents of this datastore get the same special tokens from ``tokenizer``."""
    theirs, ours = (manifest.text.bos_id, manifest.text.eos_id), (tokenizer.bos_id, tokenizer.eos_id)
    if theirs != ours:
        raise StoreMismatch(
            f"The datastore's documents have {_special_tokens(*theirs)}, but the prompts and documents that are served have "
            f"{_special_tokens(*ours)}; build it again with the same --bos and --eos."
        )


@dataclass(frozen=True)
class _Fact:
    """Something that must be equal, and how people are told of it."""

    part: str
    value: object
    shown: str


def _facts(manifest: Manifest) -> Iterator[_Fact]:
    fingerprint, text, key = manifest.model.fingerprint, manifest.text, manifest.key
    for part in ("configuration", "tokenizer", "weights"):
        value = getattr(fingerprint, part)
        yield _Fact(f"the model's {part}", value, f"{value[:12]} ({manifest.model.name})")
    yield _Fact("what documents begin and end with", (text.bos_id, text.eos_id), _special_tokens(text.bos_id, text.eos_id))
    yield _Fact("the key layer", key.layer, f"{key.layer.kind} ({key.layer.module})")
    yield _Fact("the width of keys", key.dimension, str(key.dimension))
    yield _Fact("the kind of distance", key.distance, repr(key.distance))


def _special_tokens(bos: int | None, eos: int | None) -> str:
    return f"{'no BOS' if bos is None else f'BOS {bos}'} and {'no EOS' if eos is None else f'EOS {eos}'}"

"""How a comparison is shown: a table, JSON, and the per-token file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from knnlm import console
from knnlm.corpus import Corpus
from knnlm.evaluation.compare import Comparison, Perplexity, PerToken, per_token_arrays
from knnlm.opening import OpenedKNNLM

MUCH_OVERLAP = 0.1


def write_per_token(path: Path, per_token: PerToken) -> None:
    """Write the per-token arrays as an uncompressed ``.npz`` under exactly the name given."""
    with path.open("wb") as file:
        np.savez(file, **dict(per_token_arrays(per_token)))  # type: ignore[arg-type]


def show(opened: OpenedKNNLM, comparison: Comparison, corpus: Corpus, *, as_json: bool) -> None:
    """Print the comparison with the settings used."""
    manifest, mixture = opened.store.manifest, comparison.mixture
    settings = {
        "model": opened.model.name,
        "dtype": opened.model.dtype,
        "key_layer": manifest.key.layer.kind,
        "index": opened.retriever.index.description,
        "entries": manifest.counts.entries,
        "k": mixture.k,
        "knn_temperature": mixture.temperature,
        "weight": mixture.weight,
        "mixture_from": opened.mixture_source,
        "overfetch": opened.retriever.settings.for_k(comparison.mixture.k).overfetch,
        "max_length": manifest.windowing.max_length,
        "stride": manifest.windowing.stride,
    }
    if as_json:
        content = {name: value for name, value in asdict(comparison).items() if name not in ("per_token", "mixture")}
        console.print_json({**content, "settings": settings, "left_out": corpus.left_out, "problems": corpus.problems.counts})
        return
    console.out.print(perplexity_table(comparison))
    console.out.print(
        f"perplexity {comparison.change:+.1%} (± {comparison.change_standard_error:.1%}), "
        f"better on {comparison.better:.1%} of tokens, worse on {comparison.worse:.1%}"
    )
    console.out.print(f"{comparison.tokens:,} tokens of {comparison.documents:,} documents; standard errors over {comparison.clusters}")
    impossible = int(np.isneginf(comparison.per_token.logprob).sum())
    if impossible:
        console.out.print(f"{impossible:,} tokens have probability 0: with weight 1, what no neighbour has is impossible")
    console.out.print(f"{comparison.overlap:.2%} of the text's 13-token sequences stand in the datastore")
    console.out.print(
        f"k={mixture.k}, kNN temperature={mixture.temperature:g}, weight={mixture.weight:g} ({opened.mixture_source}); "
        f"windows of {manifest.windowing.max_length} tokens, stride {manifest.windowing.stride}; {settings['index']}"
    )
    if comparison.overlap > MUCH_OVERLAP:
        console.messages.print("warning: much of this text stands in the datastore; the figure says little about new text")


def perplexity_table(comparison: Comparison) -> Table:
    """Base LM and kNN-LM side by side."""
    return console.table(
        "", ["", "perplexity", "± s.e.", "bits/byte", "tokens/s"], [_row("base LM", comparison.base), _row("kNN-LM", comparison.knn)]
    )


def _row(name: str, result: Perplexity) -> list[str]:
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    return [name, f"{result.value:.2f}", f"{result.standard_error:.2f}", bits, f"{result.tokens_per_second:,.0f}"]

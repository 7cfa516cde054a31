"""The subcommand ``knnlm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the demo to the command ``knnlm``."""
    app.command("demo")(demo)


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Any Hugging Face causal LM: hub name or path.", show_default="the one that ships with knnlm"),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Leave corpus and datastore in this folder, which must be new or empty.", show_default="a temporary folder"),
    ] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="0.2")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours per token.", show_default="64")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="10")] = None,
) -> None:
    """All of knnlm on this machine, in about two minutes: build, compare, serve, generate.

    The text is Python's own: the language reference and docstrings of the standard library. Some documents become the
    datastore, others, never seen by it, are what perplexities are compared on.
    """
    from knnlm_demo.run import run_demo

    run_demo(model, keep, weight=weight, k=k, knn_temperature=knn_temperature)

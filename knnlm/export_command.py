"""The subcommand ``knnlm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli import Store


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command ``knnlm``."""
    app.command()(export)


def export(
    store: Store,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="New folder to write.", show_default=False)],
    with_model: Annotated[bool, typer.Option("--with-model", help="Include the base model and its tokenizer.")] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option("--report", metavar="FILE", help="A comparison to include, .json or .html; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Write a datastore as a folder that a model hub takes: config.json, a model card, and datastore/ with checked copies.

    Python opens it with KNNLMForCausalLM.from_pretrained(FOLDER), commands take FOLDER/datastore. Nothing is uploaded.
    """
    import knnlm.console as console
    from knnlm.hub import export_store

    console.quiet_transformers()
    export_store(store, to, with_model=with_model, reports=report or ())
    console.out.print(f"{to}: written; say in README.md which licences apply before you hand it on")

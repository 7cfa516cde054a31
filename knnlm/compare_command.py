"""The subcommand ``knnlm compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from knnlm.cli import Device, Dtype, IdField, Json, Model, NoGitignore, OnErrorOption, TextField, TrustRemoteCode, Verify
from knnlm.errors import InvalidInput
from knnlm.inputs.options import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command ``knnlm``."""
    app.command()(compare)


def compare(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of datastores.", show_default=False)],
    text: Annotated[
        list[str],
        typer.Option("--text", help="Held-out text: file, folder, glob or URL (docs/inputs.md); may be repeated.", show_default=False),
    ],
    k: Annotated[int | None, typer.Option("--k", help="Neighbours per token.", show_default="profile or 64")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="profile or 10")] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="profile or 0.2")] = None,
    exclude_document: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-document", metavar="ID", help="No search finds this document of the datastore; may be repeated.", show_default=False
        ),
    ] = None,
    no_auto_exclude: Annotated[
        bool, typer.Option("--no-auto-exclude", help="Let searches find documents of the datastore that are in the text, too.")
    ] = False,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Without an n-gram of the datastore's tokens and a continuous cache beside it.")
    ] = False,
    per_token: Annotated[
        Path | None,
        typer.Option("--per-token", help="Write every token's figures to this .npz file (one datastore).", show_default=False),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the figures of all groups of tokens.", show_default=False)] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown.", show_default=False)] = None,
    html_report: Annotated[
        Path | None,
        typer.Option("--report", help="Write everything, with plots, as one HTML file that opens offline.", show_default=False),
    ] = None,
    passages: Annotated[int, typer.Option(help="Most changed passages of each datastore in the report.", min=0)] = 6,
    show_text: Annotated[
        int, typer.Option("--show-text", help="Print this many passages, coloured by what changed, with the neighbours.", min=0)
    ] = 0,
    split_documents: Annotated[
        str | None, typer.Option(help="Regular expression; in text files a new document begins at each match.", show_default="as built")
    ] = None,
    on_error: OnErrorOption = "stop",
    text_field: TextField = DEFAULT_TEXT_FIELD,
    id_field: IdField = DEFAULT_ID_FIELD,
    no_gitignore: NoGitignore = False,
    batch_size: Annotated[int, typer.Option(help="Tokens in one forward pass.", min=1)] = 2048,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Verify = False,
    json: Json = False,
) -> None:
    """Perplexity of the base LM against the kNN-LM, over the same tokens of held-out text.

    Windows, special tokens, model and key layer are those of each datastore, which are compared one after another. Intervals
    are of the paired block bootstrap over documents (or blocks of text). Documents of the datastore that are in the text, token
    by token, are left out, and what else of the text stands in it is said. Every figure: docs/comparing.md.
    """
    import knnlm.evaluation.comparison_files as files
    from knnlm.console import print_json, progress, quiet_transformers
    from knnlm.corpus import Corpus
    from knnlm.evaluation.compare_stores import OpenComparison, compare_stores
    from knnlm.evaluation.comparison_json import content_of
    from knnlm.evaluation.html_report import ReportedStore, passages_of, reported, require_report, write_report
    from knnlm.evaluation.passages import Passage
    from knnlm.evaluation.report import show
    from knnlm.evaluation.text_view import show_passages_text
    from knnlm.inputs.left_out import say_left_out

    _require_folders(per_token=per_token, csv=csv, markdown=markdown, report=html_report)
    if html_report is not None:
        require_report()
    if json and show_text:
        raise InvalidInput("show_text", "prints passages for people, and --json one object alone; use one of them.")
    if per_token is not None and len(stores) > 1:
        raise InvalidInput("per_token", f"writes the figures of one datastore, but {len(stores)} are given; compare them one by one.")
    quiet_transformers()
    opening: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "verify": verify, "trust_remote_code": trust_remote_code}
    reading = {"split_documents": split_documents, "on_error": on_error, "text_field": text_field, "id_field": id_field}
    corpora: list[Corpus] = []
    parts: list[ReportedStore] = []
    shown: list[list[Passage]] = []

    def visit(found: OpenComparison) -> None:
        corpora.append(found.corpus)
        shown.append(passages_of(found, show_text) if show_text else [])
        if html_report is not None:
            parts.append(reported(found, passages))

    with progress() as reporter:
        compared = compare_stores(
            stores,
            text,
            opening={**opening, "k": k, "temperature": knn_temperature, "weight": weight},
            reading={**reading, "gitignore": not no_gitignore},
            exclude=exclude_document or (),
            auto_exclude=not no_auto_exclude,
            baselines=not no_baselines,
            batch_tokens=batch_size,
            progress=reporter.update,
            visit=visit,
        )
    say_left_out(corpora[0])
    if per_token is not None:
        files.write_per_token(per_token, compared.stores[0].comparison.per_token)
    if csv is not None:
        files.write_csv(csv, compared)
    if markdown is not None:
        files.write_markdown(markdown, compared)
    if html_report is not None:
        write_report(html_report, compared, parts, shlex.join(["knnlm", *sys.argv[1:]]))
    if json:
        print_json(content_of(compared))
        return
    show(compared)
    for store, found in zip(compared.stores, shown, strict=True):
        if show_text:
            show_passages_text(store.name if len(shown) > 1 else "", found)


def _require_folders(**files: Path | None) -> None:
    """Say that a file can't be written before the work is done."""
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise InvalidInput(name, f"is {path}, but there is no folder {path.parent}.")
        if path is not None and path.is_dir():
            raise InvalidInput(name, f"is {path}, which is a folder; name a file.")

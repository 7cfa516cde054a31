"""The subcommand ``knnlm scaling``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli import (
    Device,
    Dtype,
    IdField,
    Json,
    Model,
    NoGitignore,
    OnErrorOption,
    Store,
    TextField,
    TrustRemoteCode,
)
from knnlm.errors import InvalidInput
from knnlm.inputs.options import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command ``knnlm``."""
    app.command()(scaling)


def scaling(
    store: Store,
    text: Annotated[
        list[str],
        typer.Option("--text", help="Held-out text: file, folder, glob or URL (docs/inputs.md); may be repeated.", show_default=False),
    ],
    calibrate_text: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate-text", help="Validation text, on which λ is fitted at each size and k; may be repeated.", show_default=False
        ),
    ] = None,
    size: Annotated[
        list[float] | None,
        typer.Option("--size", help="Share of the entries, above 0, up to 1; may be repeated.", show_default="1/32, 1/16, … 1"),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k", help="Neighbours per token; may be repeated. The mixture's own is measured too.", show_default="1, 2, 4, … 1024"
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROBES:OVERFETCH",
            help="Search setting, such as 16:2; may be repeated. The store's own is measured too.",
            show_default="around the store's own",
        ),
    ] = None,
    exact_tokens: Annotated[int, typer.Option(help="Tokens at which settings are compared with exact search.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Draws the documents of each size, and those tokens.", min=0)] = 20200430,
    mixture_k: Annotated[int | None, typer.Option(help="k of the mixture.", show_default="profile or 64")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="profile or 10")] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="profile or 0.2")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot to this .svg, .png or .pdf file.", show_default=False)] = None,
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
    json: Json = False,
) -> None:
    """Perplexity against datastore size, against k, and against search settings, over the same tokens.

    A smaller datastore is the same one with documents left out at random (each size is part of the larger ones); its
    index is not built again. One λ for all tokens: that of the profile, and one fitted on --calibrate-text. The store is
    only read.
    """
    from knnlm import console
    from knnlm.evaluation import scaling_report as report
    from knnlm.evaluation.plotting import check_plot_file, save
    from knnlm.evaluation.scaling import SHARES, Options, measure_scaling
    from knnlm.evaluation.scaling_plot import scaling_plot
    from knnlm.inputs.left_out import say_left_out
    from knnlm.opening import open_store

    if plot is not None:
        check_plot_file(plot, "plot")
    options = Options(size or SHARES, k, [_parse(given) for given in setting] if setting else None, exact_tokens, seed)
    console.quiet_transformers()
    opened = open_store(
        store, model=model, device=device, dtype=dtype, k=mixture_k, temperature=knn_temperature, weight=weight,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    corpora = [
        opened.corpus(
            *paths, split_documents=split_documents, on_error=on_error, text_field=text_field, id_field=id_field, gitignore=not no_gitignore
        )
        for paths in (text, calibrate_text or [])
        if paths
    ]
    with console.progress() as reporter:
        held, *calibration = (opened.read(corpus) for corpus in corpora)
        texts = {"measuring": held, "fitting": calibration[0] if calibration else []}
        totals = {stage: sum(len(document.ids) - 1 for document in documents) for stage, documents in texts.items()}
        found = measure_scaling(
            opened, held, texts["fitting"], options, batch_tokens=batch_size,
            progress=lambda stage, done: reporter.update(stage, done, totals[stage]),
        )  # fmt: skip
    for corpus in corpora:
        say_left_out(corpus)
    if plot is not None:
        save(scaling_plot(found), plot)
    if json:
        console.print_json(report.content(opened, found))
    else:
        report.show(opened, found)


def _parse(given: str) -> tuple[int, float]:
    """Probes and over-fetch (1 where it is not said)."""
    probes, _, overfetch = given.partition(":")
    try:
        return int(probes), float(overfetch or 1)
    except ValueError:
        raise InvalidInput("setting", f"is {given!r}, but must be probes and over-fetch, such as 16:2.") from None

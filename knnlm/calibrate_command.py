"""The subcommand ``knnlm calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli import Device, Dtype, IdField, Json, Model, NoGitignore, OnErrorOption, Store, TextField, TrustRemoteCode
from knnlm.inputs.options import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command ``knnlm``."""
    app.command()(calibrate)


def calibrate(
    store: Store,
    text: Annotated[
        list[str],
        typer.Option("--text", help="Validation text: file, folder, glob or URL (docs/inputs.md); may be repeated.", show_default=False),
    ],
    negative_text: Annotated[
        list[str] | None,
        typer.Option(
            "--negative-text",
            help="Text that the datastore is of no use for, so that the gate learns it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=1, max=4096, help="Most neighbours per token.", show_default="1024, or all entries")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder for what was found, which is used again.", show_default="deleted afterwards"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Picture of all settings, .png, .svg or .pdf (extra: report).", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what was found, and leave the store as it is.")] = False,
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
    """Choose k, the kNN temperature, the weight and a gate on validation text, and save them as the datastore's profile.

    One pass of model and search at the largest k; every setting is then computed from what that found. The gate gives
    each token a weight of its own, 0 where neighbours don't help, and says where searching is not worth it; there is none
    where it would not beat one weight for all on held-out documents. Commands and servers that open the store take the
    profile where nothing else is given. Test on other text: knnlm compare. More: docs/calibration.md.
    """
    import knnlm.evaluation.calibration_report as report
    from knnlm.console import progress, quiet_transformers
    from knnlm.corpus import Corpus
    from knnlm.evaluation.calibration import calibrate as run
    from knnlm.evaluation.calibration import profile_of
    from knnlm.evaluation.plotting import check_plot_file
    from knnlm.evaluation.surface_plot import plot_surface
    from knnlm.inputs.left_out import say_left_out
    from knnlm.opening import open_store

    if plot is not None:
        check_plot_file(plot, "plot")
    quiet_transformers()
    # All three are given, so that a profile which does not fit any more is no obstacle to a new one.
    opened = open_store(
        store, model=model, device=device, dtype=dtype, k=64, temperature=10.0, weight=0.2, trust_remote_code=trust_remote_code
    )

    def corpus_of(*inputs: str) -> Corpus:
        return opened.corpus(
            *inputs,
            split_documents=split_documents,
            on_error=on_error,
            text_field=text_field,
            id_field=id_field,
            gitignore=not no_gitignore,
        )

    corpora = [corpus_of(*text), *(corpus_of(name) for name in dict.fromkeys(negative_text or ()))]
    with progress() as reporter:
        held = [opened.read(corpus) for corpus in corpora]
        negatives = dict(zip(dict.fromkeys(negative_text or ()), held[1:], strict=True))
        found = run(opened, held[0], negatives, k=k, cache=cache, batch_tokens=batch_size, progress=reporter.update)
    if plot is not None:
        plot_surface(found.fit, plot)
    if not dry_run:
        profile_of(opened, found, ", ".join(text)).write(store)
    for corpus in corpora:
        say_left_out(corpus)
    report.show(found, store, saved=not dry_run, as_json=json)

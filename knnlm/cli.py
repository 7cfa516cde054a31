"""The command ``knnlm``. Subcommands of other packages are found by entry point, so the library imports no sibling."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from knnlm import __version__
from knnlm.errors import InvalidInput, KNNLMError
from knnlm.inputs.options import OnError

COMMANDS = "knnlm.commands"
COMMAND_MODULES = ("knnlm.compare_command", "knnlm.calibrate_command", "knnlm.scaling_command", "knnlm.export_command")
INTERRUPTED = 130

app = typer.Typer(
    name="knnlm",
    help="Retrieval-augmented language models: p = λ·p_kNN + (1-λ)·p_LM (Khandelwal et al., 2020).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Store = Annotated[Path, typer.Argument(help="Folder of the datastore.", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", help="Where the model lies now, if it was moved since the build.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="Compute in float32, bfloat16, float16 or float64.", show_default="as built")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code from its repository.")]
Verify = Annotated[bool, typer.Option("--verify", help="Read every file of the store and compare its checksum first.")]
OnErrorOption = Annotated[OnError, typer.Option(help="What can't be read: stop at the first, or skip it, counted and named.")]
TextField = Annotated[str, typer.Option(help="Field of JSON lines or column of tables that holds the text.")]
IdField = Annotated[str, typer.Option(help="Field or column that names documents; one that is named must be there.")]
NoGitignore = Annotated[bool, typer.Option("--no-gitignore", help="Read what .gitignore files in folders leave out, too.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=VALUE",
        help="Documents with this id, source or field of their metadata (metadata.source: the field of that name); "
        "may be repeated, then all must hold.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False) -> None:
    if version:
        typer.echo(f"knnlm {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    store: Store,
    entry: Annotated[int | None, typer.Option(help="Show where this entry came from.", show_default=False)] = None,
    documents: Annotated[bool, typer.Option("--documents", help="List the documents.")] = False,
    where: Where = None,
    model: Model = None,
    verify: Verify = False,
    json: Json = False,
) -> None:
    """What is in a datastore: model, key layer, entries, documents, index, sizes. Loads no model.

    With --entry, tokens are shown as text where the model's tokenizer is on this machine.
    """
    import knnlm.inspection as inspection
    from knnlm.datastore.reader import Datastore
    from knnlm.datastore.selection import parse_conditions

    if documents and entry is not None:
        raise InvalidInput("entry", "shows one entry and --documents lists documents; use one of them.")
    if where and not documents:
        raise InvalidInput("where", "chooses among the documents that --documents lists; use it with that.")
    if model is not None and entry is None:
        raise InvalidInput("model", "names the tokenizer for the text around an entry; use it with --entry.")
    conditions = parse_conditions(where or [])
    opened = Datastore.open(store, verify=verify)
    if entry is not None:
        inspection.show_entry(opened, entry, model=model, as_json=json)
    elif documents:
        inspection.show_documents(opened, conditions, as_json=json)
    else:
        inspection.show(opened, as_json=json)


@app.command()
def verify(store: Store, json: Json = False) -> None:
    """Check a datastore: every file against its checksum, then what the files say against one another.

    Counts, ranges, ids, tokens and values, spans, keys, the index; and files that are no part of it. Exit status 1 if
    there is any problem, each named in one sentence.
    """
    import knnlm.inspection as inspection

    raise typer.Exit(inspection.verify(store, as_json=json))


@app.command()
def remove(
    store: Store,
    document: Annotated[
        list[str] | None, typer.Option("--document", metavar="ID", help="Id of a document; may be repeated.", show_default=False)
    ] = None,
    where: Where = None,
    ids_from: Annotated[
        Path | None,
        typer.Option("--ids-from", metavar="FILE", help="File with more ids, one a line; - is standard input.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and change nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove documents from a datastore: no search finds their entries any more.

    Documents are those of the given ids; with --where, those that meet its conditions; with both, ids that don't meet
    them are refused. Exit status 0 means durable: commands that open the store find nothing of them at once, running
    servers within a second. An id that is unknown, or conditions that no document meets, are status 1, and nothing is
    removed. Files keep the text until: knnlm compact.
    """
    import knnlm.inspection as inspection
    from knnlm.datastore.removal import remove_documents
    from knnlm.datastore.selection import parse_conditions, read_ids

    ids = [*(document or []), *(read_ids(ids_from) if ids_from is not None else [])]
    removal = remove_documents(store, ids, parse_conditions(where or []), dry_run=dry_run)
    inspection.show_removal(store, removal, dry_run=dry_run, as_json=json)


@app.command()
def doctor(
    store: Store,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Measure on this held-out text (file or folder; may be repeated).", show_default="stored entries"),
    ] = None,
    queries: Annotated[int, typer.Option(help="Positions to measure at.", min=1)] = 256,
    k: Annotated[list[int] | None, typer.Option("--k", help="Neighbours; may be repeated.", show_default="16, 64, 256, 1024")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Measure, choose, and put the new search settings into the store.")] = False,
    model: Model = None,
    device: Annotated[str, typer.Option(help="Where the model reads --text: cpu, cuda or cuda:N.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """How far searches are from exact search, in the next-token distribution; CPU against GPU; what to change.

    Exit status 1 if the mean total variation is above 0.005 for some k. Stored entries are asked for without their own
    document. Loads the model with --text only.
    """
    from knnlm.console import quiet_transformers
    from knnlm.doctor import Options, examine
    from knnlm.doctor_report import show
    from knnlm.search_tuning import KS

    ks = tuple(sorted(set(k))) if k else KS
    options = Options(ks, queries, tuple(text or ()), model, device, trust_remote_code, apply).validate()
    quiet_transformers()
    diagnosis = examine(store, options)
    show(diagnosis, as_json=json)
    raise typer.Exit(0 if diagnosis.healthy else 1)


@functools.cache
def load_commands() -> typer.Typer:
    """The command with the subcommands of all installed packages, each registered once."""
    for module in COMMAND_MODULES:
        importlib.import_module(module).register(app)
    for found in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        module, _, function = found.value.partition(":")
        getattr(importlib.import_module(module), function)(app)
    return app


def main() -> None:
    """Run the command; a :class:`KNNLMError` becomes one sentence and exit status 1 (2 for a bad option)."""
    # Torch and FAISS each have a pool of threads; waiting ones must sleep, or they take the cores from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(load_commands()))


def run(command: Any, arguments: list[str] | None = None) -> int:
    """Exit status of the command; 130 if it was interrupted."""
    try:
        status = command(args=arguments, standalone_mode=False, prog_name="knnlm")
    except InvalidInput as error:
        return _fail(f"{_option(error.field)} {error.problem}", 2)
    except KNNLMError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}.", 1)
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _fail("interrupted.", INTERRUPTED)
        raise
    if status == INTERRUPTED:  # typer turns an interrupt into this status without a word
        return _fail("interrupted.", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _option(field: str) -> str:
    """As it was written: a path of fields and an environment variable stand for themselves."""
    return field if "." in field or field.isupper() else f"--{field.replace('_', '-')}"


def _fail(sentence: str, status: int) -> int:
    typer.echo(f"error: {sentence}", err=True)
    return status


if __name__ == "__main__":
    main()

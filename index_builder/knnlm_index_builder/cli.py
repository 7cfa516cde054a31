"""The subcommands ``knnlm build`` and ``knnlm compact``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.cli import IdField, NoGitignore, OnErrorOption, TextField
from knnlm.errors import InvalidInput
from knnlm.inputs.options import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD

if TYPE_CHECKING:
    from knnlm.corpus import Corpus
    from knnlm_index_builder.pipeline import BuildResult

SETTINGS_OF_A_STORE = (
    "index", "keys", "on_overflow", "max_length", "stride", "bos", "eos", "split_documents", "key_layer", "key_module", "shard_tokens",
    "dtype", "revision",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this package's subcommands to the command ``knnlm``."""
    app.command()(build)
    app.command()(compact)


def build(
    context: typer.Context,
    text: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, quoted globs or URLs: text, HTML, .jsonl, .parquet, saved datasets, .npy (docs/inputs.md).",
            show_default=False,
        ),
    ],
    store: Annotated[Path, typer.Option("--store", help="Folder of the datastore to be made.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Any Hugging Face causal LM: hub name or local path.", show_default="with --append: the store's"),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add documents to a complete store; its model and settings apply.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what the build would take, and whether it fits; exit status 1 if it does not.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that run the model, each with its share of the cores.", min=1)] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Memory for training and filling the index, such as 8GB.", show_default="half of the machine's")
    ] = None,
    index: Annotated[str, typer.Option(help="auto, exact, or a FAISS factory string such as IVF1024,SQ8.")] = "auto",
    keys: Annotated[
        str, typer.Option(help="Store keys as float16 or float32; none: in the index's codes alone, whose distances then serve.")
    ] = "float16",
    on_overflow: Annotated[str, typer.Option(help="At a key that float16 can't hold: stop, or go over to float32 for all keys.")] = "stop",
    tune_on: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="Held-out text on which search settings are chosen.", show_default="stored entries, own document left out"
        ),
    ] = None,
    on_error: OnErrorOption = "stop",
    text_field: TextField = DEFAULT_TEXT_FIELD,
    id_field: IdField = DEFAULT_ID_FIELD,
    no_gitignore: NoGitignore = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a window.", show_default="the model's context, up to 1024")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that a window adds.", show_default="half of max-length")] = None,
    bos: Annotated[str, typer.Option(help="Begin documents with BOS: auto (as the tokenizer does), yes or no.")] = "auto",
    eos: Annotated[bool, typer.Option("--eos", help="End documents with EOS.")] = False,
    split_documents: Annotated[
        str | None,
        typer.Option(help="Regular expression; in text files a new document begins at each match.", show_default="a file is a document"),
    ] = None,
    key_layer: Annotated[str, typer.Option(help="last_ffn_input or last_hidden.")] = "last_ffn_input",
    key_module: Annotated[str | None, typer.Option(help="Take the input of this module as key.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Tokens in one forward pass; no setting of the store.", show_default="2048")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a shard: what a killed build does again, at most.")] = 262_144,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Compute in float32, bfloat16, float16 or float64.", show_default="float32 on a CPU")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.", show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code from its repository.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Run a causal LM over text and store (context representation -> next token) pairs with an index.

    Killed or interrupted, the same command goes on from the last finished shard and ends in the same files.
    """
    from dataclasses import replace

    from knnlm import console, inspection
    from knnlm.byte_sizes import parse_bytes
    from knnlm.corpus import Corpus
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.reader import Datastore
    from knnlm.model_source import ModelSource
    from knnlm_index_builder.executors import ProcessExecutor
    from knnlm_index_builder.machine import total_memory
    from knnlm_index_builder.pipeline import append_documents, build_datastore
    from knnlm_index_builder.settings import BuildSettings, Resources

    if append:
        _refuse_settings(context)
    elif model is None:
        raise InvalidInput("model", "is missing; name a Hugging Face causal LM (only --append takes the store's).")
    settings = BuildSettings(
        index=index, keys=keys, on_overflow=on_overflow, max_length=max_length, stride=stride, bos=bos, eos=eos,  # type: ignore[arg-type]
        split_documents=split_documents, shard_tokens=shard_tokens,
    ).validate()  # fmt: skip
    if append:
        base = Manifest.read(store)
        split_documents = base.text.split_documents
        source = ModelSource.of(base, model=model, device=device, dtype=None, trust_remote_code=trust_remote_code)
    else:
        source = ModelSource(str(model), device, dtype, revision, trust_remote_code, key_layer, key_module)
    options: dict[str, Any] = {"on_error": on_error, "text_field": text_field, "id_field": id_field, "gitignore": not no_gitignore}
    corpus = Corpus(text, split_documents, **options)
    tuning_text = Corpus(tune_on, split_documents, **options) if tune_on else None
    console.quiet_transformers()
    loaded = source.load()
    executor = ProcessExecutor(replace(source, expected=None).load, workers) if workers > 1 else None
    resources = Resources(parse_bytes("memory", memory) if memory else total_memory() // 2, batch_size, executor)
    if estimate:
        from knnlm_index_builder.estimate_report import run_estimate

        raise typer.Exit(run_estimate(corpus, store, loaded, settings, resources, workers=workers, append=append, as_json=json))
    try:
        with console.progress() as reporter:
            if append:
                result = append_documents(corpus, store, loaded, reporter, resources, tuning_text=tuning_text)
            else:
                result = build_datastore(
                    corpus,
                    store,
                    loaded,
                    settings,
                    reporter,
                    resources,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    tuning_text=tuning_text,
                )
    except KeyboardInterrupt:
        console.messages.print(f"What is finished stays in {store}; the same command goes on from there.")
        raise
    _say(result, corpus, store, append=append)
    inspection.show(Datastore.open(store), as_json=json)


def _refuse_settings(context: typer.Context) -> None:
    """With --append the store's settings apply; one given beside it would be ignored in silence."""
    for name in SETTINGS_OF_A_STORE:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidInput(name, "can't be given with --append: the store was built with its own.")


def _say(result: BuildResult, corpus: Corpus, store: Path, *, append: bool) -> None:
    from knnlm import console
    from knnlm.inputs.left_out import say_left_out

    say_left_out(corpus)
    if result.empty:
        console.messages.print(f"left out {console.counted(result.empty, 'document')} without a token")
    for warning in result.warnings:
        console.messages.print(f"warning: {warning}")
    if result.already_complete:
        done = "holds these documents already" if append else "is complete already"
        console.messages.print(f"{store} {done}; nothing was changed")


def compact(
    store: Annotated[Path, typer.Argument(help="Folder of the datastore.", show_default=False)],
    index: Annotated[
        str | None,
        typer.Option(help="Train and fill this index anew: auto, exact, or a FAISS factory string.", show_default="of the kind that it is"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for training and filling the index, such as 8GB.", show_default="half of the machine's")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Rewrite a datastore without its removed documents: their tokens, keys, codes and metadata leave the disk.

    No model is needed. Killed or interrupted, the same command goes on; until it is done readers see the store as it was.
    """
    from knnlm import console, inspection
    from knnlm.byte_sizes import parse_bytes
    from knnlm.datastore.reader import Datastore
    from knnlm_index_builder.compaction import compact as run
    from knnlm_index_builder.machine import total_memory
    from knnlm_index_builder.settings import Resources

    before = Datastore.open(store).manifest
    with console.progress() as reporter:
        result = run(store, reporter, Resources(parse_bytes("memory", memory) if memory else total_memory() // 2), index)
    for warning in result.warnings:
        console.messages.print(f"warning: {warning}")
    if result.manifest.index == before.index:
        console.messages.print(f"nothing is removed from {store}; nothing was changed")
    elif result.documents:
        gone = f"{console.counted(result.documents, 'removed document')} with {console.counted(result.entries, 'entry', 'entries')}"
        console.messages.print(f"{gone} left the disk; {console.size(max(0, result.bytes_freed))} freed")
    else:
        console.messages.print(f"the index of {store} was made anew")
    inspection.show(Datastore.open(store), as_json=json)

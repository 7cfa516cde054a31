"""The subcommand ``knnlm build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.errors import CorpusError, InvalidInput


def register(app: typer.Typer) -> None:
    """Add this package's subcommands to the command ``knnlm``."""
    app.command()(build)


def build(
    text: Annotated[list[Path], typer.Argument(help="Text files, folders, .jsonl files or .npy token arrays.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="Any Hugging Face causal LM: hub name or local path.", show_default=False)],
    store: Annotated[Path, typer.Option("--store", help="Folder of the datastore to be made.", show_default=False)],
    index: Annotated[str, typer.Option(help="auto, exact, or a FAISS factory string such as IVF1024,SQ8.")] = "auto",
    keys: Annotated[str, typer.Option(help="Store keys as float16 or float32.")] = "float16",
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
    from knnlm import console, inspection
    from knnlm.datastore.reader import Datastore
    from knnlm.model import HFLanguageModel
    from knnlm_index_builder.pipeline import BuildSettings, build_datastore

    if bos not in ("auto", "yes", "no"):
        raise InvalidInput("bos", f"is {bos!r}, but must be auto, yes or no.")
    if batch_size is not None and batch_size < 1:
        raise InvalidInput("batch_size", f"is {batch_size}, but must be 1 or more.")
    settings = BuildSettings(
        index=index, keys=keys, max_length=max_length, stride=stride, bos=bos, eos=eos,  # type: ignore[arg-type]
        split_documents=split_documents, shard_tokens=shard_tokens,
    ).validate()  # fmt: skip
    for path in text:
        if not path.exists():
            raise CorpusError(f"There is no file or folder {path}.")
    console.quiet_transformers()
    loaded = HFLanguageModel.load(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        key_layer=key_layer,
        key_module=key_module,
    )
    try:
        with console.progress() as reporter:
            result = build_datastore(
                text, store, loaded, settings, reporter, batch_tokens=batch_size, revision=revision, trust_remote_code=trust_remote_code
            )
    except KeyboardInterrupt:
        console.messages.print(f"What is finished stays in {store}; the same command goes on from there.")
        raise
    if result.skipped:
        console.messages.print(f"left out {len(result.skipped)} binary files: {', '.join(result.skipped[:5])}")
    if result.empty:
        console.messages.print(f"left out {result.empty} empty documents")
    if result.already_complete:
        console.messages.print(f"{store} is complete already; nothing was changed")
    inspection.show(Datastore.open(store), as_json=json)

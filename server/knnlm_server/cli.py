"""The subcommands ``knnlm serve`` and ``knnlm generate``. What needs torch or gRPC is imported when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import Json
from knnlm.errors import InvalidInput
from knnlm_server import configuration
from knnlm_server.serve_command import serve

if TYPE_CHECKING:
    from knnlm_server.client import GenerationOptions


def register(app: typer.Typer) -> None:
    """Add this package's subcommands to the command ``knnlm``."""
    app.command(context_settings={"auto_envvar_prefix": configuration.PREFIX})(serve)
    app.command()(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.", show_default=False)],
    target: Annotated[str, typer.Option(help="The server, as HOST:PORT.")] = "localhost:50051",
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.", show_default="128")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0: always the most probable token.", show_default="1")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most probable tokens; 0: all.", show_default="0")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most probable tokens of this total; 1: all.", show_default="1")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, as a share of the largest; 0: off.", show_default="0")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeated tokens become less likely; 1: off.", show_default="1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.", show_default="a new one")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours per token.", show_default="the server's")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="the server's")] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="the server's")] = None,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="The base LM alone.")] = False,
    truncate_prompt: Annotated[bool, typer.Option("--truncate-prompt", help="Keep the end of a prompt that is too long.")] = False,
    neighbors: Annotated[int, typer.Option(help="Show this many neighbours of each token, and how much they decided.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which to give up.", show_default="never")] = None,
    json: Json = False,
) -> None:
    """Continue a prompt with a running server, showing the text as it comes.

    With --neighbors, text on a terminal is coloured by how much of each token's probability came from the datastore,
    and a table says which places of it voted.
    """
    options: GenerationOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stop or [],
        "ignore_eos": ignore_eos,
        "k": k,
        "knn_temperature": knn_temperature,
        "weight": weight,
        "retrieval": not no_retrieval,
        "truncate_prompt": truncate_prompt,
        "neighbors": neighbors,
        "log_probs": neighbors > 0 or json,
    }
    _require_positive("timeout", timeout)
    with _fields_as_options():
        _complete(_standard_input() if prompt == "-" else prompt, target, timeout, options, json)


OPTIONS = {"interpolation_weight": "weight", "off": "no_retrieval", "stop_strings": "stop", "text": "prompt"}
"""Options that have another name than the field of the request that they fill."""


@contextmanager
def _fields_as_options() -> Iterator[None]:
    """A field that the server or the client refuses is named as the option that the user typed."""
    try:
        yield
    except InvalidInput as error:
        name = error.field.rsplit(".", 1)[-1].split("[")[0]
        problem = error.problem.replace("options.truncate_prompt", "--truncate-prompt")
        raise InvalidInput(OPTIONS.get(name, name), problem) from error


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "prompt", f"from standard input is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}."
        ) from error


def _require_positive(option: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise InvalidInput(option, f"is {value:g}, but must be above 0.")


def _complete(prompt: str, target: str, timeout: float | None, options: GenerationOptions, json: bool) -> None:
    from knnlm import console
    from knnlm_server import display
    from knnlm_server.client import GenerationClient

    with GenerationClient(target) as client:
        if json:
            console.print_json(display.completion_fields(client.generate(prompt, timeout=timeout, **options)))
        else:
            display.show_stream(prompt, client.stream(prompt, timeout=timeout, **options), console.out)

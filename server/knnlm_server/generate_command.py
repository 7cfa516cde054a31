"""The subcommand ``knnlm generate``. What needs gRPC is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import Json
from knnlm_server.connection_options import (
    Ca,
    Certificate,
    Datastore,
    Key,
    Reach,
    Target,
    Timeout,
    TokenFile,
    UseTls,
    fields_as_options,
    mix_of,
    require_positive,
    text_of,
)

if TYPE_CHECKING:
    from knnlm_server.client import GenerationClient, GenerationOptions


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.", show_default=False)],
    target: Target = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.", show_default="128")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0: always the most probable token.", show_default="1")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most probable tokens; 0: all.", show_default="0")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most probable tokens of this total; 1: all.", show_default="1")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, as a share of the largest; 0: off.", show_default="0")] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of typical information, up to this total; 1: all.", show_default="1")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeated tokens become less likely; 1: off.", show_default="1")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtracted for each time a token was generated; 0: off.", show_default="0")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted from tokens that were generated; 0: off.", show_default="0")
    ] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Text that is never generated; may be repeated.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.", show_default="a new one")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="End with what there is after so many seconds.", show_default="the server's limit")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Completions to generate.", show_default="1")] = None,
    best_of: Annotated[int | None, typer.Option(help="Generate so many and keep the likeliest.", show_default="--samples")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    datastore: Datastore = None,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours per token.", show_default="the server's")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="the server's")] = None,
    weight: Annotated[float | None, typer.Option(help="λ, the weight of the neighbours, 0 to 1.", show_default="the server's")] = None,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="The base LM alone.")] = False,
    truncate_prompt: Annotated[bool, typer.Option("--truncate-prompt", help="Keep the end of a prompt that is too long.")] = False,
    neighbors: Annotated[int, typer.Option(help="Show this many neighbours of each token, and how much they decided.")] = 0,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Show which documents had a part in the completion, and what of it is copied verbatim.")
    ] = False,
    timeout: Timeout = None,
    token_file: TokenFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    json: Json = False,
) -> None:
    """Continue a prompt with a running server, showing the text as it comes.

    With --neighbors or --evidence, text on a terminal is coloured by how much of each token's probability came from the
    datastore; a table says which places of it voted, another which documents had a part. Several completions are shown
    when all of them have ended.
    """
    require_positive("timeout", timeout)
    options: GenerationOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "bad_words": bad_word,
        "seed": seed,
        "stop_strings": stop,
        "max_seconds": max_seconds,
        "ignore_eos": ignore_eos,
        "k": k,
        "knn_temperature": knn_temperature,
        "weight": weight,
        "retrieval": not no_retrieval,
        "truncate_prompt": truncate_prompt,
        "neighbors": neighbors,
        "evidence": evidence,
        "log_probs": neighbors > 0 or evidence or json,
    }
    with fields_as_options():
        options["datastores"] = mix_of(datastore)
        request = _Request(text_of(prompt), options, samples, best_of, timeout)
        with Reach(target, token_file, tls, ca, certificate, key).client() as client:
            _show(client, request, json)


@dataclass(frozen=True)
class _Request:
    prompt: str
    options: GenerationOptions
    samples: int | None
    best_of: int | None
    timeout: float | None


def _show(client: GenerationClient, request: _Request, json: bool) -> None:
    from knnlm import console
    from knnlm_server import display

    if request.samples is None and request.best_of is None and not json:
        display.show_stream(request.prompt, client.stream(request.prompt, timeout=request.timeout, **request.options), console.out)
        return
    count = 1 if request.samples is None else request.samples
    found = client.samples(request.prompt, count, best_of=request.best_of, timeout=request.timeout, **request.options)
    if not json:
        display.show_completions(request.prompt, found, console.out)
    elif request.samples is None:
        console.print_json(display.completion_fields(found[0]))
    else:
        console.print_json({"completions": [display.completion_fields(completion) for completion in found]})

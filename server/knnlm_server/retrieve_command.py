"""The subcommand ``knnlm retrieve``. What needs gRPC is imported when it runs."""

from __future__ import annotations

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
    from knnlm_server.client import RetrieveOptions


def retrieve(
    context: Annotated[str, typer.Argument(help="Text whose neighbours are wanted; - reads it from standard input.", show_default=False)],
    target: Target = None,
    datastore: Datastore = None,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours that vote, from each datastore.", show_default="the server's")] = None,
    knn_temperature: Annotated[float | None, typer.Option(help="T of softmax(-distance/T).", show_default="the server's")] = None,
    neighbors: Annotated[int | None, typer.Option(help="Show at most this many.", show_default="all that vote")] = None,
    truncate_context: Annotated[bool, typer.Option("--truncate-context", help="Keep the end of a text that is too long.")] = False,
    timeout: Timeout = None,
    token_file: TokenFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    json: Json = False,
) -> None:
    """Show the places of a running server's datastores that would vote on the token after a text."""
    from knnlm import console
    from knnlm_server import display

    require_positive("timeout", timeout)
    with fields_as_options("context"), Reach(target, token_file, tls, ca, certificate, key).client() as client:
        options: RetrieveOptions = {
            "datastores": mix_of(datastore),
            "k": k,
            "knn_temperature": knn_temperature,
            "neighbors": neighbors,
            "truncate_context": truncate_context,
        }
        found = client.retrieve(text_of(context), timeout=timeout, **options)
        if json:
            console.print_json(display.retrieved_fields(found))
        else:
            console.out.print(display.place_table(found.neighbors, console.out.width))

"""Options by which the commands reach a server, shared by those that do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.errors import InvalidInput

if TYPE_CHECKING:
    from knnlm_server.client import GenerationClient

TOKEN_VARIABLE = "KNNLM_TOKEN"

Target = Annotated[
    list[str] | None,
    typer.Option(help="The server, as HOST:PORT; may be repeated: each call goes to one that answers.", show_default="localhost:50051"),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help=f"File that holds the bearer token the server asks for. Unset: the environment's {TOKEN_VARIABLE}, if any.", show_default=False
    ),
]
UseTls = Annotated[bool, typer.Option("--tls", help="Talk TLS, trusting well-known authorities; --ca implies it.")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of who signed the server's certificate.", show_default=False)]
Certificate = Annotated[
    Path | None, typer.Option(help="PEM file of your own certificate, for servers that ask (mTLS).", show_default=False)
]
Key = Annotated[Path | None, typer.Option(help="PEM file of its key.", show_default=False)]
Timeout = Annotated[float | None, typer.Option(help="Seconds after which to give up.", show_default="never")]
Datastore = Annotated[
    list[str] | None,
    typer.Option(help="Datastore to search, as NAME or NAME=WEIGHT; may be repeated for a mix.", show_default="the server's first"),
]


@dataclass(frozen=True)
class Reach:
    """How a server is reached, as the user said it."""

    target: list[str] | None
    token_file: Path | None
    tls: bool
    ca: Path | None
    certificate: Path | None
    key: Path | None

    @contextmanager
    def client(self) -> Iterator[GenerationClient]:
        """A client, closed at the end; raises :class:`InvalidInput` where an option can't be used."""
        from knnlm_server.client import GenerationClient, Tls

        files = self.ca, self.certificate, self.key
        tls = Tls(*files) if self.tls or any(files) else None
        with GenerationClient(self.target or ["localhost:50051"], tls=tls, token=self._token()) as client:
            yield client

    def _token(self) -> str | None:
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE) or None
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise InvalidInput("token_file", f"is {self.token_file}, which can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:  # what it says of the content would show the token
            raise InvalidInput("token_file", f"is {self.token_file}, which is not UTF-8.") from error


def mix_of(datastores: list[str] | None) -> dict[str, float] | list[str] | None:
    """Datastores from what the user typed, ``NAME`` or ``NAME=WEIGHT`` each; 1 where only some have weights."""
    if not datastores or not any("=" in datastore for datastore in datastores):
        return datastores
    pairs = [datastore.rpartition("=") if "=" in datastore else (datastore, "=", "1") for datastore in datastores]
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise InvalidInput("datastore", "names a datastore twice.")
    return {name: _weight(name, weight) for name, _, weight in pairs}


def _weight(name: str, weight: str) -> float:
    try:
        return float(weight)
    except ValueError as error:
        raise InvalidInput("datastore", f"is {name}={weight}, but the weight must be a number.") from error


OPTIONS = {
    "interpolation_weight": "weight",
    "off": "no_retrieval",
    "stop_strings": "stop",
    "bad_words": "bad_word",
    "datastores": "datastore",
    "num_samples": "samples",
    "token": "token_file",
    "text": "prompt",
}
"""Options that have another name than the field of the request that they fill."""


@contextmanager
def fields_as_options(text: str = "prompt") -> Iterator[None]:
    """A field that the server or the client refuses is named as the option that the user typed; ``text`` is the argument's."""
    try:
        yield
    except InvalidInput as error:
        parts = [part.split("[")[0] for part in error.field.split(".")]
        # Of a part of a list, the list is what the user typed.
        name = next((part for part in parts if part in ("bad_words", "datastores")), parts[-1])
        problem = error.problem.replace("options.truncate_prompt", "--truncate-prompt").replace("truncate_context", "--truncate-context")
        raise InvalidInput({**OPTIONS, "text": text}.get(name, name), problem) from error


def text_of(argument: str) -> str:
    """The argument, or what stands on standard input where it is ``-``; raises :class:`InvalidInput`."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("standard input", f"is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.") from error


def require_positive(option: str, value: float | None) -> None:
    """Raise where a number is not above 0."""
    if value is not None and not value > 0:
        raise InvalidInput(option, f"is {value:g}, but must be above 0.")

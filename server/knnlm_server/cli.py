"""This package's subcommands of ``knnlm``. What needs torch or gRPC is imported when a command runs."""

from __future__ import annotations

import typer

from knnlm_server import configuration
from knnlm_server.generate_command import generate
from knnlm_server.retrieve_command import retrieve
from knnlm_server.serve_command import serve


def register(app: typer.Typer) -> None:
    """Add this package's subcommands to the command ``knnlm``."""
    app.command(context_settings={"auto_envvar_prefix": configuration.PREFIX})(serve)
    app.command()(generate)
    app.command()(retrieve)

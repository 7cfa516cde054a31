"""The command's border: what ends it gets one line and the right exit status."""

from __future__ import annotations

import pytest
import typer

from knnlm import cli
from knnlm.errors import CorpusError, InvalidInput


def ending_with(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (InvalidInput("max_length", "is 1."), 2, "error: --max-length is 1."),
        (InvalidInput("options.detail", "is odd."), 2, "error: options.detail is odd."),
        (CorpusError("There is no text."), 1, "error: There is no text."),
        (OSError(28, "No space left on device", "store/keys.npy"), 1, "error: store/keys.npy: No space left on device."),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(ending_with(error), []) == status
    assert capsys.readouterr().err.strip() == line


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(ending_with(ZeroDivisionError()), [])

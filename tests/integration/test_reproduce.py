"""The recipes in docs/reproduce can't be run by a test, but their commands are commands, with options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from knnlm import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "reproduce").glob("*.md"))
COMMANDS = [(page.name, line) for page in PAGES for line in re.findall(r"^\$ (knnlm .*)$", page.read_text(), re.MULTILINE)]


def test_there_are_recipes() -> None:
    assert {page.name for page in PAGES} >= {"law-mt-style.md", "wikitext-103-gpt2.md", "wikitext-103-published.md"}
    assert {name for name, _ in COMMANDS} == {page.name for page in PAGES}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_its_options_are_understood(page: str, line: str) -> None:
    group = typer.main.get_command(cli.load_commands())
    _, name, *arguments = shlex.split(line)
    command = group.commands[name]  # type: ignore[attr-defined]
    # Without running it; an unknown option or a value of another type is an error.
    context = command.make_context(name, arguments)
    assert context.params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_that_its_figures_were_not_measured_here(page: Path) -> None:
    text = " ".join(page.read_text().split())
    assert re.search(r"\*\*No figure .*?was measured with knnlm\*\*", text)
    for heading in ("## Figures", "## Commands", "## What differs from the original", "## Costs"):
        assert heading in page.read_text()

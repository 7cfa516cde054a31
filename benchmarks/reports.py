"""How results are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from knnlm import console


def say(text: str) -> None:
    """A line of its own."""
    console.out.print(text, markup=False)


def print_facts(title: str, facts: Mapping[str, float | str]) -> None:
    """A table of names and values."""
    print_table(title, ["", ""], list(facts.items()))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[float | str]]) -> None:
    """A table whose numbers are shown to as many digits as they deserve."""
    console.out.print(console.table(title, columns, [[shown(value) for value in row] for row in rows]))


def shown(value: float | str) -> str:
    """Whole numbers from 100 on, else three digits that count; text as it is."""
    if isinstance(value, str):
        return value
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"

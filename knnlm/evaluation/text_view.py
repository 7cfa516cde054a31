"""Passages on a terminal: each token coloured by the change of its log-probability, then the neighbours that caused it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.table import Table
from rich.text import Text

from knnlm import console
from knnlm.evaluation.passages import Passage, ShownToken, most_telling
from knnlm.evaluation.visible_text import visible

STEPS = (0.1, 0.7, 2.0)
"""Nats from which a token is coloured, coloured more, and most."""
TOKENS, NEIGHBORS = 6, 2
BETTER = ("#6aaed6", "#2f7fb8", "#0b559f")
WORSE = ("#fdb07a", "#e8702a", "#b33f06")


def show_passages_text(name: str, passages: Sequence[Passage]) -> None:
    """Print the passages of a datastore, under its ``name`` (empty: it is the only one), with a legend."""
    if name:
        console.out.print(Text(f"\n{name}", style="bold"), soft_wrap=True)
    if not passages:
        console.out.print("no passage to show: nothing changed")
        return
    console.out.print(_legend())
    for passage in passages:
        heading = f"\n{visible(passage.document)}, from token {passage.position:,}: {passage.gain:+.1f} nats"
        console.out.print(Text(heading, style="bold"), soft_wrap=True)
        console.out.print(Text.assemble(*((visible(token.text), style_of(token.gain)) for token in passage.tokens)), soft_wrap=True)
        console.out.print(_neighbors(passage))


def style_of(gain: float) -> Style:
    """The colour of a change in nats; what became less probable is underlined as well, for those who see no colours."""
    level = sum(abs(gain) >= step for step in STEPS)
    if not level:
        return Style.null()
    ground = (BETTER if gain > 0 else WORSE)[level - 1]
    return Style(color="black" if level == 1 else "white", bgcolor=ground, underline=gain < 0)


def _legend() -> Text:
    marks = [*((f" -{step:g} ", style_of(-step)) for step in STEPS[::-1]), *((f" +{step:g} ", style_of(step)) for step in STEPS)]
    return Text.assemble("change of log-probability, nats: ", *marks, " (underlined: less probable)")


def _neighbors(passage: Passage) -> Table:
    rows = [row for token in most_telling(passage, TOKENS) for row in _rows(token)]
    return console.table("", ["token", "change", "λ", "weight", "distance", "where", "left context [token voted for]"], rows, right=False)


def _rows(token: ShownToken) -> list[list[str]]:
    """One for each neighbour, the token itself in the first alone."""
    rows = []
    for place, neighbor in enumerate(token.neighbors[:NEIGHBORS]):
        where = neighbor.document if neighbor.line is None else f"{neighbor.document}:{neighbor.line}"
        context = " ".join(visible(neighbor.left_context).split())
        own = [repr(token.text), f"{token.gain:+.2f}", f"{token.weight:.2f}"] if not place else ["", "", ""]
        rows.append([*own, f"{neighbor.weight:.0%}", f"{neighbor.distance:.4g}", visible(where), f"{context} [{visible(neighbor.token)}]"])
    return rows

"""How ``knnlm generate`` shows a completion: text as it streams, a table of neighbours, or the fields of a JSON object. Knows no gRPC."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from knnlm_server.sequence import FinishEvent, NeighborEvidence, TokenEvent

if TYPE_CHECKING:
    from knnlm_server.client import Completion

# What the columns beside place and left context take, roughly, and how wide a place is where there is room.
_OTHER_COLUMNS = 58
_PLACE_WIDTH = 34
_LEAST_WIDTH = 12
# From nothing (the terminal's own colour) to all of a token's probability.
_SHARE_STYLES = ((0.1, Style()), (0.35, Style(color="yellow")), (0.65, Style(color="green")), (math.inf, Style(color="green", bold=True)))


def show_stream(prompt: str, events: Iterable[TokenEvent | FinishEvent], console: Console) -> None:
    """Print the text as it comes, then the table of neighbours if there are any. The prompt is shown on a terminal only."""
    tokens: list[TokenEvent] = []
    for event in events:
        if not tokens and console.is_terminal:  # only now, since a refused request shows nothing
            _write(console, prompt, Style(dim=True))
        if isinstance(event, TokenEvent):
            tokens.append(event)
        _write(console, event.text, share_style(event.knn_share) if isinstance(event, TokenEvent) else Style())
    console.print()
    if any(token.neighbors for token in tokens):
        console.print(_legend())
        console.print(neighbor_table(tokens, console.width))


def share_style(share: float | None) -> Style:
    """The style of a token of which the neighbours decided ``share`` (0 to 1; None: not known)."""
    return next(style for limit, style in _SHARE_STYLES if (share or 0.0) < limit)


def neighbor_table(tokens: Iterable[TokenEvent], width: int) -> Table:
    """One row for each neighbour, under the token at whose step it voted; ``width`` is what a line holds."""
    place = max(_LEAST_WIDTH, min(_PLACE_WIDTH, width // 4))
    context = max(_LEAST_WIDTH, width - _OTHER_COLUMNS - place)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    table.add_column("token", no_wrap=True)
    for name in ("p", "kNN", "weight", "distance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold", min_width=place)
    table.add_column("left context", justify="right", no_wrap=True)
    table.add_column("voted for", no_wrap=True)
    for token in tokens:
        head = (Text(repr(token.token_text), share_style(token.knn_share)), _probability(token.log_prob), _percent(token.knn_share))
        for row, neighbor in enumerate(token.neighbors):
            table.add_row(*(head if row == 0 else ("", "", "")), *_neighbor_cells(neighbor, context))
    return table


def completion_fields(completion: Completion) -> dict[str, Any]:
    """A completion as JSON has it; None where a value was not asked for or does not exist."""
    return asdict(completion) | {"finish_reason": completion.finish_reason.value}


def _neighbor_cells(neighbor: NeighborEvidence, context_width: int) -> tuple[str | Text, ...]:
    where = neighbor.source or neighbor.document_id
    return (
        _percent(neighbor.weight),
        f"{neighbor.distance:.2f}",
        Text(_harmless(where if neighbor.line is None else f"{where}:{neighbor.line}")),
        Text(_harmless(" ".join(neighbor.left_context.split())[-context_width:])),
        Text(repr(neighbor.text)),
    )


def _write(console: Console, text: str, style: Style) -> None:
    """Exactly the text where it goes to a file or pipe; on a terminal styled, and with no power over the terminal."""
    if console.is_terminal:
        console.print(Text(_harmless(text), style), end="", soft_wrap=True)
    else:
        console.file.write(text)
        console.file.flush()


def _harmless(text: str) -> str:
    """Control characters but newline and tab as their Unicode pictures: a model or corpus may hold escape sequences."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\n\t" else c for c in text)


def _legend() -> Text:
    legend = Text("from the neighbours: ")
    low = 0.0
    for limit, style in _SHARE_STYLES:
        high = min(limit, 1.0)
        legend.append(f" {low:.0%} to {high:.0%} ", style)
        low = high
    return legend


def _probability(log_prob: float | None) -> str:
    return "" if log_prob is None else f"{math.exp(log_prob):.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"

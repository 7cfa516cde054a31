"""How ``knnlm generate`` shows a completion: text as it streams, a table of neighbours, or the fields of a JSON object. Knows no gRPC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from knnlm_server.sequence import CompletionEvidence, DocumentWeight, FinishEvent, NeighborEvidence, TokenEvent

if TYPE_CHECKING:
    from knnlm_server.client import Completion, Retrieved

# What the columns beside place and left context take, roughly, and how wide a place is where there is room.
_OTHER_COLUMNS = 58
_PLACE_WIDTH = 34
_LEAST_WIDTH = 12
# A document that contributed less would stand in the table with 0.00 tokens.
_LEAST_TOKENS = 0.005
# Of control characters; those from 0x80 on, which some terminals obey as well, have none.
_PICTURES = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)
# From nothing (the terminal's own colour) to all of a token's probability.
_SHARE_STYLES = ((0.1, Style()), (0.35, Style(color="yellow")), (0.65, Style(color="green")), (math.inf, Style(color="green", bold=True)))


def show_stream(prompt: str, events: Iterable[TokenEvent | FinishEvent], console: Console) -> None:
    """Print the text as it comes, then what was asked for beside it. The prompt is shown on a terminal only."""
    tokens: list[TokenEvent] = []
    evidence: CompletionEvidence | None = None
    for event in events:
        if not tokens and console.is_terminal:  # only now, since a refused request shows nothing
            _write(console, prompt, Style(dim=True))
        if isinstance(event, TokenEvent):
            tokens.append(event)
        else:
            evidence = event.evidence
        _write(console, event.text, share_style(event.knn_share) if isinstance(event, TokenEvent) else Style())
    console.print()
    _show_sources(tokens, evidence, console)


def show_completions(prompt: str, completions: Sequence[Completion], console: Console) -> None:
    """Print whole completions, each under its number where there are several."""
    if console.is_terminal:
        _write(console, prompt + "\n", Style(dim=True))
    for completion in completions:
        if len(completions) > 1:
            console.print(f"== sample {completion.sample}", highlight=False)
        _write(console, completion.text, Style())
        console.print()
        _show_sources(completion.tokens, completion.evidence, console)


def _show_sources(tokens: Sequence[TokenEvent], evidence: CompletionEvidence | None, console: Console) -> None:
    if any(token.neighbors for token in tokens):
        console.print(_legend())
        console.print(neighbor_table(tokens, console.width))
    if evidence is not None:
        _show_evidence(evidence, console)


def _show_evidence(evidence: CompletionEvidence, console: Console) -> None:
    console.print(f"retrieval changed {evidence.changed_share:.0%} of the tokens; searched for {evidence.searched_tokens}", highlight=False)
    shown = [document for document in evidence.documents if document.weight >= _LEAST_TOKENS]
    if shown:
        console.print(document_table(shown))
    if few := len(evidence.documents) - len(shown):
        console.print(f"less than {_LEAST_TOKENS:g} tokens each from {few} more, which --json lists", highlight=False)
    run = evidence.verbatim
    if run is not None:
        place = _place(run.document_id or run.source, run.line)
        console.print(
            Text(f"longest verbatim run: {run.tokens} tokens from {run.datastore} {place}: {_harmless(run.text)!r}"), soft_wrap=True
        )


def document_table(documents: Iterable[DocumentWeight]) -> Table:
    """One row for each document, by what it contributed."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in ("datastore", "document", "source"):
        table.add_column(name, overflow="fold")
    for document in documents:
        names = (document.datastore, document.document_id, document.source)
        table.add_row(f"{document.weight:.2f}", *(Text(_harmless(name)) for name in names))
    return table


def place_table(neighbors: Iterable[NeighborEvidence], width: int) -> Table:
    """One row for each neighbour of a context; ``width`` is what a line holds."""
    table, context = _places_table((), width)
    for neighbor in neighbors:
        table.add_row(*_neighbor_cells(neighbor, context))
    return table


def share_style(share: float | None) -> Style:
    """The style of a token of which the neighbours decided ``share`` (0 to 1; None: not known)."""
    return next(style for limit, style in _SHARE_STYLES if (share or 0.0) < limit)


def neighbor_table(tokens: Iterable[TokenEvent], width: int) -> Table:
    """One row for each neighbour, under the token at whose step it voted; ``width`` is what a line holds."""
    table, context = _places_table(("token", "p", "kNN"), width)
    for token in tokens:
        head = (Text(repr(token.token_text), share_style(token.knn_share)), _probability(token.log_prob), _percent(token.knn_share))
        for row, neighbor in enumerate(token.neighbors):
            table.add_row(*(head if row == 0 else ("", "", "")), *_neighbor_cells(neighbor, context))
    return table


def _places_table(before: Sequence[str], width: int) -> tuple[Table, int]:
    """An empty table of neighbours, with columns before those of a neighbour, and the characters of left context it has room for."""
    place = max(_LEAST_WIDTH, min(_PLACE_WIDTH, width // 4))
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    for name in before:
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    for name in ("weight", "distance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold", min_width=place)
    table.add_column("left context", justify="right", no_wrap=True)
    table.add_column("voted for", no_wrap=True)
    return table, max(_LEAST_WIDTH, width - _OTHER_COLUMNS - place)


def completion_fields(completion: Completion) -> dict[str, Any]:
    """A completion as JSON has it; None where a value was not asked for or does not exist."""
    return asdict(completion) | {"finish_reason": completion.finish_reason.value}


def retrieved_fields(found: Retrieved) -> dict[str, Any]:
    """The neighbours of a context as JSON has them."""
    return asdict(found)


def _neighbor_cells(neighbor: NeighborEvidence, context_width: int) -> tuple[str | Text, ...]:
    return (
        _percent(neighbor.weight),
        f"{neighbor.distance:.2f}",
        Text(_place(neighbor.document_id or neighbor.source, neighbor.line)),
        Text(_harmless(" ".join(neighbor.left_context.split())[-context_width:])),
        Text(repr(neighbor.text)),
    )


def _place(where: str, line: int | None) -> str:
    return _harmless(where if line is None else f"{where}:{line}")


def _write(console: Console, text: str, style: Style) -> None:
    """Exactly the text where it goes to a file or pipe; on a terminal styled, and with no power over the terminal."""
    if console.is_terminal:
        console.print(Text(_harmless(text), style), end="", soft_wrap=True)
    else:
        console.file.write(text)
        console.file.flush()


def _harmless(text: str) -> str:
    """Control characters but newline and tab as pictures, those of 8 bits too: a model or corpus may hold escape sequences."""
    return text.translate(_PICTURES)


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

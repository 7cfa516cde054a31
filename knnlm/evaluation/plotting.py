"""Plots: matplotlib figures without a window, and as SVG that goes into a page. Knows nothing of what is plotted.

matplotlib is an extra; it is imported when a plot is made. Ink has one placeholder colour, which becomes the text colour
of the page around an SVG, so that it reads on light and dark ground.
"""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnlm.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Replaced by the page's text colour in an SVG; as good as black elsewhere."""
BASE, MIXTURE, THIRD, FOURTH = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Okabe and Ito's colours, which people of every colour vision tell apart, on light and on dark ground."""
SERIES = (MIXTURE, BASE, THIRD, FOURTH, "#e69f00", "#56b4e9")
SUFFIXES = (".svg", ".png", ".pdf")
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.facecolor", "legend.facecolor", "legend.edgecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a8a8a",
    "grid.alpha": 0.35,
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "knnlm",
}


def require_matplotlib() -> Any:
    """The package; raises :class:`MissingDependency` naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency('matplotlib is not installed, which draws plots; install knnlm with its extra: "knnlm[report]".') from error
    return matplotlib


def check_plot_file(path: Path, field: str) -> None:
    """Raise :class:`InvalidInput` for a file that no plot can be written to, :class:`MissingDependency` without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(field, f"is {path}, but its name must end in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise InvalidInput(field, f"is {path}, but there is no folder {path.parent}.")
    require_matplotlib()


def subplots(columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure of so many inches with a row of axes, styled."""
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its name says, on a white ground."""
    with require_matplotlib().rc_context(_STYLE):
        figure.savefig(path, facecolor="white", dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def svg(figure: Figure, title: str, prefix: str) -> str:
    """An ``<svg>`` element that stands in a page: no XML head, no links, the page's text colour, ``title`` for those who
    can't see it. Its ids begin with ``prefix``, so that several share a page. The same figure gives the same text."""
    written = io.StringIO()
    with require_matplotlib().rc_context(_STYLE):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    element = "<svg" + written.getvalue().partition("<svg")[2]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element).replace("xlink:href", "href")
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", element)
    named = f'<svg role="img" aria-label="{escape(title)}"'
    return element.replace("<svg", named, 1).replace(INK, "currentColor").strip()

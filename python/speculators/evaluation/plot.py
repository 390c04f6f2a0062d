"""The plot of a report: which share of the drafts was accepted up to each position.

It is drawn without pyplot, whose figures and settings belong to whoever uses this library.
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 800, 500
"""Pixels."""

_DPI = 100
_MARKERS = "osD^vP*X"


def acceptance_plot(curves: Mapping[str, Sequence[float]]) -> bytes:
    """Draws one line for each drafter.

    Args:
        curves: the label of a drafter to its acceptance at positions 1, 2, ..., from 0 to 1; one
            without any is named in the legend alone.

    Returns:
        A PNG of ``WIDTH`` x ``HEIGHT`` pixels.
    """
    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    longest = max((len(curve) for curve in curves.values()), default=0)
    lines = []
    for number, curve in enumerate(curves.values()):
        lines += axes.plot(
            range(1, len(curve) + 1),
            list(curve),
            marker=_MARKERS[number % len(_MARKERS)],
            color=f"C{number}",
            linewidth=2,
            clip_on=False,
        )
    axes.set_title("Drafted tokens that the verifier accepted")
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share of the drafts")
    axes.set_xlim(0.75, max(longest, 2) + 0.25)
    axes.set_ylim(0.0, 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(lines, [label.replace("$", r"\$") for label in curves])  # no formulas
    buffer = io.BytesIO()
    # The whole figure, whatever the user's matplotlibrc says of trimming.
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=_DPI, bbox_inches=figure.bbox_inches
    )
    return buffer.getvalue()

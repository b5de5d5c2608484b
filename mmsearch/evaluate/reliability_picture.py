"""A picture of how honest a probability is: stated against true, and how many pairs there are of each.

Decisions:
- An honest probability lies on the diagonal. The bars between it and the points are what the expected calibration
  error adds up, weighted by the counts in the panel below (DeGroot and Fienberg 1983; Guo et al. 2017, figure 1).
- A point's whisker is the 95 % interval of the bin's share (Wilson 1927): four pairs may lie far off by chance.
- Nothing global of matplotlib is touched: no pyplot, no backend setting, no open window.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from mmsearch.evaluate.calibration_error import BINS, Bin, expected_calibration_error, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _DPI = 5.0, 6.2, 110  # inches, dots an inch
_Z = 1.96  # of a 95 % interval


def draw_reliability(p: ArrayLike, y: ArrayLike, png: Path, *, title: str = "", bins: int = BINS) -> None:
    """Draw the probabilities `p` (n,) in [0, 1] against the labels `y` (n,) of 0 and 1 as the picture `png`.

    Raises `InputError` for other values and for none.
    """
    table = reliability(p, y, bins)
    error = expected_calibration_error(p, y, bins)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_shares(above, table)
    _draw_counts(below, table)
    said = f"ECE {100 * error:.1f} %, {sum(one.count for one in table)} pairs"
    above.set_title(f"{title}: {said}" if title else said, fontsize=10)
    temporary = png.with_name(png.name + ".tmp")  # a viewer never sees half a picture
    FigureCanvasAgg(figure)
    figure.savefig(temporary, format="png")
    temporary.replace(png)


def _draw_shares(axes: Axes, table: tuple[Bin, ...]) -> None:
    means, shares = [one.mean for one in table], [one.share for one in table]
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="honest")
    axes.vlines(means, means, shares, color="C3", linewidth=7, alpha=0.3, label="error")
    ends = [_wilson(one) for one in table]
    whiskers = [
        [share - low for share, (low, _) in zip(shares, ends, strict=True)],
        [high - share for share, (_, high) in zip(shares, ends, strict=True)],
    ]
    axes.errorbar(means, shares, yerr=whiskers, color="C0", marker="o", markersize=4, linewidth=1.2, label="measured")
    axes.set_ylabel("share of pairs that match", fontsize=8)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=7, framealpha=0.6, loc="upper left")
    _plain(axes)


def _draw_counts(axes: Axes, table: tuple[Bin, ...]) -> None:
    lows, counts = [one.low for one in table], [one.count for one in table]
    axes.bar(lows, counts, width=[one.high - one.low for one in table], align="edge", color="C0", alpha=0.6)
    axes.set_xlabel("stated probability", fontsize=8)
    axes.set_ylabel("pairs", fontsize=8)
    axes.set_xlim(-0.02, 1.02)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _wilson(one: Bin) -> tuple[float, float]:
    """95 % interval of a bin's share (Wilson 1927); it holds the share and stays in [0, 1]."""
    n, share = one.count, one.share
    middle = (share + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))

"""A picture of a run: loss, learning rate, temperature and validation hit@k over steps.

Decisions:
- It is drawn from `metrics.jsonl` alone, so that it can be drawn again at any time, also of a run that died. During a
  run that is after an epoch, and seldom: short epochs would spend more time on pictures than on steps.
- What a panel shows goes by the names in the journal; a panel without numbers is left out.
- Losses of single batches jump: they are drawn faint, under their running mean. All else is drawn as it is.
- Curves of one k share a colour; the directions differ by their line.
- Nothing global of matplotlib is touched: no pyplot, no backend setting, no open window.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import InputError
from mmsearch.train.journal import Line, read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
SELDOM_S = 30.0
"""How long a run goes on between two pictures."""
_WIDTH, _HEIGHT, _DPI = 11.0, 3.2, 110  # inches, inches a row of panels, dots an inch
_ROUGH = 60  # more points than these are drawn smoothed
_LINES = ("-", "--", ":", "-.")
_MEAN_OF = 0.02  # the running mean forgets over this share of the points


@dataclass(frozen=True, slots=True)
class _Panel:
    """`shows`: which names of the journal. `factor`: from the journal's unit to the panel's."""

    title: str
    shows: Callable[[str], bool]
    factor: float = 1.0
    smooth: bool = False


PANELS = (
    _Panel("loss", lambda name: name.rpartition("/")[2].startswith("loss"), smooth=True),
    _Panel("validation, per cent", lambda name: "hit@" in name, factor=100.0),
    _Panel("learning rate", lambda name: name.startswith("learning_rate")),
    _Panel("logit scale (1 / temperature)", lambda name: name == "logit_scale"),
)


def draw_curves(metrics: Path, png: Path) -> None:
    """Draw the journal `metrics` (a `metrics.jsonl`) as the picture `png`.

    Names that are shown: `loss` and what begins with it (also behind a slash, `val/loss`), whatever holds `hit@`
    (shares in [0, 1]), `learning_rate` and what begins with it, `logit_scale`. Raises `InputError` when the journal
    holds none of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_journal(metrics)
    found = [(panel, curves) for panel in PANELS if (curves := _curves(lines, panel))]
    if not found:
        raise InputError(str(metrics), expected="logged steps to draw", got="none", do="Train for a step first.")
    rows = math.ceil(len(found) / 2)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * rows), dpi=_DPI, layout="constrained")
    for place, (panel, curves) in enumerate(found, start=1):
        _draw(figure.add_subplot(rows, min(len(found), 2), place), panel, curves)
    temporary = png.with_name(png.name + ".tmp")  # a viewer never sees half a picture
    FigureCanvasAgg(figure)
    figure.savefig(temporary, format="png")
    temporary.replace(png)


class LiveCurves:
    """Draws the journal `metrics` as `curves.png` beside it while a run goes on, at most every `seconds` of `clock`.

    What cannot be drawn or written is left out: no run ends for a picture, and it is drawn again at the end.
    """

    def __init__(
        self, metrics: Path, *, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics, self._clock = metrics, clock
        self._seconds, self._drawn = SELDOM_S if seconds is None else seconds, clock()

    def draw(self) -> None:
        """Draw them if it is long enough since the last time, or since the beginning."""
        if self._clock() - self._drawn >= self._seconds:
            with contextlib.suppress(InputError, OSError):
                draw_curves(self._metrics, self._metrics.with_name(CURVES))
            self._drawn = self._clock()


Curves = dict[str, list[tuple[int, float]]]
"""Name -> (step, value), by step."""


def _curves(lines: list[Line], panel: _Panel) -> Curves:
    curves: Curves = {}
    for line in lines:
        for name, value in line.items():
            if panel.shows(name) and isinstance(value, int | float):
                curves.setdefault(name, []).append((line["step"], float(value)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _draw(axes: Axes, panel: _Panel, curves: Curves) -> None:
    colours: dict[str, str] = {}
    lines: dict[str, str] = {}
    for name, points in sorted(curves.items(), key=lambda curve: _natural(curve[0])):
        group, _, k = name.rpartition("@") if "@" in name else ("", "", name)
        colour = colours.setdefault(k, f"C{len(colours)}")
        line = lines.setdefault(group, _LINES[len(lines) % len(_LINES)])
        steps, values = [step for step, _ in points], [panel.factor * value for _, value in points]
        if panel.smooth and len(points) > _ROUGH:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            values = _running_mean(values)
        dots = "." if len(points) <= _ROUGH else None
        axes.plot(steps, values, color=colour, linestyle=line, marker=dots, label=name)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    if len(curves) > 1:
        axes.legend(fontsize=7, framealpha=0.6)


def _natural(name: str) -> tuple[str, int]:
    """Sorts hit@5 before hit@10."""
    head, _, tail = name.rpartition("@")
    return (head, int(tail)) if tail.isdigit() else (name, 0)


def _running_mean(values: list[float]) -> list[float]:
    """Exponential mean without the bias towards the first value (Kingma and Ba, 2015, section 3)."""
    keep = 1.0 - 1.0 / max(2.0, _MEAN_OF * len(values))
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means

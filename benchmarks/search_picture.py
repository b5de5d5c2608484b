"""The plot of `bench_search.py`: what is found against how fast, a panel a modality of the query."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_MARKS = "osDv^<>Phd*pXH8"
_GREYS = ("0.0", "0.25", "0.4", "0.55", "0.65", "0.75")
_OWN = "mmsearch"
_LOWEST, _HIGHEST = 0.7, 0.999


def draw(curves: dict[str, list[dict[str, Any]]], path: Path, *, target: float, title: str = "") -> None:
    """Write a PNG. `curves`: per method points with `text` and `image`, each with `overlap` and `qps`.

    Points that find less than 0.7 of the neighbours are left out. The axis of the overlap is stretched towards 1.
    Our own methods ("mmsearch ...") are drawn whole and in colours, the others dashed and grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from numpy import linspace

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    names = sorted(curves, key=lambda method: not method.startswith(_OWN))
    own = [method for method in names if method.startswith(_OWN)]
    colours = dict(zip(own, pyplot.get_cmap("turbo")(linspace(0.05, 0.95, len(own))), strict=True))
    for panel, modality in zip(panels, ("text", "image"), strict=True):
        for number, method in enumerate(names):
            pairs = [(min(p[modality]["overlap"], _HIGHEST), p[modality]["qps"]) for p in curves[method]]
            place = number if method in own else number - len(own)
            shown = _best([pair for pair in pairs if pair[0] >= _LOWEST])
            panel.plot(
                [_stretched(overlap) for overlap, _ in shown],
                [speed for _, speed in shown],
                marker=_MARKS[place % len(_MARKS)],
                color=colours.get(method, _GREYS[place % len(_GREYS)]),
                linestyle="-" if method in own else "--",
                linewidth=1.8 if method in own else 1.2,
                markersize=5,
                label=method,
            )
        _axes(panel, modality, target)
    panels[0].set_ylabel("queries a second, two threads")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stretched(overlap: float) -> float:
    """0 for 0, 1 for 0.9, 2 for 0.99."""
    return -math.log10(1 - overlap)


def _best(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without points that another one beats in both."""
    kept: list[tuple[float, float]] = []
    for overlap, speed in sorted(pairs, reverse=True):
        if not kept or speed > kept[-1][1]:
            kept.append((overlap, speed))
    return kept[::-1]


def _axes(panel: Any, modality: str, target: float) -> None:
    ticks = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    panel.set_xticks([_stretched(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    panel.set_xlim(_stretched(_LOWEST) - 0.05, 3.1)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else "")
    panel.axvline(_stretched(target), color="0.75", linewidth=1, zorder=0)
    panel.grid(True, which="major", color="0.92")
    panel.set_title(f"{modality} queries")
    panel.set_xlabel("overlap with exact search, 10 nearest (0.999: and better)")

"""Hits as lines: a table for people, tab-separated or JSON lines for programs, bare paths for `xargs`.

A re-ranked hit has more to show: its probability, and in JSON the parts of its score. Others look as they always did.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmsearch.cli.terminal import as_json, emit, shown

if TYPE_CHECKING:
    from mmsearch.types import Hit


def print_json(hits: Sequence[Hit], *, more: Sequence[Mapping[str, Any]] = ()) -> None:
    """One JSON object a line; `more`: what else each of them says."""
    for place, hit in enumerate(hits):
        emit(as_json({**hit_json(hit), **(more[place] if more else {})}))


def print_paths(hits: Sequence[Hit], *, null: bool) -> None:
    """One path a line, or ended by NUL; exactly as the file system has it unless a person is looking."""
    person = sys.stdout.isatty() and not null
    for hit in hits:
        if hit.item.path is not None:
            sys.stdout.write((shown(hit.item.path) if person else hit.item.path) + ("\0" if null else "\n"))


def print_readable(hits: Sequence[Hit]) -> None:
    """A table on a terminal; `score<TAB>path[<TAB>caption]` in a pipe."""
    if sys.stdout.isatty() and hits:
        print_table(hits)
        return
    for hit in hits:
        cells = [f"{hit.score:.4f}", _one_cell(hit.item.path or hit.item.id)]
        emit("\t".join(cells + [shown(hit.caption or "")] * bool(hit.caption)))


def print_table(hits: Sequence[Hit], *, names_only: bool = False) -> None:
    """Rank, score (of re-ranked hits: probability and cosine), path (or its last part alone), text if one matched."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("rank", justify="right")
    re_ranked = any(hit.probability is not None for hit in hits)
    for name in ("probability", "cosine") if re_ranked else ("score",):
        table.add_column(name, justify="right")
    table.add_column("path", overflow="fold")
    with_text = any(hit.caption for hit in hits)
    if with_text:
        table.add_column("text", overflow="fold")
    for hit in hits:
        path = hit.item.path or hit.item.id
        scores = _both(hit) if re_ranked else [f"{hit.score:.3f}"]
        cells = [str(hit.rank), *scores, os.path.basename(path) if names_only else path]
        table.add_row(*(Text(shown(cell)) for cell in cells + [hit.caption or ""] * with_text))
    Console(file=sys.stdout, highlight=False).print(table)


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as JSON values; `caption` is the text that matched, else the item's first one, else null."""
    item = hit.item
    return {
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "id": item.id,
        "path": item.path,
        "modality": str(hit.modality),
        "caption": hit.caption or (item.captions[0] if item.captions else None),
        "metadata": dict(item.metadata),
        **_second_stage(hit),
    }


def _second_stage(hit: Hit) -> dict[str, Any]:
    if hit.probability is None:
        return {}
    parts = {name: round(value, 6) for name, value in hit.parts.items()}
    return {"probability": round(hit.probability, 6), "parts": parts}


def _both(hit: Hit) -> list[str]:
    """Probability and the better cosine, that of the picture or that of a text; "-" for what is not known."""
    cosines = [hit.parts[name] for name in ("cosine", "text_cosine") if name in hit.parts]
    if hit.probability is None:
        return ["-", f"{hit.score:.3f}"]
    return [f"{hit.probability:.3f}", f"{max(cosines):.3f}" if cosines else "-"]


def _one_cell(text: str) -> str:
    """A path as it is, but for what would break its line or cell (-0 and --json keep that too)."""
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")

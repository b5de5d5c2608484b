"""Hits as lines: a table for people, tab-separated or JSON lines for programs, bare paths for `xargs`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmsearch.cli.terminal import as_json, emit, shown

if TYPE_CHECKING:
    from mmsearch.types import Hit


def print_json(hits: Sequence[Hit]) -> None:
    """One JSON object a line."""
    for hit in hits:
        emit(as_json(hit_json(hit)))


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
    """Rank, score, path (or its last part alone) and, where texts matched, the text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("path", overflow="fold")
    with_text = any(hit.caption for hit in hits)
    if with_text:
        table.add_column("text", overflow="fold")
    for hit in hits:
        path = hit.item.path or hit.item.id
        cells = [str(hit.rank), f"{hit.score:.3f}", os.path.basename(path) if names_only else path]
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
    }


def _one_cell(text: str) -> str:
    """A path as it is, but for what would break its line or cell (-0 and --json keep that too)."""
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")

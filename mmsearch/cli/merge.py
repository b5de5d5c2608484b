"""`mmsearch merge`: several indexes into one, with every vector as it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say

if TYPE_CHECKING:
    from mmsearch.reshard import CopyReport

RESUME = "interrupted: nothing is at the place yet. Run the same command again to go on where it stopped."


@guarded(interrupted=RESUME)
def merge(
    ctx: typer.Context,
    indexes: Annotated[list[str], typer.Argument(metavar="INDEX...", help="Index directories of one model.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the new index goes.")],
    json: options.Json = False,
) -> None:
    """Make one index of several; nothing is encoded again."""
    with Bar("merging", unit="items") as bar:
        done: CopyReport = ctx.obj.merge(indexes, Path(out), progress=bar)
    tell(done, json=json)


def tell(done: CopyReport, *, json: bool) -> None:
    """What was made, for people, and as one JSON object."""
    for line in summary(done):
        say(line)
    if json:
        emit(as_json(report_json(done)))


def summary(report: CopyReport) -> Iterable[str]:
    """What a person wants to know at the end, line by line."""
    rows = report.image_rows + report.text_rows
    made = plural(len(report.indexes), "index", "indexes") + ", " if len(report.indexes) != 1 else ""
    yield f"{report.out}: {made}{plural(report.items, 'item')}, {plural(rows, 'row')} in {report.seconds:.1f} s"
    if report.superseded:
        yield f"{plural(report.superseded, 'item')} left out: another index has a newer one of the same name or id"
    if report.tokens:
        yield f"patch tokens of {plural(report.tokens, 'picture')} copied"
    yield from report.notes


def report_json(report: CopyReport) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "out": os.fspath(report.out),
        "indexes": [os.fspath(path) for path in report.indexes],
        "items": report.items,
        "skipped": report.skipped,
        "image_rows": report.image_rows,
        "text_rows": report.text_rows,
        "superseded": report.superseded,
        "tokens": report.tokens,
        "notes": list(report.notes),
        "seconds": round(report.seconds, 3),
    }

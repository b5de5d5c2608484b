"""`mmsearch push`: bring an engine's collection up to date with an index."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, say
from mmsearch.errors import PartialError

if TYPE_CHECKING:
    from mmsearch.scale.push import PushReport

_NAMED = 20


@guarded(interrupted="interrupted: what was sent stays. Run the same command again to send the rest.")
def push(
    ctx: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory, or the folder of a split one.")],
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="An engine's collection, postgresql://host/db?collection=photos.")
    ],
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when an item was skipped.")] = False,
    json: options.Json = False,
) -> None:
    """Make a collection in a database or vector engine hold what an index holds."""
    with Bar("pushing", unit="items") as bar:
        report: PushReport = ctx.obj.push(index, address, progress=bar)
    say(f"{report.address}: {_counts(report)} in {report.seconds:.1f} s")
    for note in report.notes:
        say(note)
    for skipped in report.skipped[:_NAMED]:
        say(f"skipped {skipped.path}: {skipped.reason} ({skipped.detail})")
    for reason, count in Counter(one.reason for one in report.skipped[_NAMED:]).items():
        say(f"skipped {count} more: {reason}")
    if json:
        emit(as_json(asdict(report)))
    if strict and report.skipped:
        raise PartialError(report.address, expected="every item", got=f"{len(report.skipped)} skipped")


def _counts(report: PushReport) -> str:
    """What was done with how many items."""
    counts = {name: getattr(report, name) for name in ("added", "changed", "removed", "unchanged")}
    counts["skipped"] = len(report.skipped)
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing to do"

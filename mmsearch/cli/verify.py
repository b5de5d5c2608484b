"""`mmsearch verify`: is every byte of an index what was written?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mmsearch.cli import options
from mmsearch.cli.places import chosen_index
from mmsearch.cli.terminal import as_json, emit, guarded, plural, shown
from mmsearch.errors import IndexDamagedError

if TYPE_CHECKING:
    from mmsearch.store import Problem


@guarded()
def verify(ctx: typer.Context, index: options.Index = None, json: options.Json = False) -> None:
    """Compare an index with its checksums; exits with 4 if damaged."""
    path = chosen_index(index, ctx.obj)
    problems: list[Problem] = ctx.obj.verify(path)
    if json:
        found = [{"file": p.file, "what": p.what, "repair": p.repair} for p in problems]
        emit(as_json({"index": str(path), "ok": not problems, "problems": found}, indent=2))
    else:
        for problem in problems:
            emit(shown(f"{problem.file}: {problem.what}. {problem.repair}"))
        if not problems:
            emit(shown(f"{path}: ok"))
    if problems:
        raise IndexDamagedError(
            str(path), got=plural(len(problems), "problem"), do="What repairs each of them is said above."
        )

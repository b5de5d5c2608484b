"""`mmsearch reindex`: give an index another model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.bridge import tell_bridge
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say
from mmsearch.errors import InputError, UsageError

if TYPE_CHECKING:
    from mmsearch.reindex import ReindexReport

RESUME = "interrupted: the index is as it was, and what was encoded is kept. Run the same command again to go on."
SHOWN_PATHS = 3


@guarded(interrupted=RESUME)
def reindex(
    ctx: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index directory.")],
    model: options.NewModel = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Drop items that cannot be encoded again, and switch.")
    ] = False,
    bridge: Annotated[
        bool, typer.Option("--bridge", help="First make a bridge, so that the new model answers meanwhile.")
    ] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Give up a reindexing that has begun.")] = False,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write a JSON report with every missing item.")
    ] = None,
    json: options.Json = False,
    device: options.OnDevice = options.Device.AUTO,
) -> None:
    """Encode an index anew with another model, and switch to it in one step."""
    if abort:
        _abort(ctx, index, model)
        return
    if model is None:
        do = "Name a directory or a hub name; 'bundled' is the model that comes with mmsearch."
        raise UsageError("--model", expected="the new model", got="none", do=do)
    given = {"batch_size": batch_size, "workers": workers}
    with Bar("reindexing", unit="items") as bar:
        if bridge:
            made = ctx.obj.bridge(Path(index), model=model, device=device.value, anew=False, progress=bar, **given)
            tell_bridge(made, json=False)
        done: ReindexReport = ctx.obj.reindex(
            Path(index), model=model, device=device.value, drop_missing=drop_missing, progress=bar, **given
        )
    _tell(done, report=report, json=json)


def _abort(ctx: typer.Context, index: str, model: str | None) -> None:
    if model is not None:
        raise UsageError("--abort", expected="no --model", got=model)
    was = ctx.obj.abort_reindex(Path(index))
    say(f"{index}: the reindexing was given up" if was else f"{index}: no reindexing has begun")


def _tell(done: ReindexReport, *, report: str | None, json: bool) -> None:
    """The summary, the report file, the JSON object; `InputError` when the index has its old model still."""
    for line in summary(done):
        say(line)
    if report:
        _write(report, as_json(report_json(done), indent=2) + "\n")
    if json:
        emit(as_json(report_json(done)))
    if not done.switched:
        raise InputError(
            os.fspath(done.index),
            expected="every item encoded again",
            got=f"{plural(len(done.missing), 'item')} that cannot be; the index has its old model",
            do="Bring them back and run the same command again, or add --drop-missing to go on without them.",
        )


def report_json(report: ReindexReport) -> dict[str, Any]:
    """The report as JSON values; every missing item is in it."""
    return {
        "index": os.fspath(report.index),
        "before": report.before,
        "after": report.after,
        "switched": report.switched,
        "items": report.items,
        "kept": report.kept,
        "encoded_images": report.encoded_images,
        "encoded_texts": report.encoded_texts,
        "tokens": report.tokens,
        "missing": [{"path": s.path, "reason": str(s.reason), "detail": s.detail} for s in report.missing],
        "notes": list(report.notes),
        "seconds": round(report.seconds, 3),
    }


def summary(report: ReindexReport) -> Iterable[str]:
    """What a person wants to know at the end, line by line."""
    new = f"{report.encoded_images} pictures and {report.encoded_texts} texts encoded"
    kept = f", {report.kept} items kept of an earlier run" if report.kept else ""
    yield f"{report.index}: {report.before} -> {report.after}, {new}{kept} in {report.seconds:.1f} s"
    if report.missing:
        were = "was" if len(report.missing) == 1 else "were"
        fate = f"{were} dropped" if report.switched else "cannot be encoded again"
        yield f"{plural(len(report.missing), 'item')} {fate} (--report FILE lists all):"
        for reason, count in Counter(one.reason for one in report.missing).most_common():
            yield f"  {count} {reason}"
            for one in [one for one in report.missing if one.reason == reason][:SHOWN_PATHS]:
                yield f"      {one.path}" + (f": {one.detail}" if one.detail else "")
            if count > SHOWN_PATHS:
                yield f"      ... and {count - SHOWN_PATHS} more"
    if report.switched:
        yield f"the index has the model {report.after}"
    yield from report.notes


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(path, expected="a file that can be written", got=error.strerror or str(error)) from error

"""`mmsearch import`: bring vectors that another program made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, say
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.exchange.reports import ImportReport

RESUME = "interrupted: what was committed is kept. Run the same command again to go on where it stopped."
SHOWN = 3


@guarded(interrupted=RESUME)
def import_(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="clip-retrieval folders; .npy, Parquet, Arrow or FAISS files."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="The index, made if need be.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Whose vectors they are [default: the index's, else unknown]."),
    ] = None,
    space: Annotated[
        str | None, typer.Option("--space", metavar="NAME", help="A name for vectors of a model not known here.")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--ids", metavar="FILE", help="Ids of a .npy or FAISS file: lines, JSON lines, .npy, a table."),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id-column", metavar="NAME", help="The column with ids [default: id].")
    ] = None,
    vector_column: Annotated[
        str | None, typer.Option("--vector-column", metavar="NAME", help="The column with vectors [default: found].")
    ] = None,
    modality: Annotated[
        options.VectorsOf | None,
        typer.Option("--modality", help="What the vectors were made of [default: image; both in clip-retrieval]."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a vector was skipped.")] = False,
    device: options.OnDevice = options.Device.AUTO,
    json: options.Json = False,
) -> None:
    """Bring vectors that another program made into an index."""
    if not paths:
        raise UsageError(
            "PATH", expected="a file or folder of vectors", got="nothing", do="See: mmsearch import --help"
        )
    if not out:
        raise UsageError("--out", expected="the index to bring them into", got="nothing")
    with Bar("importing", unit="rows") as bar:
        done: ImportReport = ctx.obj.import_vectors(
            paths,
            Path(out),
            model=model,
            space=space,
            ids=ids,
            id_column=id_column,
            vector_column=vector_column,
            modality=None if modality is None else modality.value,
            strict=strict,
            device=device.value,
            progress=bar,
        )
    for line in summary(done):
        say(line)
    if json:
        emit(as_json(report_json(done)))


def report_json(report: ImportReport) -> dict[str, Any]:
    """The report as JSON values."""
    counts = ("rows", "resumed", "added", "changed", "unchanged", "removed", "normalised", "skipped_count")
    return {
        "index": os.fspath(report.index),
        **{name: getattr(report, name) for name in counts},
        "seconds": round(report.seconds, 3),
        "rows_per_s": round(report.rows_per_s, 1),
        "notes": list(report.notes),
        "skipped": [{"path": s.path, "reason": str(s.reason), "detail": s.detail} for s in report.skipped],
    }


def summary(report: ImportReport) -> Iterable[str]:
    """What a person wants to know at the end, line by line."""
    kinds = ("added", "changed", "unchanged", "removed")
    counts = ", ".join(f"{getattr(report, kind):,} {kind}" for kind in kinds if getattr(report, kind))
    rate = f" (read at {report.rows_per_s:,.0f} rows/s)" if report.rows else ""
    yield f"{report.index}: {counts or 'nothing to do'} in {report.seconds:.1f} s{rate}"
    if report.skipped_count:
        yield f"skipped {report.skipped_count:,} vectors (--json names them):"
        for one in report.skipped[:SHOWN]:
            yield f"      {one.path}: {one.detail}"
        if report.skipped_count > SHOWN:
            yield f"      ... and {report.skipped_count - SHOWN:,} more"
    yield from report.notes

"""`mmsearch export`: hand an index's vectors to another program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.exchange.reports import ExportReport


@guarded(interrupted="interrupted: nothing was exported. Run the same command again.")
def export(
    ctx: typer.Context,
    index: Annotated[str | None, typer.Argument(metavar="INDEX", help="The index.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="A new folder for the files.")] = None,
    format: Annotated[options.ExportFormat | None, typer.Option("--format", help="What the files are to be.")] = None,
    modality: Annotated[
        options.ExportOf, typer.Option("--modality", help="Vectors of pictures, of texts, or both.")
    ] = options.ExportOf.BOTH,
    rows_per_file: Annotated[
        int, typer.Option("--rows-per-file", min=1, metavar="N", help="Items in a file, where there are several.")
    ] = 250_000,
    json: options.Json = False,
) -> None:
    """Write an index's vectors, ids, captions and metadata for other programs."""
    if not index or not to or format is None:
        missing = "INDEX" if not index else "--to" if not to else "--format"
        raise UsageError(
            missing, expected="an index, a folder and a format", got="nothing",
            do="Try: mmsearch export indexes/photos --to photos-vectors --format parquet",
        )  # fmt: skip
    with Bar("exporting", unit="rows") as bar:
        done: ExportReport = ctx.obj.export_vectors(
            Path(index),
            Path(to),
            format=format.value,
            modality=modality.value,
            rows_per_file=rows_per_file,
            progress=bar,
        )
    parts = [plural(n, f"vector of a {kind}", f"vectors of {kind}s") for n, kind in
             ((done.image_rows, "picture"), (done.text_rows, "text")) if n]  # fmt: skip
    say(f"{done.target}: {' and '.join(parts)} in {plural(done.files, 'file')}, {done.bytes / 1e6:,.1f} MB, "
        f"in {done.seconds:.1f} s")  # fmt: skip
    if json:
        facts = {name: getattr(done, name) for name in ("format", "image_rows", "text_rows", "files", "bytes")}
        emit(as_json({"target": os.fspath(done.target), **facts, "seconds": round(done.seconds, 3)}))

"""`mmsearch index`: build an index of pictures, or bring one up to date."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.places import default_index
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say
from mmsearch.errors import InputError, PartialError, UsageError

if TYPE_CHECKING:
    from mmsearch.types import BuildReport, Skipped

RESUME = "interrupted: what was done is kept. Run the same command again to go on where it stopped."
SHOWN_PATHS = 3


@guarded(interrupted=RESUME)
def index(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH", help="Folders, pictures, tables, s3:// or gs:// URIs; - reads paths from stdin."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "--index", metavar="DIR", help="Where the index goes [default: indexes/NAME]."),
    ] = None,
    model: options.Model = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave these out; may be repeated.")
    ] = None,
    include_hidden: Annotated[bool, typer.Option("--include-hidden", help="Hidden files and folders too.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop items of folders that are gone altogether (an unmounted disk).")
    ] = False,
    item_vectors: Annotated[
        options.ItemVectors | None,
        typer.Option("--item-vectors", help="One row for picture and captions, or each its own [default: separate]."),
    ] = None,
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--no-tokens", help="Keep what the re-ranker reads of each picture, for faster --rerank."
        ),
    ] = None,
    kind: options.Kind = None,
    memory: options.Memory = None,
    overlap: options.Overlap = None,
    queries: options.Queries = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, metavar="N", help="Skip pictures with more pixels than this.")
    ] = 200_000_000,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write a JSON report with every skipped file.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when anything was skipped.")] = False,
    device: options.OnDevice = options.Device.AUTO,
    engine: Annotated[
        options.Engine, typer.Option("--engine", help="Where pictures are encoded: here, or by a Ray cluster.")
    ] = options.Engine.LOCAL,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster, or auto [default: a Ray of its own]."),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option("--work", metavar="DIR", help="Folder or URI that all nodes see [default: inside the index]."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with an index of another model, or a damaged one; retry skips.")
    ] = False,
    null: Annotated[bool, typer.Option("--null", "-0", help="Paths on stdin end in NUL, not newline.")] = False,
    json: options.Json = False,
) -> None:
    """Index pictures; run it again to bring the index up to date."""
    named = _with_stdin(paths or (["-"] if null else []), null=null)
    target = Path(out) if out else default_index(named)
    if report:
        _write(report, "")  # before the work, not after it, is the time to say that it cannot be written
    with Bar("indexing") as bar:
        done: BuildReport = ctx.obj.build(
            named,
            target,
            model=model,
            exclude=tuple(exclude or ()),
            include_hidden=include_hidden,
            prune=prune,
            item_vectors=None if item_vectors is None else item_vectors.value,
            tokens=tokens,
            kind=kind,
            memory=memory,
            overlap=overlap,
            queries=queries,
            batch_size=batch_size,
            workers=workers,
            max_pixels=max_pixels,
            device=device.value,
            engine=engine.value,
            address=address,
            work=work,
            force=force,
            progress=bar,
        )
    _tell(done, report=report, json=json, strict=strict)


def _tell(done: BuildReport, *, report: str | None, json: bool, strict: bool) -> None:
    """The summary, the report file, the JSON object; `PartialError` when `strict` and something was skipped."""
    for line in summary(done):
        say(line)
    if report:
        _write(report, as_json(report_json(done), indent=2) + "\n")
    if json:
        emit(as_json(report_json(done)))
    if strict and done.skipped:
        raise PartialError(
            "--strict",
            expected="nothing skipped",
            got=plural(len(done.skipped), "skipped file"),
            do="The other files are in the index.",
        )


def report_json(report: BuildReport) -> dict[str, Any]:
    """The report as JSON values; every skipped file is in it."""
    return {
        "index": os.fspath(report.index),
        "added": report.added,
        "changed": report.changed,
        "moved": report.moved,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "encoded_images": report.encoded_images,
        "encoded_texts": report.encoded_texts,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "images_per_s": round(report.images_per_s, 2),
        "notes": list(report.notes),
        "skipped": [{"path": s.path, "reason": str(s.reason), "detail": s.detail} for s in report.skipped],
    }


def summary(report: BuildReport) -> Iterable[str]:
    """What a person wants to know at the end, line by line."""
    kinds = ("added", "changed", "moved", "unchanged", "removed")
    counts = ", ".join(f"{getattr(report, kind)} {kind}" for kind in kinds if getattr(report, kind))
    rate = f" ({report.images_per_s:.1f} images/s)" if report.encoded_images else ""
    yield f"{report.index}: {counts or 'nothing to do'} in {report.seconds:.1f} s{rate}"
    yield from _skipped_lines(report.skipped)
    yield from report.notes


def _skipped_lines(skipped: tuple[Skipped, ...]) -> Iterable[str]:
    """Skips grouped by reason, the most frequent first, each with its first few paths."""
    if not skipped:
        return
    yield f"skipped {plural(len(skipped), 'file')} (--report FILE lists all):"
    for reason, count in Counter(one.reason for one in skipped).most_common():
        yield f"  {count} {reason}"
        for one in [one for one in skipped if one.reason == reason][:SHOWN_PATHS]:
            yield f"      {one.path}" + (f": {one.detail}" if one.detail else "")
        if count > SHOWN_PATHS:
            yield f"      ... and {count - SHOWN_PATHS} more"


def _with_stdin(paths: list[str], *, null: bool) -> list[str]:
    """`paths` with each - replaced by the paths on stdin."""
    if not paths:
        raise UsageError(
            "PATH",
            expected="a folder, picture or table",
            got="nothing",
            do="Try: mmsearch index ./photos",
        )
    named = [name for path in paths for name in (_read_names(null=null) if path == "-" else [path])]
    if not named:
        raise UsageError("stdin", expected="one path a line", got="nothing")
    return named


def _read_names(*, null: bool) -> list[str]:
    """Names on stdin as the bytes they are; newlines inside names survive only with -0."""
    raw = sys.stdin.buffer.read()
    return [os.fsdecode(name) for name in (raw.split(b"\0") if null else raw.splitlines()) if name]


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(path, expected="a file that can be written", got=error.strerror or str(error)) from error

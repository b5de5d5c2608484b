"""`mmsearch eval`: how well a model finds what belongs together, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.evaluate.report import Direction, Evaluation


@guarded()
def evaluate(
    ctx: typer.Context,
    pairs: Annotated[
        str,
        typer.Argument(metavar="PAIRS", help="Pictures with captions: JSONL, CSV, JSON or a folder."),
    ],
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Only pairs of this split.")] = None,
    model: options.Model = None,
    rerank: Annotated[
        int,
        typer.Option("--rerank", min=0, metavar="N", help="Hits that a second stage reorders (0: none)."),
    ] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N pictures.")] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.OnDevice = options.Device.AUTO,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, shares between 0 and 1.")] = False,
) -> None:
    """Measure how well captions and pictures find each other."""
    if rerank:  # known before a model is loaded
        raise UsageError("--rerank", expected="0", got=str(rerank), do="This model has no re-ranker: leave it out.")
    with Bar("encoding", unit="items") as bar:
        found: Evaluation = ctx.obj.evaluate(
            pairs,
            model=model,
            device=device.value,
            split=split,
            limit=limit,
            batch_size=batch_size or 64,
            workers=workers,
            progress=bar,
        )
    if json:
        emit(as_json(found.to_json()))
    else:
        for line in table(found):
            emit(line)
    if found.skipped:
        first = found.skipped[0]
        say(f"skipped {plural(len(found.skipped), 'picture')}, the first: {first.path}: {first.reason} {first.detail}")


def table(found: Evaluation) -> Iterator[str]:
    """Both directions side by side: shares in per cent, ± half of their 95 % interval, and ranks."""
    yield f"{found.model}: {found.images} images, {found.texts} texts, {found.seconds:.1f} s"
    yield f"{'':<12} {'text -> image':>16} {'image -> text':>16}"
    for metric in found.text_to_image.values:
        cells = (_cell(way, metric) for way in (found.text_to_image, found.image_to_text))
        yield f"{metric:<12} " + " ".join(f"{cell:>16}" for cell in cells)
    yield "Shares in per cent, ± half of the 95 % interval (bootstrap over images)."


def _cell(way: Direction, metric: str) -> str:
    value = way.values[metric]
    if metric not in way.intervals:
        return f"{value:.1f}"
    low, high = way.intervals[metric]
    return f"{100 * value:.1f} ± {50 * (high - low):.1f}"

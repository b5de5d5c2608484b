"""`mmsearch bridge`: let another model ask an index that it did not make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, say
from mmsearch.errors import InputError, UsageError

if TYPE_CHECKING:
    from mmsearch.bridge_build import BridgeReport


@guarded()
def bridge(
    ctx: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index directory.")],
    model: options.NewModel = None,
    sample: Annotated[
        int, typer.Option("--sample", min=16, metavar="N", help="Pictures that the new model encodes for it.")
    ] = 2000,
    queries: Annotated[
        str | None, typer.Option("--queries", metavar="FILE", help="Texts to measure with, one a line.")
    ] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    json: options.Json = False,
    device: options.OnDevice = options.Device.AUTO,
) -> None:
    """Fit a map from an index's rows to another model, and measure what it costs."""
    if model is None:
        raise UsageError("--model", expected="the new model", got="none", do="'bundled' is the one of mmsearch.")
    texts = _lines(queries) if queries else ()
    with Bar("bridge") as bar:
        made: BridgeReport = ctx.obj.bridge(
            Path(index), model=model, sample=sample, queries=texts, batch_size=batch_size, workers=workers,
            device=device.value, progress=bar,
        )  # fmt: skip
    tell_bridge(made, json=json)


def tell_bridge(made: BridgeReport | None, *, json: bool) -> None:
    """The table for people, or the JSON object; nothing where nothing was made."""
    if made is None:
        return
    if json:
        emit(as_json(made.to_json()))
        return
    for line in made.lines():
        say(line)


def _lines(path: str) -> tuple[str, ...]:
    """The texts of a file, blank lines left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, expected="a text file, one query a line", got=str(error)) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise InputError(path, expected="a text file, one query a line", got="no text")
    return lines

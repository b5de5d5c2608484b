"""`mmsearch query`: find pictures by words or by a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.hits import print_json, print_paths, print_readable
from mmsearch.cli.places import chosen_index
from mmsearch.cli.terminal import guarded, say
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.searcher import Hits, Searcher


@guarded()
def query(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to look for, in words.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="Look for what is like this picture.")
    ] = None,
    index: options.Index = None,
    top: Annotated[int, typer.Option("--top", "-k", "-t", min=1, metavar="N", help="How many hits.")] = 10,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="X", help="Only hits that score X or more (-1 to 1).")
    ] = None,
    to: Annotated[
        options.Target, typer.Option("--to", help="What to find: pictures, captions, or both.")
    ] = options.Target.IMAGE,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a hit and line.")] = False,
    paths: Annotated[bool, typer.Option("--filepath-only", "-f", help="Only paths, one a line.")] = False,
    null: Annotated[bool, typer.Option("--null", "-0", help="Only paths, each ended by NUL (for xargs -0).")] = False,
    device: options.OnDevice = options.Device.AUTO,
) -> None:
    """Find pictures or captions, by words or by a picture."""
    _check(text, image, threshold)
    with ctx.obj.open(chosen_index(index, ctx.obj), device=device.value) as searcher:
        hits = _search(searcher, text, image, k=top, to=to.value, threshold=threshold)
    if json:
        print_json(hits)
    elif paths or null:
        print_paths(hits, null=null)
    else:
        print_readable(hits)
    for note in hits.notes if hits else (*hits.notes, "no hits"):
        say(note)


def _check(text: str | None, image: str | None, threshold: float | None) -> None:
    """Refuse before a model is loaded what cannot be answered."""
    if text is not None and image is not None:
        raise UsageError(
            "query",
            expected="TEXT or --image",
            got="both",
            do="Queries composed of words and a picture are not in this version: ask for one of them.",
        )
    if image is None and not (text or "").strip():
        raise UsageError(
            "query", expected="words, or --image FILE", got="nothing", do='Try: mmsearch query "a dog on a beach"'
        )
    if threshold is not None and not -1.0 <= threshold <= 1.0:  # also true for NaN
        raise UsageError("--threshold", expected="a cosine from -1 to 1", got=str(threshold))


def _search(
    searcher: Searcher, text: str | None, image: str | None, *, k: int, to: str, threshold: float | None
) -> Hits:
    if image is not None:
        return searcher.search_image(Path(image), k=k, to=to, threshold=threshold)
    return searcher.search_text(text or "", k=k, to=to, threshold=threshold)

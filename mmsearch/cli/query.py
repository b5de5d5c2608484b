"""`mmsearch query`: find pictures by words or by a picture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.explaining import draw_all, explained
from mmsearch.cli.hits import print_json, print_paths, print_readable
from mmsearch.cli.places import chosen_indexes
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import guarded, say
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.cli.library import Library
    from mmsearch.explain import Explanation
    from mmsearch.hits import Hits
    from mmsearch.rerank.request import Rerank
    from mmsearch.scale.engine_searcher import EngineSearcher
    from mmsearch.searcher import Searcher


@guarded()
def query(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to look for, in words.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="Look for what is like this picture.")
    ] = None,
    index: options.Indexes = None,
    partial: options.Partial = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Ask with this model, over the index's bridge to it.")
    ] = None,
    where: options.Where = None,
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
    rerank: Annotated[
        str,
        typer.Option("--rerank", metavar="N", help="How many of the best a second stage re-orders, auto, or off."),
    ] = "auto",
    reranker: Annotated[
        Path | None, typer.Option("--reranker", metavar="DIR", help="The model that has it [default: the index's].")
    ] = None,
    min_probability: Annotated[
        float | None,
        typer.Option("--min-probability", metavar="P", help="Only hits this probable or more (0 to 1)."),
    ] = None,
    cut: Annotated[bool, typer.Option("--auto", help="Show nothing where nothing matches.")] = False,
    budget_ms: Annotated[
        float | None, typer.Option("--budget-ms", metavar="MS", help="Time for the second stage; it picks the depth.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show what the scores are made of.")] = False,
    explain_to: Annotated[
        Path | None, typer.Option("--explain-to", metavar="FOLDER", help="Also draw what each word rests on.")
    ] = None,
    device: options.OnDevice = options.Device.AUTO,
) -> None:
    """Find pictures or captions, by words or by a picture."""
    _check(text, image, threshold)
    wish = _wish(rerank, min_probability=min_probability, cut="auto" if cut else None, budget_ms=budget_ms)
    more: list[dict[str, Any]] = []
    conditions = _conditions(where)
    given = {"reranker": reranker, "partial": partial or None, "model": model}
    named = {name: value for name, value in given.items() if value is not None}
    with ctx.obj.open(chosen_indexes(index, ctx.obj), device=device.value, **named) as searcher:
        hits = _search(searcher, text, image, k=top, to=to.value, threshold=threshold, rerank=wish, **conditions)
        if explain or explain_to is not None:
            why = _explained(ctx.obj, searcher, hits, text=text, picture=image)
            drawn = draw_all(why, hits, explain_to, draw=functools.partial(ctx.obj.draw, searcher))
            more = [{"explain": one.to_json(), "heat_map": path} for one, path in zip(why, drawn, strict=True)]
    if json:
        print_json(hits, more=_partial(hits, more))
    elif paths or null:
        print_paths(hits, null=null)
    else:
        print_readable(hits)
    for line in explained(hits, [] if json else more):
        say(line)
    for note in hits.notes if hits else (*hits.notes, "no hits"):
        say(note)


def _explained(
    library: Library, searcher: Searcher | EngineSearcher, hits: Hits, *, text: str | None, picture: str | None
) -> list[Explanation]:
    """Why each hit; about a second for each on two cores."""
    found = []
    with Bar("explaining", unit="hits") as bar:
        bar.start(len(hits))
        for hit in hits:
            found.append(library.explain(searcher, hit, text=text, picture=picture))
            bar.advance(1)
    return found


def _conditions(where: list[str] | None) -> dict[str, Any]:
    """What --where adds to a search; `UsageError` for what is no condition."""
    if not where:
        return {}
    from mmsearch.where import parse_condition

    return {"where": tuple(parse_condition(text) for text in where)}


def _partial(hits: Hits, more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What else each hit's JSON says: that a part of the collection did not answer, too."""
    if not getattr(hits, "partial", False):
        return more
    return [{**one, "partial": True} for one in more or [{} for _ in hits]]


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


def _wish(rerank: str, **conditions: Any) -> Rerank:  # noqa: ANN401 - as `Rerank` has them
    """What is asked of the second stage; `UsageError` for what it cannot be asked."""
    from mmsearch.rerank.request import Rerank, depth_of

    return Rerank(depth_of(rerank), **conditions)


def _search(
    searcher: Searcher,
    text: str | None,
    image: str | None,
    **asked: Any,  # noqa: ANN401 - as `search_text` has them
) -> Hits:
    if image is not None:
        return searcher.search_image(Path(image), **asked)
    return searcher.search_text(text or "", **asked)

"""`mmsearch eval`: how well a model finds what belongs together, names pictures, and differs from another model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from mmsearch.cli import options
from mmsearch.cli.library import Library
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say, shown
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.evaluate.classification import Classification
    from mmsearch.evaluate.report import Evaluation


class Shown(Protocol):
    """What an evaluation finds, for people and for programs."""

    def lines(self) -> Iterator[str]:
        """A table."""
        ...

    def to_json(self) -> dict[str, Any]:
        """One object."""
        ...


@guarded()
def evaluate(
    ctx: typer.Context,
    pairs: Annotated[
        str | None,
        typer.Argument(metavar="[PAIRS]", help="Pictures with captions: CSV, JSONL, Parquet, JSON, tars or folders."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FOLDER", help="Name the pictures in its sub-folders, instead of PAIRS."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Only pairs of this split.")] = None,
    model: options.Model = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="MODEL", help="What changed from this model to --model ('bundled' is one)."),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option("--templates", metavar="FILE", help="Sentences for --classes, one a line, {} for the name."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave these classes out; may be repeated.")
    ] = None,
    rerank: Annotated[
        int,
        typer.Option("--rerank", min=0, metavar="N", help="What re-ranking the best N of each list changes (0: none)."),
    ] = 0,
    absent: Annotated[
        str | None,
        typer.Option("--absent", metavar="PAIRS", help="With --rerank: captions that nothing here may answer."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N pictures (of each class).")
    ] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.OnDevice = options.Device.AUTO,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, shares between 0 and 1.")] = False,
) -> None:
    """Measure how well captions and pictures find each other, or how often pictures get the right class name."""
    if (pairs is None) == (classes is None):
        raise UsageError("eval", expected="PAIRS or --classes FOLDER", got="neither" if pairs is None else "both")
    _check(of_classes=classes is not None, split=split, templates=templates, exclude=exclude)
    _check_rerank(rerank, of_classes=classes is not None, compare=compare, absent=absent)
    asked = {"split": split} if classes is None else {"templates": templates, "exclude": exclude or []}
    found: Evaluation | Classification
    parts: Sequence[Shown]
    with Bar("encoding", unit="items") as bar:
        shared = {"limit": limit, "batch_size": batch_size or 64, "workers": workers, "device": device.value}
        settings = {**shared, **asked, "progress": bar}
        if rerank:
            both = ctx.obj.evaluate_stages(pairs, model=model, depth=rerank, absent=absent, **settings)
            found, parts = both.after, (both.before, both.after, both)
        else:
            found, parts = _measured(ctx.obj, pairs, classes, model=model, against=compare, settings=settings)
    if json:
        emit(as_json(parts[-1].to_json()))
    else:
        for line in report(parts):
            emit(shown(line))
    for note in notes(found):
        say(note)


def _measured(
    library: Library,
    pairs: str | None,
    classes: str | None,
    *,
    model: str | None,
    against: str | None,
    settings: dict[str, Any],
) -> tuple[Evaluation | Classification, Sequence[Shown]]:
    """(what was found for `model`, the tables to show: that one, or those of both models and the difference)."""
    what, named = pairs or classes or "", classes is not None
    if against is None:
        one = (library.classify if named else library.evaluate)(what, model=model, **settings)
        return one, [one]
    both = (library.compare_classes if named else library.compare)(what, before=against, after=model, **settings)
    return both.after, [both.before, both.after, both]


def report(parts: Sequence[Shown]) -> Iterator[str]:
    """The tables of all parts for people, an empty line between two."""
    for number, part in enumerate(parts):
        if number:
            yield ""
        yield from part.lines()


def notes(found: Evaluation | Classification) -> Iterator[str]:
    """What the numbers do not say."""
    for warning in found.warnings:
        yield f"warning: {warning}"
    if found.skipped:
        first = found.skipped[0]
        count = plural(len(found.skipped), "picture")
        yield f"skipped {count}, the first: {first.path}: {first.reason} {first.detail}"


def _check_rerank(rerank: int, *, of_classes: bool, compare: str | None, absent: str | None) -> None:
    if absent is not None and not rerank:
        raise UsageError("--absent", expected="--rerank N beside it", got="none", do="Add --rerank 64.")
    if rerank and of_classes:
        raise UsageError("--rerank", expected="PAIRS beside it", got="--classes")
    if rerank and compare is not None:
        do = "Measure the two models one after the other."
        raise UsageError("--rerank", expected="one model, without and with its second stage", got="--compare", do=do)


def _check(*, of_classes: bool, split: str | None, templates: Path | None, exclude: list[str] | None) -> None:
    """What does not go together, known before a model is loaded."""
    if not of_classes and (templates is not None or exclude):
        option = "--exclude" if templates is None else "--templates"
        raise UsageError(option, expected="--classes FOLDER beside it", got="PAIRS")
    if of_classes and split is not None:
        raise UsageError("--split", expected="PAIRS beside it", got="--classes")

"""`mmsearch match`: do a picture and a text match, one pair or many."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say, shown
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.matcher import Match, Matcher
    from mmsearch.types import Skipped

_SHOWN_SKIPS = 20


@guarded()
def match(
    ctx: typer.Context,
    what: Annotated[
        str,
        typer.Argument(metavar="PICTURE|PAIRS", help="A picture (file or address), or a table of pictures and texts."),
    ],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="With a picture: what it might show.")] = None,
    model: options.Model = None,
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="P", help="From this probability on they match (0 to 1).")
    ] = 0.5,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.OnDevice = options.Device.AUTO,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a pair and line.")] = False,
) -> None:
    """Say how probable it is that a picture and a text belong together."""
    if not 0.0 <= threshold <= 1.0:  # also true for NaN
        raise UsageError("--threshold", expected="0 to 1", got=str(threshold))
    if text is not None and not text.strip():
        raise UsageError("TEXT", expected="some words", got="nothing", do='Try: mmsearch match photo.jpg "a dog"')
    if not what.strip():
        raise UsageError("PICTURE|PAIRS", expected="a path", got="nothing", do="Name a picture or a table.")
    if text is None and _is_picture(what):
        do = f'Add a text: mmsearch match {shlex.quote(what)} "..."'
        raise UsageError("TEXT", expected="what the picture might show", got="nothing", do=do)
    matcher: Matcher = ctx.obj.matcher(model, device=device.value)
    if text is None:
        _many(matcher, what, threshold=threshold, batch_size=batch_size or 64, workers=workers, json=json)
    else:
        answer = matcher.match_one(what, text)
        _show(answer, threshold=threshold, json=json, alone=True)
        if answer.cut:
            say(f"the text is longer than {matcher.encoder.max_tokens} tokens; only its beginning was used")


def _is_picture(what: str) -> bool:
    """Whether a name is that of a picture rather than of a table."""
    from mmsearch.data.sniffing import PICTURE_EXTENSIONS

    return os.path.splitext(what)[1].lower() in PICTURE_EXTENSIONS


def _many(matcher: Matcher, path: str, *, threshold: float, batch_size: int, workers: int | None, json: bool) -> None:
    """Answer every pair of a table; what cannot be answered is told, and with labels how good the answers are."""
    from mmsearch.matcher import Tally, read_pairs_to_match
    from mmsearch.types import Skipped as SkippedPair

    skipped: list[Skipped] = []
    notes: list[str] = []
    cut = 0
    tally = Tally(matcher.reranker.name, threshold=threshold)
    with Bar("matching", unit="pairs") as bar:
        bar.start(None)
        pairs = read_pairs_to_match(path, on_skip=skipped.append, on_note=notes.append)
        for answer in matcher.match_pairs(pairs, workers=workers, batch_size=batch_size):
            bar.advance(1)
            if isinstance(answer, SkippedPair):
                skipped.append(answer)
                continue
            tally.add(answer)
            cut += answer.cut
            _show(answer, threshold=threshold, json=json)
    for one in skipped[:_SHOWN_SKIPS]:
        say(f"skipped {one.path}: {one.reason} {one.detail}".rstrip())
    if skipped:
        say(f"{plural(tally.answered, 'pair')} answered, {len(skipped)} skipped")
    for note in notes:
        say(note)
    if cut:
        limit = f"longer than {matcher.encoder.max_tokens} tokens"
        say(f"{plural(cut, 'pair')} with a text {limit}; only its beginning was used")
    for line in tally.lines():
        say(line)


def _show(answer: Match, *, threshold: float, json: bool, alone: bool = False) -> None:
    if json:
        emit(as_json(answer.to_json(threshold=threshold)))
        return
    cells = [f"{answer.probability:.4f}", "yes" if answer.probability >= threshold else "no"]
    if not alone:
        cells += [shown(os.fspath(answer.pair.image)), shown(answer.pair.text)]
    emit("\t".join(cells))

"""Why hits are where they are, for people: lines on stderr, and a picture a hit in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.explain import Explanation
    from mmsearch.types import Hit

_NAMES = {
    "cosine": "cosine",
    "logit": "words and picture",
    "text_cosine": "captions",
    "rarity": "rarity",
    "bias": "beforehand",
    "calibration": "calibration",
}
_LONGEST_NAME = 80
_LEAST_SAID = 0.1


def draw_all(
    why: Sequence[Explanation], hits: Sequence[Hit], folder: Path | None, *, draw: Callable[[Explanation, Path], bool]
) -> list[str | None]:
    """Draw each into `folder` as RANK-NAME.png; the paths, None for what cannot be drawn or without a folder."""
    paths: list[str | None] = []
    for one, hit in zip(why, hits, strict=True):
        target = None if folder is None else folder / f"{hit.rank:03d}-{_file_name(hit)}.png"
        paths.append(str(target) if target is not None and draw(one, target) else None)
    return paths


def explained(hits: Sequence[Hit], more: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each hit: what its log-odds are made of, and what they rest on.

    That is, of each word, the row and column (of seven) whose covering costs most, and how much.
    """
    for hit, own in zip(hits, more, strict=False):
        parts, why = own["explain"]["parts"], own["explain"]
        given = ", ".join(f"{_NAMES.get(n, n)} {parts[f'from_{n}']:+.2f}" for n in _NAMES if f"from_{n}" in parts)
        summed = f"log-odds {parts['log_odds']:+.2f} ({given})" if "log_odds" in parts else "not re-ranked"
        words = why["occlusion"]["words"] if why.get("occlusion") else {}
        rests = ", ".join(f"{word} {place}" for word, rows in words.items() if (place := _place(rows)))
        yield f"{hit.rank}: {summed}" + (f"; covered (row,column): {rests}" if rests else "")
        if own["heat_map"]:
            yield f"{hit.rank}: {own['heat_map']}"


def _place(rows: Sequence[Sequence[float]]) -> str:
    """Row and column, from 1, where a cover costs most, and that; "" where it costs next to nothing."""
    lost, row, column = max((lost, -r, -c) for r, line in enumerate(rows) for c, lost in enumerate(line))
    return f"{1 - row},{1 - column} -{lost:.1f}" if lost >= _LEAST_SAID else ""


def _file_name(hit: Hit) -> str:
    """A part of a file's name that is harmless anywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(hit.item.path or hit.item.id).stem)[:_LONGEST_NAME] or "hit"

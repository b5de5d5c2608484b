"""How a long job says how far it is; the command line draws a bar from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

_WORTH_SAYING_MB = 10.0
FIRST_ESTIMATE_S, NEXT_ESTIMATE_S = 10.0, 600.0


class Progress(Protocol):
    """Told how a build goes on."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """`total` items were found and are being looked at; with `what` a new part of the job begins."""
        ...

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more items are done."""
        ...

    def note(self, text: str) -> None:
        """One line the user should read."""
        ...


def how_far(done: int, total: int | None, *, rate: float, unit: str) -> str:
    """In words, at `rate` a second above 0; without a total nothing is said of what is left."""
    if total is None:
        return f"{done:,} {unit}, {rate:.1f} a second"
    far, minutes = f"{done:,} of {total:,} {unit}", (total - done) / rate / 60
    if minutes < 1:
        return f"{far}: less than a minute left"
    return f"{far}, {rate:.1f} a second: about {minutes:,.0f} minutes left"


class SilentProgress:
    """Says nothing."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """Ignore."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


class Estimating:
    """Progress that also says in words, early and then every ten minutes, how long it will take, and how many bytes.

    `item_bytes`: what an item takes on the disk, 0 for not saying so. `clock`: seconds from any beginning.
    """

    def __init__(self, told: Progress, *, item_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._told, self._clock, self._item_bytes = told, clock, item_bytes
        self._total, self._done, self._unit = 0, 0, "items"
        self._began = self._next = 0.0

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """See `Progress.start`."""
        self._total, self._done, self._began, self._unit = total or 0, 0, self._clock(), unit or "items"
        self._next = self._began + FIRST_ESTIMATE_S
        said = {name: text for name, text in (("what", what), ("unit", unit)) if text}
        self._told.start(total, **said)

    def advance(self, n: int, *, note: str = "") -> None:
        """See `Progress.advance`."""
        if note:
            self._told.advance(n, note=note)
        else:
            self._told.advance(n)
        self._done += n
        now = self._clock()
        if now >= self._next and 0 < self._done < self._total:
            self._next = now + NEXT_ESTIMATE_S
            self._told.note(self._left(self._done / (now - self._began)))

    def _left(self, rate: float) -> str:
        """What is done and left, at `rate` items a second."""
        megabytes = self._total * self._item_bytes / 1e6 if self._unit == "items" else 0.0
        size = f", {megabytes:,.0f} MB in the end" if megabytes >= _WORTH_SAYING_MB else ""
        return how_far(self._done, self._total, rate=rate, unit=self._unit) + size

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self._told.note(text)

"""How a long job says how far it is; the command line draws a bar from it."""

from __future__ import annotations

from typing import Protocol


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


class SilentProgress:
    """Says nothing."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """Ignore."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

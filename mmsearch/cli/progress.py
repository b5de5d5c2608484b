"""Progress on stderr: a bar with rate and time left on a terminal, a line a minute in a pipe or a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mmsearch.cli.terminal import say, shown
from mmsearch.progress import how_far

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


LINE_EVERY_S = 60.0


class Bar:
    """What the library tells about its progress, drawn with rich; lines now and then when stderr is not a terminal.

    `clock`: seconds from any beginning.
    """

    def __init__(
        self, what: str, *, unit: str = "images", quiet: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._unit, self._clock = what, unit, clock
        self._quiet = not sys.stderr.isatty() if quiet is None else quiet
        self._total: int | None = None
        self._done, self._told = 0, clock()
        self._since: tuple[int, float] | None = None  # what was done when, and the pace is taken from there
        self._drawn: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """Begin to draw; a second call sets the total anew, and with `what` a new part begins from nothing."""
        if what:
            self._done, self._since = 0, None
        self._what, self._unit, self._total = what or self._what, unit or self._unit, total
        if self._quiet:
            return
        if self._drawn is None:
            self._drawn = _drawing()
            self._task = self._drawn.add_task(shown(self._what), total=total, note="", unit=self._unit)
            self._drawn.start()
        elif self._task is not None and what:
            self._drawn.reset(self._task, total=total, description=shown(what), note="", unit=self._unit)
        elif self._task is not None:
            self._drawn.update(self._task, total=total)

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more are done; `note` is a word on what is going on."""
        self._done += n
        now, since = self._clock(), self._since
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, advance=n, note=shown(note), refresh=False)
        elif since is None:  # the first step may be all that an earlier run did
            self._since = (self._done, now)
        elif self._quiet and now - self._told >= LINE_EVERY_S and now > since[1]:
            say(self._line((self._done - since[0]) / (now - since[1]), note))
            self._told, self._since = now, (self._done, now)

    def note(self, text: str) -> None:
        """A line for the user that stays, above the bar when there is one."""
        if self._drawn is not None:
            self._drawn.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def _line(self, rate: float, note: str) -> str:
        line = f"{self._what}: {how_far(self._done, self._total, rate=max(rate, 1e-9), unit=self._unit)}"
        return f"{line}; {note}" if note else line


def _drawing() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        """Done per second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.{0 if speed >= 10 else 1}f} {task.fields['unit']}/s" if speed else "")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeLeft(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=sys.stderr),
        transient=True,
    )

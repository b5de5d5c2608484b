"""A progress bar on stderr: rate and time left on a terminal, nothing in a pipe or a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mmsearch.cli.terminal import say, shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """What the library tells about its progress, drawn with rich; silent when stderr is not a terminal."""

    def __init__(self, what: str, *, unit: str = "images", quiet: bool | None = None) -> None:
        self._what, self._unit = what, unit
        self._quiet = not sys.stderr.isatty() if quiet is None else quiet
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
        if self._quiet:
            return
        self._what, self._unit = what or self._what, unit or self._unit
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
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, advance=n, note=shown(note), refresh=False)

    def note(self, text: str) -> None:
        """A line for the user that stays, above the bar when there is one."""
        if self._drawn is not None:
            self._drawn.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)


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

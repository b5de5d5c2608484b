"""What a run tells while it runs: `metrics.jsonl`, one object a line, and TensorBoard events.

Decisions:
- A line is handed to the system as soon as it is logged, so that a killed process loses none.
- A resumed run goes on from a checkpoint: lines past its step would come twice and are cut off, with them
  whatever a crash left half written. The file is replaced in one move, never edited in place.
- JSON has no NaN and no infinity: they become null, and a curve has a gap there.
- TensorBoard is a view on the same numbers; without its package the run goes on and says so once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mmsearch.errors import UsageError

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
_FLUSH_S = 10

Line = dict[str, Any]
"""One logged object: `step` (int) and what was measured there."""


class Events(Protocol):
    """Where numbers are drawn live."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """One number."""

    def close(self) -> object:
        """Write what is left."""


class Journal:
    """Writes `metrics.jsonl` and TensorBoard events into `directory`, which is made if need be.

    `resume_step`: the step of the checkpoint that the run goes on from, whose lines up to it stay; None is a new
    run, which begins with an empty journal. `notes`: what the user should hear. A context manager.
    `events`: opens the live view; None from it means that there is none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int | None = None,
        events: Callable[[Path, int | None], Events | None] | None = None,
    ) -> None:
        self.path = directory / METRICS
        directory.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [line for line in read_journal(self.path) if line["step"] <= resume_step]
        _replace(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = (events or open_events)(directory / EVENTS, resume_step)
        self.notes: tuple[str, ...] = ()
        if self._events is None:
            self.notes = ("No TensorBoard events: pip install 'mmsearch[train]' brings the package tensorboard.",)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Add one line: `{"step": step, **values}`. Numbers also go to TensorBoard, under their names.

        `step`: optimiser steps done so far, 0 before the first. Raises `UsageError` for a value called "step".
        """
        if "step" in values:
            raise UsageError("journal", expected="values without a 'step' of their own", got=str(sorted(values)))
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        """End both files; may be called twice."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`, in their order; what is no whole line with a step is left out.

    A file that is not there has none. The run may be writing to it meanwhile.
    """
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is still being written
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def open_events(directory: Path, resume_step: int | None) -> Events | None:
    """TensorBoard's writer, or None without the package. Events past `resume_step` are hidden from its curves.

    A new run (None) removes the events of the run before it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if resume_step is None:
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
    purge = None if resume_step is None else resume_step + 1
    writer: Events = SummaryWriter(str(directory), purge_step=purge, flush_secs=_FLUSH_S)
    return writer


def _plain(value: float | str) -> float | str | None:
    """A value that JSON knows; also numpy and torch numbers."""
    if isinstance(value, str | int):  # a count stays whole
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _replace(path: Path, lines: list[Line]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""The crew: a few decode workers, the jobs given to them, and what happens when one of them dies.

Decisions:
- A picture that hangs ends its worker by that worker's own alarm clock. One that kills a worker is tried
  once more in another, since the worker may have been an innocent victim of a full memory; killing twice
  convicts it. The pictures that waited behind it go to other workers at once.
- No thread: whoever waits for an answer calls `gather`. Work goes on meanwhile, because every job is
  with a worker already.
- A worker that even SIGKILL does not end (a dead network mount) is left alone, and so is its slot.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmsearch.data.workers import Slab, Worker, signal_name
from mmsearch.errors import ResourceError
from mmsearch.types import SkipReason

_STILLBORN = 3
_LIVES = 2
_SLICE_S = 1.0


@dataclass(slots=True)
class _Job:
    path: str
    slot: int | None  # None: lost to a worker that cannot be ended
    view: Mapping[str, Any]
    deaths: int = 0
    answer: dict[str, Any] | None = None
    wanted: bool = True


class Crew:
    """Up to `count` workers, started as work comes in; `slots` jobs at a time, numbered from 1."""

    def __init__(self, count: int, *, slots: int, bytes_each: int, settings: Mapping[str, Any]) -> None:
        self._count, self._settings = count, settings
        self._slab = Slab(slots, bytes_each)
        self._selector = selectors.DefaultSelector()
        self._free = list(range(slots))
        self._workers: list[Worker] = []
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[int] = deque()
        self._asked = 0
        self._stillborn = 0

    @property
    def has_room(self) -> bool:
        """Whether one more job can be given."""
        return bool(self._free)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are running."""
        return tuple(worker.pid for worker in self._workers)

    def ask(self, path: str, view: Mapping[str, Any] | None = None) -> int:
        """Have a picture decoded; the job's number. Call only when there is room.

        `view`: JSON values by name that the worker's own opener takes (see `worker.main`).
        """
        self._asked += 1
        self._jobs[self._asked] = _Job(path, self._free.pop(), view or {})
        self._waiting.append(self._asked)
        self._dispatch()
        return self._asked

    def wait(self, number: int) -> tuple[dict[str, Any], bytearray]:
        """The answer to a job and what lies in its slot (nothing when that is lost); ends the job."""
        since, job = time.monotonic(), self._jobs[number]
        while job.answer is None:
            if not self.gather(_SLICE_S):
                self._end_silent(since)
        content = bytearray() if job.slot is None else self._slab.copy(job.slot)
        self._close_job(number)
        return job.answer, content

    def drop(self, number: int) -> None:
        """Nobody wants this job any more."""
        job = self._jobs[number]
        job.wanted = False
        if job.answer is not None:
            self._close_job(number)

    def gather(self, seconds: float) -> bool:
        """Take in what workers have said, waiting at most so long for the first; False when none did."""
        events = self._selector.select(seconds) if self._workers else []
        for key, _ in events:
            worker = key.fileobj
            assert isinstance(worker, Worker)
            answers, alive = worker.receive()
            for answer in answers:
                self._answered(answer["job"], answer)
            if worker.ready:
                self._stillborn = 0
            if not alive:
                self._bury(worker)
        self._dispatch()
        return bool(events)

    def close(self) -> None:
        """End all workers; what they were doing is dropped."""
        for worker in self._workers:
            worker.hang_up()
            if worker.jobs:
                worker.kill()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._selector.close()
        self._slab.close()

    def _dispatch(self) -> None:
        """Give every waiting job to the worker with the fewest, starting workers while all are busy."""
        while self._waiting:
            number = self._waiting.popleft()
            job = self._jobs[number]
            if not job.wanted:
                self._close_job(number)
                continue
            worker = min(self._workers, key=lambda w: len(w.jobs), default=None)
            if worker is None or (worker.jobs and len(self._workers) < self._count):
                worker = self._start()
            assert job.slot is not None
            worker.send(number, job.slot, job.path, job.view)

    def _start(self) -> Worker:
        worker = Worker(self._slab, self._settings)
        self._workers.append(worker)
        self._selector.register(worker, selectors.EVENT_READ)
        return worker

    def _answered(self, number: int, answer: dict[str, Any]) -> None:
        self._jobs[number].answer = answer
        if not self._jobs[number].wanted:
            self._close_job(number)

    def _close_job(self, number: int) -> None:
        slot = self._jobs.pop(number).slot
        if slot is not None:
            self._free.append(slot)

    def _end_silent(self, since: float) -> None:
        for worker in [w for w in self._workers if w.silent(since)]:
            worker.kill()
            self._bury(worker, hung=True)
        self._dispatch()

    def _bury(self, worker: Worker, *, hung: bool = False) -> None:
        """A worker is gone: judge the picture it was decoding; those behind it wait for another worker."""
        self._workers.remove(worker)
        self._selector.unregister(worker)
        status, words = worker.end()
        numbers = deque(worker.jobs)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                got = words or signal_name(status)
                raise ResourceError("decoding", expected="a worker process that starts", got=got)
        elif numbers and (answer := self._verdict(self._jobs[numbers[0]], status, hung=hung)):
            self._answered(numbers.popleft(), answer)
        self._waiting.extendleft(reversed(numbers))

    def _verdict(self, job: _Job, status: int | None, *, hung: bool) -> dict[str, Any] | None:
        """What a worker's death says about the picture it was at; None: try it once more."""
        if hung or status == -signal.SIGALRM:
            if status is None:
                job.slot = None
            return {"reason": SkipReason.TIMEOUT, "detail": f"over {self._settings['timeout_s']:g} s"}
        job.deaths += 1
        if job.deaths < _LIVES:
            return None
        # The kernel kills with SIGKILL when memory is full; decoders die of other signals.
        reason = SkipReason.OUT_OF_MEMORY if status == -signal.SIGKILL else SkipReason.CRASHED
        return {"reason": reason, "detail": f"ended {job.deaths} workers: {signal_name(status)}"}

"""Decode worker processes as their parent sees them: started, spoken to, found dead, ended.

Decisions:
- Plain child processes with one socket pair each; no fork of this process (it may hold CUDA and threads)
  and no pickle. A worker starts in about 0.2 s.
- A process group of their own: Ctrl-C and Ctrl-Z at the terminal reach the parent only.
- Who died is told by the order of answers: the first picture without an answer was being decoded.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from mmsearch.errors import ResourceError

_BOOT = (
    "import os, sys, json;"
    "os.environ['OPENBLAS_NUM_THREADS'] = os.environ['OMP_NUM_THREADS'] = '1';"
    "sys.path[:] = json.loads(sys.argv[3]);"
    "import importlib;"
    "importlib.import_module(sys.argv[4]).main(int(sys.argv[1]), int(sys.argv[2]))"
)
_START_S = 60.0
_END_S = 2.0


class Slab:
    """Memory shared with the workers, cut into slots; it has no name, so nothing is left behind by a kill."""

    def __init__(self, slots: int, bytes_each: int) -> None:
        self.bytes_each = bytes_each
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("mmsearch-pixels", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        try:
            os.ftruncate(self.fd, slots * bytes_each)
            self._memory = mmap.mmap(self.fd, 0)
        except OSError as error:
            os.close(self.fd)
            raise ResourceError(
                "decoding", expected=f"{slots * bytes_each >> 20} MiB of shared memory", got=str(error)
            ) from error

    def copy(self, slot: int) -> bytearray:
        """What lies in a slot."""
        start = slot * self.bytes_each
        with memoryview(self._memory) as view, view[start : start + self.bytes_each] as part:
            return bytearray(part)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.fd)


class Worker:
    """One worker process and the jobs (numbers) it has not answered yet, oldest first.

    `ready` once it has said so; `heard` when it last said anything (monotonic seconds).
    """

    def __init__(self, slab: Slab, settings: Mapping[str, Any]) -> None:
        self.jobs: deque[int] = deque()
        self.ready = False
        self.heard = time.monotonic()
        self._patience_s = 1.5 * float(settings["timeout_s"]) + 1.0  # its own alarm clock comes first
        self._rest = b""
        self._link, theirs = socket.socketpair()
        with theirs:
            handed = [str(theirs.fileno()), str(slab.fd), _search_path(), str(settings["worker"])]
            command = [sys.executable, "-P", "-c", _BOOT, *handed]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(), slab.fd),
                    process_group=0,
                )
            except OSError as error:
                self._link.close()
                raise ResourceError("decoding", expected="a worker process", got=str(error)) from error
        self._link.setblocking(False)
        self._tell(settings)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """For selectors."""
        return self._link.fileno()

    def send(self, job: int, slot: int, path: str, view: Mapping[str, Any]) -> None:
        """Give it one more picture; should it be dead, `receive` finds out."""
        self.jobs.append(job)
        self._tell({"job": job, "slot": slot, "path": path, "view": dict(view)})

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The answers that have come in, and whether it is still there. Does not wait."""
        answers: list[dict[str, Any]] = []
        while True:
            try:
                part = self._link.recv(1 << 16)
            except BlockingIOError:
                return answers, True
            except ConnectionError:
                part = b""
            if not part:
                return answers, False
            self.heard = time.monotonic()
            *whole, self._rest = (self._rest + part).split(b"\n")
            for message in map(json.loads, whole):
                if "ready" in message:
                    self.ready = True
                else:
                    self.jobs.popleft()
                    answers.append(message)

    def silent(self, since: float) -> bool:
        """True when it has jobs and, watched since then, has said nothing for longer than any job may take."""
        limit = self._patience_s if self.ready else max(_START_S, self._patience_s)
        return bool(self.jobs) and time.monotonic() - max(self.heard, since) > limit

    def hang_up(self) -> None:
        """Let it end by itself."""
        self._link.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def end(self) -> tuple[int | None, str]:
        """See it end, by force if need be: its status (negative: a signal; None: it cannot be ended), and
        the last line it wrote before it was ready."""
        self.hang_up()
        status = _wait(self._process, _END_S)
        if status is None:
            self._process.kill()
            status = _wait(self._process, _END_S)
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            os.set_blocking(pipe.fileno(), False)
            words = (pipe.read() or b"").decode(errors="replace").strip()
        return status, words.splitlines()[-1] if words else ""

    def _tell(self, message: Mapping[str, Any]) -> None:
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            try:
                rest = rest[self._link.send(rest) :]
            except BlockingIOError:
                if not _writable(self._link, self._patience_s):
                    self._process.kill()
                    return
            except ConnectionError:
                return


def _writable(link: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(link, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def signal_name(status: int | None) -> str:
    """ "SIGSEGV" for -11; "status 1" for 1."""
    if status is None:
        return "no end"
    if status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _search_path() -> str:
    return json.dumps([os.path.abspath(entry) for entry in sys.path])

"""One writer at a time: an OS lock, with a note beside it saying who has it.

Decisions:
- The lock is the kernel's (through `filelock`), so it goes with the process that held it, however that
  died: a dead writer's lock is simply free. The note is for people only and decides nothing.
- `lock` stays in place when released: removing it would let two processes lock two different files.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mmsearch.errors import IndexLockedError, StoreError
from mmsearch.store.disk import os_fault

LOCK_NAME = "lock"
NOTE_NAME = "lock.json"
_NOTE_LIMIT = 4096


class WriterLock:
    """Held from `acquire` to `release`. Refused with `IndexLockedError` (exit 6) naming pid and time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._note = os.path.join(folder, NOTE_NAME)
        self._lock: BaseFileLock = FileLock(os.path.join(folder, LOCK_NAME), thread_local=False)

    def acquire(self) -> None:
        """Take the lock now or raise."""
        path = os.path.join(self._folder, LOCK_NAME)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise self._held_by() from error
        except NotImplementedError as error:
            raise _no_locks(path) from error
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise _no_locks(path) from error
            raise os_fault(error, path) from error
        self._leave_note()

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._lock.is_locked:
            Path(self._note).unlink(missing_ok=True)
            self._lock.release()

    def _leave_note(self) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            Path(self._note).write_text(json.dumps({"pid": os.getpid(), "since": since}))
        except OSError as error:
            self._lock.release()
            raise os_fault(error, self._note) from error

    def _held_by(self) -> IndexLockedError:
        who = "another process"
        try:
            with open(self._note, encoding="utf-8") as note:
                said = json.loads(note.read(_NOTE_LIMIT))
            who = f"pid {int(said['pid'])} since {str(said['since'])[:40]}"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the holder has not written it yet, or it is broken: the lock is what counts
        return IndexLockedError(
            self._folder,
            got=f"an index that is being updated by {who}",
            do="Wait until it is done, or stop that process.",
        )


def _no_locks(path: str) -> StoreError:
    return StoreError(
        path,
        expected="a file system with file locks",
        got="one without",
        do="Put the index on a local disk (searching it here works).",
    )

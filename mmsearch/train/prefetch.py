"""The next values of an iterator, made by a thread while the present one is used.

Decisions:
- The iterator is made, used and closed in the thread alone, so that whatever it holds belongs to one thread.
- Whoever stops early waits for the thread to end: nothing is left running behind a training step's error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.1


class _Ended(Generic[T]):
    """What the thread says last: why it ended, or that all values have been made."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(make: Callable[[], Generator[T, None, None]], *, depth: int) -> Generator[T, None, None]:
    """The values of `make()`, in order, up to `depth` of them made in advance; its error comes in its place."""
    ready: queue.Queue[T | _Ended[T]] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(make, ready, stop), name="mmsearch-prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(value := ready.get(), _Ended):
            yield value
        if value.error is not None:
            raise value.error
    finally:
        stop.set()
        thread.join()


def _produce(
    make: Callable[[], Generator[T, None, None]], ready: queue.Queue[T | _Ended[T]], stop: threading.Event
) -> None:
    error: BaseException | None = None
    values = make()
    try:
        for value in values:
            if not _put(ready, value, stop):
                break
    except BaseException as caught:  # noqa: BLE001 - it is raised again, in the thread that takes the values
        error = caught
    finally:
        values.close()
    _put(ready, _Ended(error), stop)


def _put(ready: queue.Queue[T | _Ended[T]], value: T | _Ended[T], stop: threading.Event) -> bool:
    """False when nobody wants values any more."""
    while not stop.is_set():
        try:
            ready.put(value, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False

"""Pictures decoded ahead of the model by worker processes, handed out in the order they were asked for.

Decisions:
- Requests are taken in the caller's own thread (they may come from a database that minds), up to `ahead`
  of them before the first answer is handed out.
- Pixels are copied out of the shared memory, so that a picture stays valid as long as it is held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from mmsearch.data.crew import Crew
from mmsearch.data.images import DEFAULT_LIMITS, ImageInfo, Limits, prepare
from mmsearch.data.reading import file_digest as file_digest
from mmsearch.data.slots import READ, slot_bytes
from mmsearch.errors import UsageError
from mmsearch.types import Pixels, Preprocessing, Skipped, SkipReason, Stamp

_SLAB_BYTES = 512 << 20
_BASE_BYTES = 1 << 30
_BYTES_A_PIXEL = 16

Request: TypeAlias = tuple[int, str] | tuple[int, str, Mapping[str, Any]]
"""(key, path), or (key, path, view): JSON values by name, for a worker that makes views of its own."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A picture ready for the model: `pixels` (size, size, 3) uint8; `content_hash` xxh3_128, 16 bytes."""

    key: int
    pixels: Pixels
    content_hash: bytes
    info: ImageInfo
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Failed:
    """A picture that costs itself only; hash and stamp are None when its bytes could not be read."""

    key: int
    skipped: Skipped
    content_hash: bytes | None
    stamp: Stamp | None


class Loader:
    """Decodes and prepares pictures in `workers` processes (None: one a core), started when first needed.

    `timeout_s`: the longest one picture may take, in seconds. `ahead`: how many pictures are under way or
    waiting to be taken. `memory_bytes`: address space of one worker (None: what `limits` can need).
    `worker`: the module whose `main` a worker process runs. A context manager; for one thread at a time.
    """

    def __init__(
        self,
        *,
        preprocessing: Preprocessing,
        workers: int | None = None,
        timeout_s: float = 20.0,
        limits: Limits = DEFAULT_LIMITS,
        ahead: int = 256,
        memory_bytes: int | None = None,
        worker: str = "mmsearch.data.worker",
    ) -> None:
        count = _cores() if workers is None else workers
        for name, value in (("workers", count), ("ahead", ahead), ("timeout_s", timeout_s)):
            if value <= 0:
                raise UsageError(name, expected="more than 0", got=str(value))
        prepare(Image.new("RGB", (1, 1)), preprocessing)  # an unknown fit is an error here, not in the workers
        self._size, bytes_each = preprocessing.size, slot_bytes(preprocessing.size)
        needed = _BASE_BYTES + limits.max_bytes + _BYTES_A_PIXEL * limits.max_pixels
        settings = {
            "preprocessing": asdict(preprocessing),
            "limits": asdict(limits),
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes or needed,
            "worker": worker,
        }
        slots = max(2 * count, min(ahead, _SLAB_BYTES // bytes_each))
        self._crew: Crew | None = Crew(count, slots=slots, bytes_each=bytes_each, settings=settings)
        self._loading = False

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are running."""
        return self._crew.pids if self._crew else ()

    def load(self, requests: Iterable[Request]) -> Iterator[Loaded | Failed]:
        """Decode request after request, in order; at most `ahead` of them are taken in advance.

        Raises `ResourceError` when workers cannot be started, `UsageError` when closed or while another
        `load` of this loader is not finished.
        """
        crew = self._crew
        if crew is None or self._loading:
            got = "a closed one" if crew is None else "one that is loading"
            raise UsageError("Loader.load", expected="an open, idle loader", got=got)
        self._loading = True
        order: deque[tuple[int, int, str]] = deque()
        source, more = iter(requests), True
        try:
            while more or order:
                while more and crew.has_room:
                    request = next(source, None)
                    more = request is not None
                    if request is not None:
                        order.append((crew.ask(*request[1:]), request[0], request[1]))
                    crew.gather(0)
                if order:
                    number, key, path = order[0]
                    answer, content = crew.wait(number)
                    order.popleft()
                    yield self._outcome(number, key, path, answer, content)
                elif more:  # all slots are still with dropped jobs
                    crew.gather(1.0)
        finally:
            self._loading = False
            if self._crew is not None:
                for number, _, _ in order:
                    crew.drop(number)

    def close(self) -> None:
        """End the workers; what was not taken is dropped. May be called twice."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def _outcome(self, number: int, key: int, path: str, answer: dict[str, Any], content: bytearray) -> Loaded | Failed:
        digest = stamp = None
        pixel_bytes = len(content) - READ.size
        if content:
            read, found, size, mtime_ns, ctime_ns = READ.unpack_from(content, pixel_bytes)
            if read == number:  # else its bytes were never read, and this is an older picture's note
                digest, stamp = found, Stamp(size, mtime_ns, ctime_ns)
        if "info" in answer and digest is not None and stamp is not None:
            pixels = np.frombuffer(content, np.uint8, pixel_bytes).reshape(self._size, self._size, 3)
            return Loaded(key, pixels, digest, ImageInfo(**answer["info"]), stamp)
        skipped = Skipped(path, SkipReason(answer["reason"]), answer["detail"])
        return Failed(key, skipped, digest, stamp)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

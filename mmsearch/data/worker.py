"""A decode worker: a process of its own, so that a picture that kills, hangs or floods it costs itself only.

Talks JSON lines over one socket; pixels go into memory shared with the parent, never over the socket.
First line in: the settings. Then one line in for each picture, one line out for each, in the same order.

Decisions:
- The worker ends when the socket does, so none is left when the parent is killed, and the kernel's
  alarm clock ends it when a decoder hangs in C, so that not even an orphan spins on.
- It ignores Ctrl-C: the parent decides what is finished first.
- Nothing heavy is imported: PIL, numpy and xxhash only.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import xxhash
from PIL import Image

from mmsearch.data.images import ImageInfo, Limits, open_image, prepare
from mmsearch.data.packed import read_picture
from mmsearch.data.slots import READ, slot_bytes
from mmsearch.errors import ImageError
from mmsearch.types import Preprocessing, SkipReason

Opener: TypeAlias = Callable[..., tuple[Image.Image, ImageInfo]]
"""As `open_image`; it also takes, by name, what the job's view holds."""


def main(socket_fd: int, slab_fd: int, *, open_picture: Opener = open_image) -> None:
    """Serve until the socket ends; the two descriptors are inherited from the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    with socket.socket(fileno=socket_fd) as link, link.makefile("rwb") as lines:
        settings = json.loads(lines.readline())
        _limit_memory(settings["memory_bytes"])
        Image.MAX_IMAGE_PIXELS = None  # the worker's own limit is checked instead
        _warm_up_decoders()
        _say(lines, {"ready": os.getpid()})
        _silence()
        _serve(lines, memoryview(mmap.mmap(slab_fd, 0)), settings, open_picture)


def _serve(lines: io.BufferedRWPair, slab: memoryview, settings: dict[str, Any], open_picture: Opener) -> None:
    preprocessing = Preprocessing(**settings["preprocessing"])
    limits = Limits(**settings["limits"])
    bytes_each = slot_bytes(preprocessing.size)
    for line in lines:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"])
        answer: dict[str, Any]
        slot = slab[job["slot"] * bytes_each : (job["slot"] + 1) * bytes_each]
        try:
            answer = {"info": asdict(_decode(job, slot, preprocessing, limits, open_picture))}
        except ImageError as error:
            answer = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            answer = {"reason": SkipReason.OUT_OF_MEMORY, "detail": "reading or resizing"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(lines, {"job": job["job"], **answer})


def _decode(
    job: dict[str, Any], slot: memoryview, preprocessing: Preprocessing, limits: Limits, open_picture: Opener
) -> ImageInfo:
    path, pixel_bytes = job["path"], len(slot) - READ.size
    data, stamp = read_picture(path, max_bytes=limits.max_bytes)
    digest = xxhash.xxh3_128_digest(data)
    # Written before decoding, so that the parent knows it even if decoding ends this process.
    READ.pack_into(slot, pixel_bytes, job["job"], digest, stamp.size, stamp.mtime_ns, stamp.ctime_ns)
    image, info = open_picture(data, limits=limits, target=preprocessing.size, where=path, **job["view"])
    np.frombuffer(slot, np.uint8, pixel_bytes)[:] = prepare(image, preprocessing).reshape(-1)
    return info


def _say(lines: io.BufferedRWPair, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message).encode() + b"\n")
    lines.flush()


def _limit_memory(limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder's crash need not fill the disk
    except (OSError, ValueError):  # the system knows no such limit
        return


def _warm_up_decoders() -> None:
    """Load the usual ones before the clock ticks; one thread a decoder, there is a worker for every core."""
    from PIL import AvifImagePlugin

    Image.preinit()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def _silence() -> None:
    """C libraries report on descriptor 2; from here on nobody listens."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)

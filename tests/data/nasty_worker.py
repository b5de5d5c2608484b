"""A decode worker whose decoder misbehaves for pictures with certain names, as broken C libraries do."""

from __future__ import annotations

import os
import signal
import sys
import time

from mmsearch.data import worker
from mmsearch.data.images import open_image


def _open(data: bytes, *, where: str, **options):
    name = os.path.basename(where)
    if name.startswith("segv"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("oom"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("once"):
        try:
            os.unlink(where + ".first")
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("hang"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if name.startswith("sleep"):
        time.sleep(1000)
    if name.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if name.startswith("flood"):
        hoard = []
        while True:
            hoard.append(bytearray(64 << 20))
    if name.startswith("loud"):
        os.write(2, b"libnoise: warning\n" * 100_000)
        sys.stderr.write("more noise\n")
    return open_image(data, where=where, **options)


def main(socket_fd: int, slab_fd: int) -> None:
    worker.main(socket_fd, slab_fd, open_picture=_open)

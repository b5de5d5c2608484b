"""One random view of one picture, made in this process or, as the module of a decode worker, in another.

Decisions:
- The decode worker of `data` with another opener: a picture that kills or hangs its decoder costs itself only, in
  training too, and no process is forked that holds a GPU.
- A picture is decoded large enough for its smallest crop, so that no crop is scaled up from a scaled-down JPEG.
- Below `SMALLEST_SIDE` pixels a file is a tracking pixel or a spacer, whatever its caption says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from PIL import Image

from mmsearch.data import worker
from mmsearch.data.images import DEFAULT_LIMITS, ImageInfo, Limits, open_image
from mmsearch.errors import ImageError
from mmsearch.train.augment import Augmentation, augment_image
from mmsearch.types import SkipReason

SMALLEST_SIDE = 8
"""Pixels; a picture with a shorter side is not trained on."""


def view_of(settings: Augmentation | None, *, seed: int, may_flip: bool) -> dict[str, Any]:
    """A view as JSON values: what `open_view` takes by name, and what travels to a worker. None: the plain view."""
    return {} if settings is None else {"settings": asdict(settings), "seed": seed, "may_flip": may_flip}


def open_view(
    data: bytes,
    *,
    target: int,
    where: str,
    limits: Limits = DEFAULT_LIMITS,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    may_flip: bool = True,
) -> tuple[Image.Image, ImageInfo]:
    """As `data.images.open_image`, then one random view by `settings` (the fields of `Augmentation`).

    The same `seed` gives the same view. Raises `ImageError`, with TOO_SMALL below `SMALLEST_SIDE`.
    """
    chosen = None if settings is None else Augmentation(**settings)
    wanted = target if chosen is None else math.ceil(target / math.sqrt(chosen.crop))
    image, info = open_image(data, limits=limits, target=wanted, where=where)
    if min(info.width, info.height) < SMALLEST_SIDE:
        detail = f"{info.width}x{info.height} pixels, less than {SMALLEST_SIDE} on a side"
        raise ImageError(where, reason=SkipReason.TOO_SMALL, detail=detail)
    return (image if chosen is None else augment_image(image, chosen, seed=seed, may_flip=may_flip)), info


def main(socket_fd: int, slab_fd: int) -> None:
    """Serve as a decode worker; see `data.worker.main`."""
    worker.main(socket_fd, slab_fd, open_picture=open_view)

"""The values that cross borders: frozen, small, and saying their units.

Axis letters used everywhere: `b` batch, `n` rows, `q` queries, `k` results, `t` text tokens,
`p` image patches, `w` tower width, `d` embedding dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Embeddings: TypeAlias = NDArray[np.float32]
"""(n, d) float32, each row of norm 1."""
Scores: TypeAlias = NDArray[np.float32]
"""Cosines in [-1, 1], higher is better."""
Rows: TypeAlias = NDArray[np.int64]
"""Positions in `vectors.f16`; -1 pads where there are fewer than k."""
Pixels: TypeAlias = NDArray[np.uint8]
"""(h, w, 3) or (b, h, w, 3) RGB, 0..255, sRGB, EXIF orientation already applied."""
Metadata: TypeAlias = Mapping[str, Any]
"""JSON values by name."""

NO_METADATA: Metadata = MappingProxyType({})
NO_PARTS: Mapping[str, float] = MappingProxyType({})


class Modality(StrEnum):
    """What a vector row was made of."""

    IMAGE = "image"
    TEXT = "text"


class SkipReason(StrEnum):
    """Why a file is in a collection but not in the index; the value is what the user reads."""

    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    TOO_LARGE = "too large"
    TOO_SMALL = "too small"
    UNSUPPORTED = "unsupported format"
    TIMEOUT = "decode timeout"
    CRASHED = "decoder crashed"
    UNREADABLE = "unreadable"
    VANISHED = "vanished"
    CHANGING = "changed while being read"
    NOT_A_FILE = "not a regular file"
    BAD_EMBEDDING = "bad embedding"
    OUT_OF_MEMORY = "out of memory"
    BAD_ROW = "bad table row"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file (or table row) that costs itself only."""

    path: str
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells cheaply that a file is the one seen before. Sizes in bytes, times in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Source:
    """An item as a reader found it: a picture, some texts, or both; nothing decoded yet.

    `root` is the folder or table it came from (absolute) and `name` its identity below that root;
    the two together are unique. Undecodable bytes of file names are kept (surrogateescape).
    """

    root: str
    name: str
    path: str | None
    stamp: Stamp | None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=lambda: NO_METADATA)


@dataclass(frozen=True, slots=True)
class Pair:
    """One picture with all its captions, for training and evaluation. `group` joins what belongs together."""

    image: str
    captions: tuple[str, ...]
    group: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One indexed thing as results and `info` show it. `width`, `height` in pixels after rotation."""

    id: str
    path: str | None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=lambda: NO_METADATA)
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `caption`: the text that matched, if one did.

    `score`, higher is better: the cosine in [-1, 1] of the first stage; of a re-ranked hit its `probability` in (0, 1),
    calibrated. All hits of one list have the same kind of score. `parts`: what a re-ranked hit's probability is made
    of, by name: `cosine` (of the first stage) and what else there was, see `second_stage`.
    """

    rank: int
    score: float
    item: Item
    modality: Modality
    caption: str | None = None
    probability: float | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: NO_PARTS)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes the model's input. Part of an index's identity.

    `size`: side in pixels of the square input. `fit`: "squash" resizes both sides, "crop" resizes the
    short side and cuts the middle, "pad" resizes the long side and fills with `mean`.
    `mean`, `std`: per channel on [0, 1] values.
    """

    size: int = 260
    fit: str = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def digest(self) -> str:
        """16 hex digits that change when any field does."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which vectors can be compared: same weights, same preprocessing, same dimension."""

    name: str
    weights: str
    preprocessing: str
    dim: int

    def same_space(self, other: ModelIdentity) -> bool:
        """True when rows of both can be compared (the name is for people and does not count)."""
        return (self.weights, self.preprocessing, self.dim) == (other.weights, other.preprocessing, other.dim)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What one build did. Counts are items; `seconds` is wall time; `images_per_s` counts encoded pictures.

    `tokens`: pictures whose patch tokens were made.
    """

    index: Path
    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    removed: int = 0
    encoded_images: int = 0
    encoded_texts: int = 0
    tokens: int = 0
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def images_per_s(self) -> float:
        """Encoded pictures per second of the whole build."""
        return self.encoded_images / self.seconds if self.seconds > 0 else 0.0

"""Patch tokens as they are kept: int8 numbers with one half-precision scale a token.

Decisions:
- Symmetric and per token (a token is q · scale, q in -127..127): a token with large numbers costs its neighbours no
  precision, and zero stays zero. The same idea as the per-row int8 matrices of Dettmers et al. 2022 (arXiv 2208.07339).
- Numbers are rounded against the scale *as stored*, in half precision, so that the error is half a step at most.
- A picture with a number that is not finite is marked (its scales are NaN) rather than refused: it costs itself only,
  and nothing can be computed of it by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.rerank.config import RerankConfig
from mmsearch.types import Pixels, Preprocessing

LEVELS = 127
"""Numbers are -127..127: symmetric, so -128 is not used."""
_SCALE = np.dtype("<f2")


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Patch tokens of n pictures, quantised: `values` (n, p, c) int8, `scales` (n, p) float16, finite and >= 0.

    Scales that are NaN mark a picture that cannot be used. Raises `UsageError` for other shapes or dtypes.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float16]

    def __post_init__(self) -> None:
        fits = self.values.ndim == 3 and self.values.shape[:2] == self.scales.shape
        if not fits or self.values.dtype != np.int8 or self.scales.dtype != np.float16:
            raise UsageError(
                "patches",
                expected="values (n, p, c) int8 and scales (n, p) float16",
                got=f"{self.values.shape} {self.values.dtype} and {self.scales.shape} {self.scales.dtype}",
            )

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]) -> Patches:
        """The pictures at `places` (m,), in that order, or where a mask (n,) is true."""
        chosen = places if isinstance(places, np.ndarray) else np.asarray(places, np.int64)
        return Patches(self.values[chosen], self.scales[chosen])

    def intact(self) -> NDArray[np.bool_]:
        """(n,): False for pictures that are marked."""
        return np.asarray(np.isfinite(self.scales).all(axis=1))

    @staticmethod
    def concatenate(parts: Sequence[Patches]) -> Patches:
        """All pictures of all parts, in order. `UsageError` for no parts, or parts of different p or c."""
        shapes = {part.values.shape[1:] for part in parts}
        if len(shapes) != 1:
            raise UsageError("patches", expected="parts of one (p, c)", got=str(sorted(shapes)) if shapes else "none")
        return Patches(np.concatenate([part.values for part in parts]), np.concatenate([part.scales for part in parts]))


class ReadsPatches(Protocol):
    """What makes patch tokens of pictures; `rerank.reranker.Reranker` does."""

    @property
    def tokens_identity(self) -> str:
        """Changes whenever the same picture would give other tokens."""
        ...

    @property
    def config(self) -> RerankConfig:
        """Says p and c."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become its input."""
        ...

    def read_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> Patches:
        """(b, s, s, 3) uint8 -> the patch tokens of b pictures, those without finite ones marked."""
        ...


def quantise(patches: NDArray[np.float32]) -> Patches:
    """(n, p, c) float32 -> int8 with a scale a token, off by half a scale at most. [[[1, -2]]] -> 64, -127 of 2/127.

    A token of zeros has scale 0. A picture with NaN, infinity or a number that half precision cannot scale (8.3 million
    and more) is marked. Raises `UsageError` for another number of axes.
    """
    if patches.ndim != 3:
        raise UsageError("patches", expected="(n, p, c)", got=str(patches.shape))
    largest = np.abs(patches).max(axis=2, initial=0.0).astype(np.float64)  # (n, p, c) -> (n, p); NaN stays NaN
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (largest / LEVELS).astype(np.float16)
    # Rounded down far enough (only among subnormal scales), the largest number would not fit into 127 steps and a half.
    too_small = (LEVELS + 0.5) * scales.astype(np.float64) < largest
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    marked = ~np.isfinite(scales).all(axis=1)
    scales[marked] = np.nan
    steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[..., None]  # (n, p, 1)
    finite = np.where(marked[:, None, None], np.float32(0), patches)
    values = np.clip(np.rint(finite / steps), -LEVELS, LEVELS).astype(np.int8)
    return Patches(values, scales)


def dequantise(patches: Patches) -> NDArray[np.float32]:
    """(n, p, c) float32: value times scale; NaN throughout for pictures that are marked."""
    floats: NDArray[np.float32] = patches.values.astype(np.float32) * patches.scales.astype(np.float32)[..., None]
    return floats


def pack(one: Patches) -> bytes:
    """The patch tokens of one picture as p · c + 2 · p bytes: the scales (little-endian), then the values in C order.

    Known size: 31,266 for p = 81, c = 384. Raises `UsageError` for more or less than one picture, or a marked one.
    """
    if len(one) != 1 or not one.intact().all():
        got = f"{len(one)} pictures" if len(one) != 1 else "one whose numbers are not finite"
        raise UsageError("patches to pack", expected="one picture", got=got)
    return bytes(one.scales.astype(_SCALE).tobytes() + one.values.tobytes())


def unpack(blob: bytes, *, p: int, c: int) -> Patches:
    """The one picture that `pack` made `blob` of. Raises `UsageError` when it has not p · (c + 2) bytes."""
    if len(blob) != p * (c + 2):
        raise UsageError("packed patches", expected=f"{p * (c + 2)} bytes", got=str(len(blob)))
    scales = np.frombuffer(blob, _SCALE, p).astype(np.float16, copy=False).reshape(1, p)
    return Patches(np.frombuffer(blob, np.int8, p * c, offset=2 * p).reshape(1, p, c), scales)

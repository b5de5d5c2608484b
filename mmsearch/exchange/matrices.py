"""`.npy` files of vectors, a block at a time.

Decisions:
- The header is checked by numpy, which refuses Python objects (pickles) and files cut short. Rows are then read, not
  mapped: memory stays at one block whatever the kernel caches, and a file that is cut meanwhile raises instead of
  killing the process. Only arrays in Fortran order are mapped, whose rows lie in no one place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import InputError


class NpyMatrix:
    """(n, d) half, single or double precision rows of a `.npy` file; see `base.Matrix`."""

    def __init__(self, path: str) -> None:
        """Raises `InputError` when there is no such array in the file."""
        mapped = open_npy(path)
        if mapped.ndim != 2 or mapped.dtype.kind != "f" or mapped.shape[1] < 1:
            raise InputError(path, expected="floats of shape (n, d)", got=f"{mapped.dtype} {mapped.shape}")
        self.path, self.dtype = path, mapped.dtype
        self.count, self.dim = mapped.shape
        self._first_byte = int(mapped.offset)
        self._mapped = None if mapped.flags.c_contiguous else mapped

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """See `base.Matrix.rows`."""
        if self._mapped is not None:
            return np.array(self._mapped[start:stop])
        wanted, at = (stop - start) * self.dim, self._first_byte + start * self.dim * self.dtype.itemsize
        try:
            numbers = np.fromfile(self.path, self.dtype, count=wanted, offset=at)
        except OSError as error:
            raise InputError(self.path, expected="a readable file", got=error.strerror or str(error)) from error
        if len(numbers) != wanted:
            raise InputError(
                self.path, expected=f"{self.count} rows", got="fewer", do="It was changed while it was read."
            )
        return numbers.reshape(stop - start, self.dim)


def open_npy(path: str) -> np.memmap[Any, np.dtype[Any]]:
    """The array in a `.npy` file, mapped. Raises `InputError`, also for pickled objects."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise InputError(path, expected="a .npy file", got="no such file") from error
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(path, expected="a .npy file of plain numbers or texts", got=first[:200]) from error

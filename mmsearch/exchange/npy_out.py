"""`.npy` files whose number of rows is known only when they are whole, and JSON lines beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.exchange.sidecars import SIDECAR
from mmsearch.store.records import ItemRecord

_HEADER_BYTES = 128
"""Room for the header of any number of rows; a multiple of 64, as the format wants it."""


class NpyFile:
    """An (n, d) half-precision `.npy` file, written in blocks; its header is right after `close`."""

    def __init__(self, path: str, dim: int) -> None:
        self._file, self._dim, self.rows = open(path, "wb"), dim, 0  # noqa: SIM115 - closed by `close`
        self._file.write(npy_header(0, dim))

    def add(self, rows: NDArray[np.float16]) -> None:
        """Append (b, d) rows."""
        self._file.write(np.ascontiguousarray(rows, dtype="<f2").tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        """Say in the header how many rows there are."""
        self._file.seek(0)
        self._file.write(npy_header(self.rows, self._dim))
        self._file.close()


def npy_header(rows: int, dim: int) -> bytes:
    """The header of a `.npy` file (format 1.0) of (rows, dim) little-endian half floats, 128 bytes."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    room = _HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


class JsonLinesFile:
    """One JSON object a row, in ASCII: any file name survives as escapes."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", encoding="ascii", newline="\n")  # noqa: SIM115 - closed by `close`

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a row."""
        self._file.write(json.dumps(entry, separators=(",", ":"), default=str) + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class NpyShards:
    """`NAME_0000.npy` and its ids, `NAME_0001.npy` and so on, `most` rows each."""

    def __init__(self, folder: str, name: str, *, dim: int, most: int) -> None:
        self._base, self._dim, self._most = os.path.join(folder, name), dim, most
        self._number = 0
        self._open: tuple[NpyFile, JsonLinesFile] | None = None

    def add(self, rows: NDArray[np.float16], entries: Sequence[Mapping[str, Any]]) -> None:
        """Append (b, d) rows and what is known of each."""
        start = 0
        while start < len(rows):
            vectors, lines = self._with_room()
            stop = min(start + self._most - vectors.rows, len(rows))
            vectors.add(rows[start:stop])
            for entry in entries[start:stop]:
                lines.add(entry)
            start = stop

    def close(self) -> None:
        """Finish the last pair of files."""
        for file in self._open or ():
            file.close()
        self._open = None

    def _with_room(self) -> tuple[NpyFile, JsonLinesFile]:
        if self._open is not None and self._open[0].rows == self._most:
            self.close()
        if self._open is None:
            path = f"{self._base}_{self._number:04d}.npy"
            self._open = NpyFile(path, self._dim), JsonLinesFile(beside(path))
            self._number += 1
        return self._open


def image_entry(record: ItemRecord) -> dict[str, Any]:
    """An item's facts; those it has none of are left out."""
    found = {
        "id": record.id,
        "image_path": record.path,
        "captions": list(record.captions),
        "width": record.width,
        "height": record.height,
        "taken_at": record.taken_at,
        "metadata": dict(record.metadata),
    }
    return {name: value for name, value in found.items() if value not in (None, [], {})}


def text_entry(record: ItemRecord, part: int) -> dict[str, Any]:
    """The facts of one caption's row. Its id is the item's, followed by which caption where there are several."""
    name = record.id if len(record.texts) == 1 else f"{record.id}#{part}"
    entry = {"id": name, "captions": [record.captions[part]], "metadata": dict(record.metadata)}
    return {name: value for name, value in entry.items() if value not in ([], {})}


def beside(path: str) -> str:
    """Where the JSON lines of a file of vectors go."""
    return path.rsplit(".", 1)[0] + SIDECAR

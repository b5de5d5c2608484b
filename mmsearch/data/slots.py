"""One slot of the memory that decode workers share with their parent: the pixels, then what was read."""

from __future__ import annotations

import struct

READ = struct.Struct("<Q16sQqq")
"""After the pixels: job number, xxh3_128 of the file, its size, mtime and ctime."""


def slot_bytes(size: int) -> int:
    """Bytes of one slot for pixels of (size, size, 3)."""
    return size * size * 3 + READ.size

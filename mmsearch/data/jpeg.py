"""What a JPEG's markers tell that the decoder does not.

libjpeg warns about damage in the middle of the picture and goes on, and Pillow drops the warning. A walk
over the markers (ITU-T T.81, annex B) finds it: inside entropy-coded data 0xFF may only be followed by 0x00,
a fill byte or a restart marker, and a scan may only be followed by another segment or the end.
"""

from __future__ import annotations

import re
import struct

_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF}
_WITH_LENGTH = _FRAMES | {0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFE} | set(range(0xE0, 0xF0))
_SOS, _EOI = 0xDA, 0xD9
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def walk(data: bytes) -> tuple[str, int]:
    """Where the marker structure breaks, in words ("" when it is whole), and the position of the end mark.

    About 0.5 ms per megabyte.
    """
    at = 2
    while True:
        if at + 2 > len(data):
            return "no end marker", len(data)
        if data[at] != 0xFF:
            return f"unexpected data at byte {at}", at
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == _EOI:
            return "", at
        if marker not in _WITH_LENGTH:
            return f"unexpected marker {marker:02X} at byte {at}", at
        if at + 4 > len(data):
            return "no end marker", len(data)
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
        if marker == _SOS:
            at = _scan_end(data, at)


def continued(data: bytes, end: int) -> bytes:
    """The same JPEG with a little more entropy-coded data before its end mark at `end`.

    Decodes to the same picture, unless the end mark came too early: then the decoder had made up the rest
    (flat grey), and now draws some of it from the addition.
    """
    return data[:end] + bytes(range(255)) * 2 + b"\xff\xd9"


def unsupported(data: bytes) -> str:
    """Why libjpeg cannot decode this kind of JPEG ("12-bit JPEG", "lossless JPEG"), or ""."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            if marker in _LOSSLESS:
                return "lossless JPEG"
            if marker in _HIERARCHICAL:
                return "hierarchical JPEG"
            return "" if data[at + 4] == 8 else f"{data[at + 4]}-bit JPEG"
        at += 1 if marker == 0xFF else 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return ""


def _scan_end(data: bytes, at: int) -> int:
    """Position of the first marker after the entropy-coded data that begins at `at`."""
    found = _END_OF_SCAN.search(data, at)
    return found.start() if found else len(data)

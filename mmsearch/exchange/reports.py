"""What an import and an export did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmsearch.types import Skipped


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one import did. `rows` were read now; items were added, changed, unchanged or removed.

    `seconds`: wall time of all of it, `read_seconds` of reading and committing, without the files that searches use.
    `resumed`: rows that an import which was stopped had read and committed before. `normalised`: vectors that were
    scaled to length 1. `skipped_count`: vectors without a direction; `skipped` names the first of them.
    """

    index: Path
    rows: int = 0
    resumed: int = 0
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    normalised: int = 0
    skipped_count: int = 0
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    read_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows read and committed a second."""
        return self.rows / self.read_seconds if self.read_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What one export wrote: `image_rows` and `text_rows` vectors, in `files` of `bytes` together."""

    target: Path
    format: str
    image_rows: int = 0
    text_rows: int = 0
    files: int = 0
    bytes: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

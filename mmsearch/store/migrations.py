"""Older formats are brought up to date in one transaction: either all steps happened or none did.

To add format N + 1: write a function that changes a format-N database, put it in `_STEPS` under N, and
raise `manifest.FORMAT`. Format 1 is the first, so the table is empty.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

from mmsearch.errors import IndexDamagedError, IndexMismatchError
from mmsearch.store.disk import REBUILD, Disk
from mmsearch.store.manifest import FORMAT, refuse_newer
from mmsearch.store.sqlite import APPLICATION_ID

Step = Callable[[sqlite3.Connection], None]

_STEPS: dict[int, Step] = {}
"""format -> what turns it into the next one."""


def format_of(connection: sqlite3.Connection) -> int:
    """The format a database was written in (0: not an index, or not yet)."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def check_format(connection: sqlite3.Connection, path: str) -> int:
    """The format of an index's database; refuses newer ones and databases of something else."""
    if int(connection.execute("PRAGMA application_id").fetchone()[0]) != APPLICATION_ID:
        raise IndexDamagedError(path, expected="a database of mmsearch", got="another one", do=REBUILD)
    found = format_of(connection)
    if found > FORMAT:
        made = connection.execute("SELECT value FROM meta WHERE key = 'made_by'").fetchone()
        refuse_newer(found, str(made[0]) if made else "", path)
    return found


def migrate(
    connection: sqlite3.Connection,
    path: str,
    disk: Disk,
    *,
    to: int = FORMAT,
    steps: Mapping[int, Step] = _STEPS,
) -> bool:
    """Bring the database at `path` to format `to`; True when anything was done. Needs the writer lock."""
    found = format_of(connection)
    if found >= to:
        return False
    missing = [version for version in range(found, to) if version not in steps]
    if missing:
        raise IndexMismatchError(
            path,
            expected=f"format {to}",
            got=f"format {found}, which cannot be brought up to date",
            do="Build the index anew.",
        )
    connection.execute("BEGIN IMMEDIATE")
    try:
        for version in range(found, to):
            steps[version](connection)
        connection.execute(f"PRAGMA user_version = {to}")
        connection.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")
        disk.commit(connection, path)
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return True

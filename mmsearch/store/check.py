"""Finding damage: the checks made when an index is opened, and the thorough ones of `verify`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmsearch.errors import IndexDamagedError, MmsearchError
from mmsearch.store import bridge_file, nested
from mmsearch.store.base import ItemState, Problem
from mmsearch.store.checksums import QUICK_BYTES, is_intact
from mmsearch.store.connections import database_digest
from mmsearch.store.disk import REBUILD, REENCODE, os_fault
from mmsearch.store.manifest import MANIFEST_NAME, REWRITE, Manifest, read_manifest
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import ITEMS_NAME
from mmsearch.store.tokens import RETOKENISE, TOKENS_NAME, wrong_tokens
from mmsearch.store.vectors import BYTES_PER_NUMBER, wrong_blocks

REDERIVE = "Searches do without it. Run 'mmsearch index' on this index again: it is written anew."
SHOWN_NAMES = 3
_COUNTS = """
SELECT 'rows of items and dead rows', (SELECT count(*) FROM rows) + (SELECT count(*) FROM dead), ?1
UNION ALL SELECT 'rows in blocks', (SELECT coalesce(sum(count), 0) FROM blocks), ?1
UNION ALL SELECT 'rows without an item',
  (SELECT count(*) FROM rows WHERE item NOT IN (SELECT item FROM items WHERE state = 'ok')), 0
UNION ALL SELECT 'rows both in use and dead', (SELECT count(*) FROM rows JOIN dead USING (row)), 0
UNION ALL SELECT 'pictures without their row', (SELECT count(*) FROM items AS i WHERE i.image IS NOT NULL
  AND NOT EXISTS (SELECT 1 FROM rows AS r WHERE r.row = i.image AND r.item = i.item AND r.part IS NULL)), 0
UNION ALL SELECT 'picture rows of items', (SELECT count(*) FROM rows WHERE part IS NULL),
  (SELECT count(image) FROM items)
"""


class ItemsFile:
    """items.sqlite against the digest in the manifest; taken before a transaction begins, judged after.

    When the generation read afterwards is the manifest's, no commit came between, and any difference
    is damage: nothing else changes the file.
    """

    def __init__(self, folder: str, manifest: Manifest | None, *, limit: int | None) -> None:
        self._path, self._manifest = os.path.join(folder, ITEMS_NAME), manifest
        self._found: tuple[int, str] | None = None
        if manifest is not None and manifest.items.xxh3 and (limit is None or manifest.items.size <= limit):
            try:
                self._found = database_digest(self._path)
            except FileNotFoundError:
                raise IndexDamagedError(self._path, expected="a file", got="none", do=REBUILD) from None

    def judge(self, generation: int) -> None:
        """Raise `IndexDamagedError` when the bytes are not those recorded for this generation."""
        if self._found is None or self._manifest is None or generation != self._manifest.generation:
            return
        recorded = (self._manifest.items.size, self._manifest.items.xxh3)
        if self._found != recorded:
            raise IndexDamagedError(
                self._path,
                expected="size and checksum {} {}".format(*recorded),
                got="{} {}".format(*self._found),
                do=REBUILD,
            )


def quick_check(folder: str) -> DirectorySnapshot:
    """Open the newest generation, having checked all that can be checked in milliseconds."""
    items = ItemsFile(folder, read_manifest(folder), limit=QUICK_BYTES)
    snapshot = DirectorySnapshot(folder)
    try:
        items.judge(snapshot.generation)
        if snapshot.row_count * snapshot.dim * BYTES_PER_NUMBER <= QUICK_BYTES:
            for problem in _vector_problems(snapshot):
                raise IndexDamagedError(snapshot.vectors_path, got=problem.what, do=problem.repair)
    except BaseException:
        snapshot.close()
        raise
    return snapshot


def verify(folder: str) -> list[Problem]:
    """Everything that is wrong, file by file; reads every byte."""
    problems: list[Problem] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(folder)
    except MmsearchError as error:
        problems.append(_problem(folder, error))
    try:
        items = ItemsFile(folder, manifest, limit=None)
        with DirectorySnapshot(folder, lenient=True) as snapshot:
            items.judge(snapshot.generation)
            if manifest is None and not problems and snapshot.generation > 0:
                problems.append(Problem(MANIFEST_NAME, "missing", REWRITE))
            problems += _database_problems(snapshot)
            problems += _vector_problems(snapshot)
            problems += _derived_problems(folder, snapshot)
            problems += _token_problems(folder, snapshot)
            problems += _nested_problems(folder)
            problems += _bridge_problems(folder)
    except MmsearchError as error:
        problems.append(_problem(folder, error))
    except OSError as error:
        problems.append(_problem(folder, os_fault(error, os.fsdecode(error.filename or folder))))
    return problems


def _problem(folder: str, error: MmsearchError) -> Problem:
    what = ", ".join(part for part in (error.expected and f"expected {error.expected}", error.got) if part)
    return Problem(os.path.relpath(error.where, folder), what, error.do)


def _database_problems(snapshot: DirectorySnapshot) -> Iterator[Problem]:
    for (line,) in snapshot.execute("PRAGMA integrity_check(3)"):
        if line != "ok":
            yield Problem(ITEMS_NAME, str(line), REBUILD)
    for what, found, expected in snapshot.execute(_COUNTS, (snapshot.row_count,)):
        if found != expected:
            yield Problem(ITEMS_NAME, f"{what}: expected {expected}, got {found}", REBUILD)
    for _ in snapshot.items(state=None):
        pass  # reading each one decodes it: damage raises
    for part, captions in snapshot.execute(
        "SELECT max(r.part), json_array_length(i.captions) FROM rows AS r JOIN items AS i ON i.item = r.item"
        " WHERE r.part IS NOT NULL GROUP BY i.item HAVING max(r.part) >= json_array_length(i.captions) LIMIT 1"
    ):
        yield Problem(ITEMS_NAME, f"a row for caption {part} of {captions}", REBUILD)
    manifest = snapshot.manifest
    if manifest is not None and manifest.generation == snapshot.generation and manifest.rows != snapshot.row_count:
        yield Problem(MANIFEST_NAME, f"{manifest.rows} rows, items.sqlite has {snapshot.row_count}", REWRITE)


def _vector_problems(snapshot: DirectorySnapshot) -> Iterator[Problem]:
    name = snapshot.vectors_name
    blocks = [tuple(row) for row in snapshot.execute("SELECT first, count, xxh3 FROM blocks ORDER BY first")]
    expected = 0
    for first, count, _ in blocks:
        if first != expected or count < 1:
            yield Problem(ITEMS_NAME, f"block at row {first}: expected one at {expected}", REBUILD)
            return
        expected += count
    if expected != snapshot.row_count:
        yield Problem(ITEMS_NAME, f"blocks of {expected} rows, expected {snapshot.row_count}", REBUILD)
        return
    for first, count, _ in wrong_blocks(snapshot.vectors_path, blocks, dim=snapshot.dim):
        yield Problem(name, f"rows {first} to {first + count - 1} are not those that were written", REENCODE)


def _derived_problems(folder: str, snapshot: DirectorySnapshot) -> Iterator[Problem]:
    if snapshot.manifest is None:
        return
    for derived in snapshot.manifest.derived.values():
        path = os.path.join(folder, derived.file)
        if not Path(path).exists():
            yield Problem(derived.file, "missing", REDERIVE)
        elif not is_intact(path, derived, thorough=True):
            yield Problem(derived.file, "not the bytes that were written", REDERIVE)


def _token_problems(folder: str, snapshot: DirectorySnapshot) -> Iterator[Problem]:
    try:
        wrong = set(wrong_tokens(folder))
    except IndexDamagedError as error:
        yield Problem(TOKENS_NAME, _problem(folder, error).what, RETOKENISE)
        return
    if wrong:
        names = [path for digest, path in snapshot.pictures() if digest in wrong]
        shown = names[:SHOWN_NAMES] or [digest.hex() for digest in sorted(wrong)[:SHOWN_NAMES]]
        rest = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
        yield Problem(TOKENS_NAME, f"patch tokens that are not those written: {', '.join(shown)}{rest}", RETOKENISE)


def _nested_problems(folder: str) -> Iterator[Problem]:
    """What is wrong with a reindexing that has begun; searches do not look at it."""
    if nested.is_there(folder):
        for problem in verify(nested.folder_of(folder)):
            yield Problem(os.path.join(nested.FOLDER, problem.file), problem.what, nested.REPAIR)


def _bridge_problems(folder: str) -> Iterator[Problem]:
    try:
        bridge_file.read(folder)
    except IndexDamagedError as error:
        yield Problem(bridge_file.NAME, _problem(folder, error).what, bridge_file.REFIT)


def live_items(snapshot: DirectorySnapshot) -> dict[str, int]:
    """Counts for the manifest and `info`."""
    states: dict[str, int] = {
        str(state): int(count) for state, count in snapshot.execute("SELECT state, count(*) FROM items GROUP BY state")
    }
    rows = dict(snapshot.execute("SELECT part IS NOT NULL, count(*) FROM rows GROUP BY 1"))
    return {
        "items": states.get(ItemState.OK.value, 0),
        "skipped": states.get(ItemState.SKIPPED.value, 0),
        "image_rows": int(rows.get(0, 0)),
        "text_rows": int(rows.get(1, 0)),
        "dead_rows": int(snapshot.execute("SELECT count(*) FROM dead")[0][0]),
    }

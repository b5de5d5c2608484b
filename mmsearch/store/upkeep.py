"""What a writer does to rows as a whole: repair, compaction, derived files. Each is one durable step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash

from mmsearch.errors import IndexDamagedError
from mmsearch.store.base import Derived, DerivedWriter
from mmsearch.store.checksums import ends_digest
from mmsearch.store.derived import NewFile
from mmsearch.store.disk import REENCODE
from mmsearch.store.manifest import DERIVED_FOLDER
from mmsearch.store.modality_rows import ModalityRows
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import is_text, write_meta
from mmsearch.store.vectors import BLOCK_ROWS, digest, file_name, wrong_blocks
from mmsearch.store.writer import Writer
from mmsearch.types import Modality

WORK_FOLDER = "build"
"""Below the derived files: what a maker has half done."""


def drop_damaged(writer: Writer) -> int:
    """Remove every item that has a row in a damaged block, so that a scan finds it NEW; how many.

    The bytes stay as they are and are recorded as such, dead.
    """
    facts = writer.facts()
    path, dim = writer.path_of(facts), int(facts["dim"])
    blocks = writer.db.execute("SELECT first, count, xxh3 FROM blocks ORDER BY first").fetchall()
    wrong = list(wrong_blocks(path, blocks, dim=dim))
    if not wrong:
        return 0
    lost = 0
    with writer.transaction() as db:
        for first, count, found in wrong:
            inside = "SELECT item FROM rows WHERE row >= ? AND row < ?"
            span = (first, first + count)
            items = [item for (item,) in db.execute(f"SELECT DISTINCT item FROM ({inside})", span)]
            for item in items:
                db.execute("INSERT INTO dead SELECT row, part IS NOT NULL FROM rows WHERE item = ?", (item,))
                db.execute("DELETE FROM rows WHERE item = ?", (item,))
                db.execute("DELETE FROM items WHERE item = ?", (item,))
            db.execute("UPDATE blocks SET xxh3 = ? WHERE first = ?", (found, first))
            lost += len(items)
    return lost


def compact(writer: Writer, *, share: float, at_least: int) -> bool:
    """Write a new vector file of the rows that are alive, pictures first, and switch to it."""
    facts = writer.facts()
    rows = int(facts["rows"])
    dead = int(writer.db.execute("SELECT count(*) FROM dead").fetchone()[0])
    if rows < at_least or dead == 0 or dead <= share * rows:
        return False
    name = file_name(int(facts["generation"]) + 1)
    blocks: list[tuple[int, int, str, int]] = []
    with DirectorySnapshot(writer.folder, lenient=True) as snapshot:
        _refuse_damage(snapshot, snapshot.execute("SELECT first, count, xxh3 FROM blocks ORDER BY first"))
        need = (rows - dead) * snapshot.dim * 2
        writer.disk.put(os.path.join(writer.folder, name), _alive(snapshot, blocks), need=need)
    with writer.transaction() as db:
        db.execute(
            "CREATE TEMP TABLE moved AS SELECT row_number() OVER (ORDER BY part IS NOT NULL, row) - 1 AS row,"
            " item, part FROM rows"
        )
        db.execute("DELETE FROM rows")
        db.execute("INSERT INTO rows (row, item, part) SELECT row, item, part FROM temp.moved")
        db.execute("UPDATE items SET image = m.row FROM temp.moved AS m WHERE m.item = items.item AND m.part IS NULL")
        db.execute("DROP TABLE temp.moved")
        db.execute("DELETE FROM dead")
        db.execute("DELETE FROM blocks")
        writer.add_blocks(blocks)
        write_meta(db, {"rows": rows - dead, "vectors": name})
    writer.finish()
    return True


def clear(writer: Writer, facts: Mapping[str, Any]) -> None:
    """Forget every item and start over with these facts and an empty vector file of a new name."""
    before = writer.facts()
    name = file_name(int(before["generation"]) + 1)
    writer.disk.append(os.path.join(writer.folder, name), [], at=0)
    writer.disk.sync_dir(writer.folder)
    kept = {"generation": before["generation"], "created_at": before["created_at"], "vectors": name}
    with writer.transaction() as db:
        for table in ("items", "rows", "dead", "blocks"):
            db.execute(f"DELETE FROM {table}")
        write_meta(db, {**facts, **kept})
    writer.finish({})


def _refuse_damage(snapshot: DirectorySnapshot, blocks: Iterable[tuple[int, int, str]]) -> None:
    for first, count, _ in wrong_blocks(snapshot.vectors_path, blocks, dim=snapshot.dim):
        raise IndexDamagedError(
            snapshot.vectors_path, got=f"rows {first} to {first + count - 1} that are not those written", do=REENCODE
        )


def _alive(snapshot: DirectorySnapshot, blocks: list[tuple[int, int, str, int]]) -> Iterator[bytes]:
    """The rows that are alive, in their new order; their checksums go into `blocks`."""
    first = 0
    for modality in Modality:
        rows = snapshot.alive_rows(modality)
        for start in range(0, len(rows), BLOCK_ROWS):
            piece = snapshot.take(rows[start : start + BLOCK_ROWS])
            blocks.append((first, len(piece), digest(piece), is_text(modality)))
            first += len(piece)
            yield piece.tobytes()


def update_derived(writer: Writer, derived_writer: DerivedWriter) -> None:
    """Have the derived files made that their maker finds missing, damaged or stale; then the manifest."""
    current: dict[str, Derived] = {}  # of modalities that are not looked at yet: what is there stands
    work = os.path.join(writer.folder, DERIVED_FOLDER, WORK_FOLDER)
    with DirectorySnapshot(writer.folder, lenient=True) as snapshot:
        recorded = {modality: snapshot.derived(modality) for modality in Modality}
        fresh = False
        current |= {modality.value: one for modality, one in recorded.items() if one is not None}
        for modality in Modality:
            rows = ModalityRows(snapshot, modality, work=os.path.join(work, modality.value))
            if fresh and rows.count:
                writer.finish(current)  # hours of work are not to be lost by what comes after them
            there = current.pop(modality.value, None)
            path = None if there is None else snapshot.intact(there)
            made = derived_writer.make(rows, there=there, path=path) if rows.count else None
            if isinstance(made, NewFile):
                made = _put(writer, snapshot, rows, made)
            elif made is not None and made != there:
                with writer.transaction():  # other facts of the same file: readers see them by the generation
                    pass
            if made is not None:
                current[modality.value] = made
                fresh = fresh or made != there
    writer.finish(current)
    shutil.rmtree(work, ignore_errors=True)  # what is left of it would only be started from in vain


def _put(writer: Writer, snapshot: DirectorySnapshot, rows: ModalityRows, new: NewFile) -> Derived:
    writer.disk.make_dir(os.path.join(writer.folder, DERIVED_FOLDER))
    generation = int(writer.facts()["generation"])
    if os.path.lexists(os.path.join(writer.folder, _file_of(rows.modality, generation))):
        with writer.transaction():  # the same rows, another file: a generation of its own, so that readers take it up
            generation += 1
    file = _file_of(rows.modality, generation)
    path, state = os.path.join(writer.folder, file), xxhash.xxh3_64()

    def chunks() -> Iterator[bytes]:
        for chunk in new.chunks:
            state.update(chunk)
            yield chunk

    size = writer.disk.put(path, chunks(), need=new.need)
    return Derived(
        file=file,
        kind=new.kind,
        modality=rows.modality,
        generation=generation,
        vectors=snapshot.vectors_name,
        rows=rows.stop,
        count=rows.count,
        size=size,
        xxh3=str(state.hexdigest()),
        ends=ends_digest(path),
        facts=dict(new.facts),
    )


def _file_of(modality: Modality, generation: int) -> str:
    """Where a derived file lies, relative to the index directory."""
    return f"{DERIVED_FOLDER}/{modality.value}-{generation}.faiss"

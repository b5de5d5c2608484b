"""The format: the golden index, newer and older versions, what the specification names."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from store_kit import CountingDisk, DyingDisk, in_child, make_index, state_of

from mmsearch.errors import IndexMismatchError, MmsearchError
from mmsearch.index.derived import neighbours
from mmsearch.store import IndexStore, ItemState
from mmsearch.store.manifest import checksum
from mmsearch.store.migrations import format_of, migrate
from mmsearch.store.sqlite import SCHEMA, writer_connection
from mmsearch.types import Modality

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_golden

SPECIFICATION = make_golden.TINY.parent / "README.md"


@pytest.fixture
def golden(quick_path):
    return str(shutil.copytree(make_golden.TINY, quick_path / "tiny"))


def golden_rows(folder: str) -> dict[str, list[float]]:
    with IndexStore.open(folder) as store, store.snapshot() as snapshot:
        return {k.name: snapshot.vectors(snapshot.rows_of(k.id, Modality.IMAGE))[0].tolist() for k in snapshot.items()}


def test_the_golden_index_opens_and_answers(golden):
    """Format 1, as it was first written: items, rows, captions, skipped files, searches both ways."""
    with IndexStore.open(golden) as store, store.snapshot() as snapshot:
        assert store.verify() == []
        assert (store.info()["format"], store.dim, store.settings) == (1, 8, {"model": "golden"})
        names = [known.name for known in snapshot.items()]
        assert names == ["blue.png", "green.png", "grün.png", "red.png", "violet.png"]
        (broken,) = snapshot.items(state=ItemState.SKIPPED)
        assert (broken.name, broken.reason, broken.detail) == ("broken.png", "truncated", "3 bytes")
        for small in (0, 10**9):
            for modality, offset in ((Modality.IMAGE, 0), (Modality.TEXT, 100)):
                index = neighbours(snapshot, modality, small=small)
                assert index.kind == ("faiss-flat" if small == 0 else "exact")
                _, rows = index.search(make_golden.row(offset + 2)[None], 1)
                (found,) = snapshot.locate(rows[0])
                assert found.item.path == "/golden/blue.png"
                assert found.item.metadata == {"number": 2}
                assert found.caption == (None if offset == 0 else "a blue square")
    for name, row in golden_rows(golden).items():
        number = make_golden.COLOURS.index(name[:-4])
        np.testing.assert_allclose(row, make_golden.row(number), atol=1e-3)


def test_the_golden_index_can_be_brought_up_to_date(golden):
    """Its indexes of that time are enough to find moves and copies by content."""
    with IndexStore.open(golden, write=True) as store:
        red = store.find_copy(store.find("/golden", "red.png").content_hash)
        store.begin_scan()
        assert [known.name for known in store.find_moved(red.content_hash)] == ["red.png"]
        store.note_settings({"model": "golden", "new": True})
        store.finish()
        assert store.verify() == []


def test_the_golden_index_is_what_its_script_makes(golden, quick_path):
    """So that the next format's can be made the same way."""
    make_golden.make(quick_path / "fresh")
    assert golden_rows(str(quick_path / "fresh")) == golden_rows(golden)
    fresh = (quick_path / "fresh" / "vectors.f16").read_bytes()
    assert fresh == Path(golden, "vectors.f16").read_bytes()


def test_the_golden_index_is_small():
    """It lies in the repository."""
    assert sum(p.stat().st_size for p in make_golden.TINY.rglob("*") if p.is_file()) < 80_000


def test_the_specification_names_every_field():
    """Of the manifest and of the database."""
    text = SPECIFICATION.read_text()
    manifest = json.loads((make_golden.TINY / "manifest.json").read_text())
    fields = {*manifest, *manifest["derived"]["image"], *manifest["items"], *manifest["counts"], *manifest["model"]}
    db = sqlite3.connect(":memory:")
    for statement in SCHEMA.split(";"):
        db.execute(statement)
    for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        fields |= {column[1] for column in db.execute(f"PRAGMA table_info({table})")} - {"seq"}
    missing = sorted(field for field in fields if f"`{field}`" not in text)
    assert missing == []


def test_a_newer_format_is_refused_by_name(golden):
    """By the manifest, or by the database when the manifest is gone."""
    target = Path(golden, "manifest.json")
    fields = json.loads(target.read_text())
    fields |= {"format": 2, "made_by": "mmsearch 9.9", "unheard_of": {}}
    target.write_text(json.dumps(fields))
    for write in (False, True):
        with pytest.raises(IndexMismatchError, match=r"made by mmsearch 9\.9; you have mmsearch"):
            IndexStore.open(golden, write=write)
    target.unlink()
    db = sqlite3.connect(Path(golden, "items.sqlite"))
    db.execute("PRAGMA user_version = 2")
    db.execute("UPDATE meta SET value = 'mmsearch 9.9' WHERE key = 'made_by'")
    db.commit()
    db.close()
    for write in (False, True):
        with pytest.raises(IndexMismatchError, match=r"made by mmsearch 9\.9; you have mmsearch"):
            IndexStore.open(golden, write=write)


def test_a_format_that_cannot_be_brought_up_to_date_is_refused(golden):
    """No step leads from it."""
    db = sqlite3.connect(Path(golden, "items.sqlite"))
    db.execute("PRAGMA user_version = 0")
    db.commit()
    db.close()
    Path(golden, "manifest.json").unlink()
    with pytest.raises(IndexMismatchError, match="format 0"):
        IndexStore.open(golden)


STEPS = {
    1: lambda db: db.execute("ALTER TABLE items ADD COLUMN stars INTEGER"),
    2: lambda db: db.execute("UPDATE items SET stars = 3"),
}


def test_an_older_format_is_migrated_in_one_step_or_not_at_all(quick_path):
    """Two steps to an imagined format 3, killed at every operation."""
    start = make_index(quick_path / "start")

    def work(path, disk):
        connection = writer_connection(f"{path}/items.sqlite")
        done = migrate(connection, f"{path}/items.sqlite", disk, to=3, steps=STEPS)
        connection.close()
        return done

    disk = CountingDisk()
    whole = str(shutil.copytree(start, quick_path / "whole"))
    assert work(whole, disk)
    assert not work(whole, disk)
    for at in range(1, len(disk.log) + 1):
        path = str(shutil.copytree(start, quick_path / f"run{at}"))
        in_child(lambda tell, path=path, at=at: work(path, DyingDisk(at)))
        db = sqlite3.connect(f"{path}/items.sqlite")
        columns = {column[1] for column in db.execute("PRAGMA table_info(items)")}
        assert (format_of(db) == 3) == ("stars" in columns)
        if format_of(db) == 3:
            assert {stars for (stars,) in db.execute("SELECT stars FROM items")} == {3}
        db.close()


def test_a_step_that_fails_leaves_the_old_format(quick_path):
    """Whatever the step did before."""
    path = make_index(quick_path / "index")
    before = state_of(path)

    def fail(db):
        db.execute("DELETE FROM items")
        raise ValueError("no")

    connection = writer_connection(f"{path}/items.sqlite")
    with pytest.raises(ValueError, match="no"):
        migrate(connection, f"{path}/items.sqlite", CountingDisk(), to=2, steps={1: fail})
    connection.close()
    assert state_of(path) == before


@pytest.mark.parametrize("name", [b"a b#c?d%41&e=f;g'h", b"\xff\xfe", "名前\n".encode()])
def test_an_index_may_be_in_a_folder_of_any_name(quick_path, name):
    """The name goes into SQLite's address, FAISS's file name and every message."""
    path = str(shutil.copytree(make_golden.TINY, os.path.join(quick_path, os.fsdecode(name))))
    with IndexStore.open(path, write=True) as store:
        store.finish()
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        assert store.verify() == []
        index = neighbours(snapshot, Modality.IMAGE, small=0)
        assert index.search(make_golden.row(2)[None], 1)[1].tolist() == [[2]]
    Path(path, "manifest.json").write_text("{}")
    with pytest.raises(MmsearchError) as caught:
        IndexStore.open(path)
    assert str(caught.value).isprintable()


def test_the_manifest_checks_itself(golden):
    """By the rule of the specification."""
    fields = json.loads(Path(golden, "manifest.json").read_text())
    assert fields["check"] == checksum(fields)
    fields["rows"] += 1
    assert fields["check"] != checksum(fields)

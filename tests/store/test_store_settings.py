"""Settings and model of an index: replaced in one step, and known although other files are damaged."""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from store_kit import (
    MODEL,
    PREPROCESSING,
    CountingDisk,
    DyingDisk,
    FailingDisk,
    create,
    in_child,
    make_index,
    state_of,
    upsert,
)

from mmsearch.errors import IndexDamagedError, IndexMismatchError, IndexNotFoundError, ResourceError, UsageError
from mmsearch.store import Batch, IndexStore

SETTINGS = {"model": "bundled", "limits": {"pixels": 10, "seconds": 1.5}}


@pytest.fixture
def path(quick_path):
    path = str(quick_path / "index")
    with create(path, settings=SETTINGS) as store:
        store.commit(Batch(upserts=[upsert(f"p{i}", i, captions=["c"]) for i in range(40)]))
        store.finish()
    return path


def flip_byte(file: str, at: float) -> None:
    data = bytearray(Path(file).read_bytes())
    data[int(at * len(data))] ^= 0x10
    Path(file).write_bytes(data)


def test_settings_are_replaced_as_a_whole(path):
    """In the store, for readers, in the manifest; one generation each time they differ, none when they do not."""
    new = {"model": "other", "n": [1, "ü"]}
    with IndexStore.open(path, write=True) as store:
        generation = store.generation
        store.note_settings(dict(reversed(SETTINGS.items())))
        assert store.generation == generation
        store.note_settings(new)
        assert (store.generation, store.settings) == (generation + 1, new)
        assert IndexStore.stored_settings(path) == new
        store.finish()
        assert store.verify() == []
    with IndexStore.open(path) as store:
        assert store.settings == store.info()["settings"] == new
        with pytest.raises(UsageError, match="write=True"):
            store.note_settings(new)
    assert len(state_of(path)) == 40


def test_settings_are_the_old_or_the_new_ones_whenever_the_process_dies(path, quick_path):
    """At every operation on the disk; nothing else changes."""
    before, disk = state_of(path), CountingDisk()

    def work(where, disk):
        with IndexStore.open(where, write=True, disk=disk) as store:
            store.note_settings({"n": 1})
            store.finish()

    work(str(shutil.copytree(path, quick_path / "whole")), disk)
    found = []
    for at in range(1, len(disk.log) + 1):
        run = str(shutil.copytree(path, quick_path / f"run{at}"))
        in_child(lambda tell, run=run, at=at: work(run, DyingDisk(at)))
        found.append(IndexStore.stored_settings(run))
        assert state_of(run) == before
    assert found[0] == SETTINGS
    assert found[-1] == {"n": 1}
    assert all(one in (SETTINGS, {"n": 1}) for one in found)


def test_settings_that_cannot_be_written_are_not_taken_for_stored(path):
    """The store says what the index has."""
    with IndexStore.open(path, write=True, disk=FailingDisk(1)) as store:
        with pytest.raises(ResourceError):
            store.note_settings({"n": 1})
        assert store.settings == IndexStore.stored_settings(path) == SETTINGS


BROKEN = {
    "rows flipped": lambda path: flip_byte(f"{path}/vectors.f16", 0.5),
    "rows missing": lambda path: os.unlink(f"{path}/vectors.f16"),
    "manifest empty": lambda path: Path(path, "manifest.json").write_bytes(b""),
    "manifest of other JSON": lambda path: Path(path, "manifest.json").write_bytes(b"[]"),
    "manifest flipped": lambda path: flip_byte(f"{path}/manifest.json", 0.7),
    "manifest missing": lambda path: os.unlink(f"{path}/manifest.json"),
    "both": lambda path: (flip_byte(f"{path}/vectors.f16", 0.1), Path(path, "manifest.json").write_text("{")),
}


@pytest.mark.parametrize("way", BROKEN)
def test_the_settings_are_known_whatever_became_of_rows_and_manifest(path, way):
    """And the index can then be repaired with them: only items with damaged rows are to be encoded again."""
    before = state_of(path)
    BROKEN[way](path)
    assert IndexStore.stored_settings(path) == SETTINGS
    with IndexStore.open(path, write=True, repair=True, model=MODEL) as store:
        assert store.settings == SETTINGS
        assert bool(store.repaired) == ("rows" in way or way == "both")
        store.finish()
        assert store.verify() == []
        lost = sorted(before.keys() - state_of(path).keys())
        assert store.repaired == len(lost)
        store.commit(Batch(upserts=[upsert(name, int(name[1:]), captions=["c"]) for name in lost]))
        store.finish()
    assert state_of(path) == before


def test_the_settings_can_be_read_while_somebody_writes(path):
    """Nothing is locked, nothing left behind."""
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(upserts=[upsert("a", 1)]))
        assert IndexStore.stored_settings(path) == SETTINGS
    names = sorted(os.listdir(path))
    assert IndexStore.stored_settings(path) == SETTINGS
    assert sorted(os.listdir(path)) == names


def test_settings_of_no_index_and_of_a_damaged_database_are_told_apart(path, quick_path):
    """Missing, cut, not JSON, a newer program's, another program's; nothing is made."""
    for empty in (quick_path / "nothing", quick_path):
        with pytest.raises(IndexNotFoundError, match="mmsearch index"):
            IndexStore.stored_settings(str(empty))
    assert os.listdir(quick_path) == ["index"]
    items = Path(path, "items.sqlite")
    good = items.read_bytes()
    text = b'{"limits":{"pixels"'
    assert good.count(text) == 1
    for bad in (
        b"x" * 5000,
        good[:4096],
        good.replace(text, b"\xff" * len(text)),
        good.replace(text, b"[" * len(text)),
    ):
        items.write_bytes(bad)
        with pytest.raises(IndexDamagedError, match=r"items\.sqlite"):
            IndexStore.stored_settings(path)
    items.write_bytes(good)
    for pragma, error in (("user_version", IndexMismatchError), ("application_id", IndexDamagedError)):
        db = sqlite3.connect(items)
        db.execute(f"PRAGMA {pragma} = 99")
        db.close()
        with pytest.raises(error, match=r"items\.sqlite"):
            IndexStore.stored_settings(path)
    items.unlink()
    with pytest.raises(IndexDamagedError, match=r"items\.sqlite"):
        IndexStore.stored_settings(path)


def test_a_snapshot_names_the_model_of_its_own_generation(quick_path):
    """A reader that was there before the index went to another model sees the old one with the old rows."""
    path, other = make_index(quick_path / "index"), replace(MODEL, name="other", weights="w2")
    with IndexStore.open(path) as reader, reader.snapshot() as old:
        IndexStore.replace(path, model=other, preprocessing=PREPROCESSING).close()
        with reader.snapshot() as new:
            assert (old.model, new.model) == (MODEL, other)
            assert not old.model.same_space(new.model)
            assert (reader.model, old.row_count, new.row_count) == (MODEL, 8, 0)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"name":"n","weights":"w","preprocessing":"p","dim":8,"x":1}'])
def test_a_model_that_cannot_be_read_is_damage(quick_path, text):
    """Beyond the size that is checked on opening, or in a log."""
    path = make_index(quick_path / "index")
    with IndexStore.open(path, write=True) as store:
        with store._writing().transaction() as db:
            db.execute("UPDATE meta SET value = ? WHERE key = 'model'", (text,))
        with store.snapshot() as snapshot, pytest.raises(IndexDamagedError, match=r"items\.sqlite"):
            _ = snapshot.model

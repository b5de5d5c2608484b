"""Every file damaged in every way: found on opening or by verify, named with its repair, never answered from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from store_kit import PlainDerived, create, make_index, state_of, upsert

from mmsearch.errors import IndexDamagedError, MmsearchError
from mmsearch.store import Batch, Derived, IndexStore
from mmsearch.store.check import verify
from mmsearch.store.checksums import ends_digest, file_digest, is_intact
from mmsearch.types import Modality

FILES = ["manifest.json", "items.sqlite", "vectors.f16", "faiss/image-1.faiss", "faiss/text-1.faiss"]
DERIVED = FILES[3:]


@pytest.fixture(scope="module")
def intact(quick_base):
    return make_index(quick_base / "intact", 40, captions=2)


def damaged(intact: str, folder: Path, file: str, change) -> str:
    path = str(shutil.copytree(intact, folder / "run"))
    target = Path(path, file)
    data = bytearray(target.read_bytes())
    target.write_bytes(change(data))
    return path


def flip(at: float, bit: int = 0):
    def change(data: bytearray) -> bytearray:
        position = min(int(at * len(data)), len(data) - 1)
        data[position] ^= 1 << bit
        return data

    return change


def zero_page(at: float):
    def change(data: bytearray) -> bytearray:
        start = min(int(at * len(data)), len(data) - 1) // 4096 * 4096
        length = len(data[start : start + 4096])
        data[start : start + 4096] = bytes(length)
        return data

    return change


def cut(share: float):
    return lambda data: data[: int(share * len(data))]


WAYS = {
    **{f"flip {i}": flip(i / 13, i % 8) for i in range(14)},
    **{f"zero page {at}": zero_page(at) for at in (0.0, 0.3, 0.5, 0.7, 0.99)},
    **{f"cut to {share}": cut(share) for share in (0.0, 0.5, 0.99)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_named(intact, quick_path, file, way):
    """On opening for what is small enough to read then, in verify always; a derived file is never an error."""
    path = damaged(intact, quick_path, file, WAYS[way])
    problems = verify(path)
    assert file in {problem.file for problem in problems}
    assert all(problem.what and problem.repair for problem in problems)
    if file in DERIVED:
        with IndexStore.open(path) as store, store.snapshot() as snapshot:
            modality = Modality.IMAGE if "image" in file else Modality.TEXT
            assert snapshot.intact(snapshot.derived(modality)) is None
        assert state_of(path) == state_of(intact)
    else:
        with pytest.raises(IndexDamagedError, match=file) as caught:
            IndexStore.open(path)
        assert caught.value.exit_code == 4
        assert caught.value.do


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found_and_named(intact, quick_path, file):
    """The manifest is only missed by verify: items.sqlite has all that is in it."""
    path = str(shutil.copytree(intact, quick_path / "run"))
    Path(path, file).unlink()
    assert file in {problem.file for problem in verify(path)}
    if file in ("items.sqlite", "vectors.f16"):
        with pytest.raises(IndexDamagedError, match=file):
            IndexStore.open(path)
    else:
        assert state_of(path) == state_of(intact)


@pytest.mark.parametrize("file", ["manifest.json", *DERIVED])
def test_a_writer_puts_right_what_can_be_written_anew(intact, quick_path, file):
    """Manifest and derived files; the answers were never in doubt."""
    path = damaged(intact, quick_path, file, flip(0.5))
    with IndexStore.open(path, write=True) as store:
        store.update_derived(PlainDerived())
        store.finish()
        assert store.verify() == []
    assert state_of(path) == state_of(intact)


@pytest.mark.parametrize("way", ["flip 3", "zero page 0.0", "cut to 0.5", "cut to 0.0", "missing"])
def test_repair_drops_only_items_with_damaged_rows(quick_path, way):
    """A scan then finds them new; the others keep their rows."""
    with create(quick_path / "index") as store:
        for i in range(40):
            store.commit(Batch(upserts=[upsert(f"p{i:02}", i)]))
        store.finish()
    path, before = str(quick_path / "index"), state_of(str(quick_path / "index"))
    rows = Path(path, "vectors.f16")
    if way == "missing":
        rows.unlink()
    else:
        rows.write_bytes(WAYS[way](bytearray(rows.read_bytes())))
    if way.startswith(("cut", "missing")):
        with pytest.raises(IndexDamagedError, match=r"vectors\.f16.*--force"):
            IndexStore.open(path, write=True)
    with IndexStore.open(path, write=True, repair=True) as store:
        store.finish()
        assert store.verify() == []
        after = state_of(path)
        lost = sorted(set(before) - set(after))
        assert store.repaired == len(lost) > 0
        assert {"flip 3": 1, "cut to 0.5": 20}.get(way, 40) == len(lost)
        store.commit(Batch(upserts=[upsert(name, int(name[1:])) for name in lost]))
        store.finish()
    assert state_of(path) == before


def test_damaged_rows_are_not_copied_into_new_files(quick_path):
    """Neither compaction nor a derived file takes over what a checksum rejects."""
    path = make_index(quick_path / "index", 40)
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(removals=[1], upserts=[upsert(f"n{i}", i) for i in range(40)]))
        with open(os.path.join(path, "vectors.f16"), "r+b") as file:
            file.seek(300)
            file.write(b"\xff")
        for work in (lambda: store.compact(share=0.0, at_least=1), lambda: store.update_derived(PlainDerived())):
            with pytest.raises(IndexDamagedError, match=r"vectors\.f16"):
                work()


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_derived_file_is_checked_from_end_to_end(quick_path, at):
    """Not only where the quick look at a huge file goes."""
    path = quick_path / "file"
    data = bytearray(range(256)) * 2000
    path.write_bytes(data)
    size, whole = file_digest(str(path))
    derived = Derived("faiss/x", "plain", Modality.IMAGE, 1, "vectors.f16", 1, 1, size, whole, ends_digest(str(path)))
    assert is_intact(str(path), derived, thorough=False)
    path.write_bytes(flip(at)(data))
    assert not is_intact(str(path), derived, thorough=False)


def test_a_writer_does_not_bless_damage_of_the_database(intact, quick_path):
    """One flipped bit in a caption: SQLite does not notice, and a new checksum must not cover it."""
    path = str(shutil.copytree(intact, quick_path / "run"))
    target = Path(path, "items.sqlite")
    data = bytearray(target.read_bytes())
    data[data.index(b"caption 7.1")] ^= 1
    target.write_bytes(data)
    with pytest.raises(IndexDamagedError, match=r"items\.sqlite"):
        IndexStore.open(path, write=True)


def test_files_of_different_generations_are_refused(quick_path):
    """items.sqlite restored from a backup, the rest not."""
    path = make_index(quick_path / "index")
    old = Path(path, "items.sqlite").read_bytes()
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(upserts=[upsert("a", 1)]))
        store.finish()
    Path(path, "items.sqlite").write_bytes(old)
    rows = Path(path, "vectors.f16").read_bytes()
    for write in (False, True):
        with pytest.raises(IndexDamagedError, match="generation"):
            IndexStore.open(path, write=write, repair=write)
    assert Path(path, "vectors.f16").read_bytes() == rows, "rows that the newer database names were cut off"
    assert any("generation" in problem.what for problem in verify(path))


def test_another_programs_database_is_not_taken_for_ours(quick_path):
    """And not changed."""
    import sqlite3

    (quick_path / "index").mkdir()
    db = sqlite3.connect(quick_path / "index" / "items.sqlite")
    db.execute("CREATE TABLE t (x)")
    db.commit()
    db.close()
    for write in (False, True):
        with pytest.raises(IndexDamagedError, match="mmsearch"):
            IndexStore.open(str(quick_path / "index"), write=write)


def test_a_damaged_page_met_while_reading_is_an_error_of_ours(quick_path):
    """Beyond the size that is checked on opening: a lagging manifest has no checksum to compare."""
    path = make_index(quick_path / "index", 500)
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(upserts=[upsert("a", 1)]))
    target = Path(path, "items.sqlite")
    size = target.stat().st_size
    found = 0
    for page in range(1, size // 4096):
        copy = str(shutil.copytree(path, quick_path / "copy"))
        with open(Path(copy, "items.sqlite"), "r+b") as file:
            file.seek(page * 4096)
            file.write(bytes(4096))
        try:
            state_of(copy)
        except IndexDamagedError:
            found += 1
        except MmsearchError as error:
            pytest.fail(f"page {page}: {error!r}")
        shutil.rmtree(copy)
    assert found > size // 4096 // 2


def test_every_byte_of_the_manifest_matters(intact, quick_path):
    """Any flipped bit of any byte is noticed (white space between fields aside)."""
    path = str(shutil.copytree(intact, quick_path / "run"))
    target = Path(path, "manifest.json")
    good = target.read_bytes()
    for position in range(0, len(good), 3):
        if good[position : position + 1] in b" \n":
            continue
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 7)
        target.write_bytes(bad)
        with pytest.raises(MmsearchError, match=r"manifest\.json"):
            IndexStore.open(path)


def test_a_manifest_cannot_point_outside_its_folder(intact, quick_path):
    """Even with a right checksum."""
    import json

    from mmsearch.store.manifest import checksum

    path = str(shutil.copytree(intact, quick_path / "run"))
    target = Path(path, "manifest.json")
    for file in ("../x.faiss", "faiss/../../x", "/etc/passwd", "faiss/"):
        fields = json.loads(target.read_text())
        fields["derived"]["image"]["file"] = file
        fields["check"] = checksum(fields)
        target.write_text(json.dumps(fields))
        with pytest.raises(IndexDamagedError, match=r"manifest\.json"):
            IndexStore.open(path)


@pytest.mark.parametrize("text", [b"[]", b"null", b"[" * 100_000, b"\xff", b" " * (2 << 20), b'{"format": "x"}'])
def test_a_manifest_that_is_none_is_refused_quickly(intact, quick_path, text):
    """Deep nesting, megabytes, other JSON."""
    path = damaged(intact, quick_path, "manifest.json", lambda _: text)
    with pytest.raises(IndexDamagedError, match=r"manifest\.json"):
        IndexStore.open(path)

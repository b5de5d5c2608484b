"""Merging and splitting: every vector as it is, every item once, whenever it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import IndexDamagedError, IndexLockedError, IndexMismatchError, StoreError, UsageError
from mmsearch.reshard import CopyReport, merge, shard_of, split
from mmsearch.searcher import Searcher
from mmsearch.similarity import normalise
from mmsearch.store import Batch, IndexStore, Skip, Upsert
from mmsearch.store.base import ItemState
from mmsearch.store.disk import Disk
from mmsearch.store.lock import WriterLock
from mmsearch.testing import ColorEncoder
from mmsearch.types import Modality, Skipped, SkipReason, Source, Stamp

DIM = 8
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
LONG_AGO = 1_500_000_000_000_000_000


def unit(seed: int) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((1, DIM)))[0]


def item(name: str, seed: int = 0, *, captions: int = 1, at: int = 0, root: str = "table", **options) -> Upsert:
    """A picture and its captions; `at`: nanoseconds after the first of all files was modified."""
    texts = tuple(f"{name} {place}" for place in range(captions))
    stamp = Stamp(100 + seed, LONG_AGO + at, LONG_AGO + at)
    return Upsert(
        Source(root, name, f"/nowhere/{name}", stamp, texts, {"seed": seed, "é": [1.5, None]}),
        content_hash=seed.to_bytes(16, "little"),
        width=4, height=3, taken_at="2020-01-02T03:04:05", note="first of 2 frames",
        image_vector=unit(seed),
        text_vectors=np.stack([unit(1000 + seed + place) for place in range(captions)]) if captions else None,
        **options,
    )  # fmt: skip


def row(name: str, seed: int, **options) -> Upsert:
    """A table row without a file, so that searches show it."""
    return Upsert(Source("table", name, None, None, (f"{name} words",)), image_vector=unit(seed),
                  text_vectors=unit(500 + seed)[None], **options)  # fmt: skip


def skip(name: str, at: int = 0) -> Skip:
    source = Source("table", name, f"/nowhere/{name}", Stamp(5, LONG_AGO + at, LONG_AGO + at))
    return Skip(source, Skipped(name, SkipReason.TRUNCATED, "half of it"))


def index(path: Path, *batches: Sequence[Upsert | Skip], model: ColorEncoder | None = None, **options) -> Path:
    encoder = model or ColorEncoder()
    made = IndexStore.create(str(path), model=encoder.identity, preprocessing=encoder.preprocessing, settings=options)
    with made as store:
        for batch in batches:
            store.commit(
                Batch(
                    upserts=[one for one in batch if isinstance(one, Upsert)],
                    skips=[one for one in batch if isinstance(one, Skip)],
                )
            )
        store.finish()
    return path


def remove(path: Path, *names: str) -> Path:
    with IndexStore.open(str(path), write=True) as store:
        with store.snapshot() as snapshot:
            numbers = [known.item for known in snapshot.items(state=None) if known.name in names]
        store.commit(Batch(removals=numbers))
        store.finish()
    return path


def contents(*paths: Path) -> dict[tuple, tuple]:
    """Everything an index says of its items, but for numbers of items and rows; vectors as bytes."""
    found: dict[tuple, tuple] = {}
    for path in paths:
        with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
            names = [name for _, name, *_ in snapshot.execute("PRAGMA table_info(items)")]
            kept = [name for name in names if name not in ("item", "image")]
            for number, *line in snapshot.execute(f"SELECT item, {', '.join(kept)} FROM items"):
                of = "SELECT part, row FROM rows WHERE item = ? ORDER BY part"
                rows = snapshot.execute(of, (number,))
                vectors = [(part, snapshot.block(at, at + 1).tobytes()) for part, at in rows]
                key = tuple(line[kept.index(name)] for name in ("root", "name"))
                assert key not in found, "an item is there twice"
                found[key] = (*line, vectors)
    return found


def verified(*paths: Path) -> None:
    for path in paths:
        with IndexStore.open(str(path)) as store:
            assert store.verify() == []


def merged(paths: Sequence[Path], out: Path, **options) -> CopyReport:
    return merge(paths, out, batch_items=2, **options)


def parted(path: Path, out: Path, **options) -> CopyReport:
    return split(path, out, batch_items=2, **options)


@contextmanager
def folder() -> Iterator[Path]:
    made = tempfile.mkdtemp(prefix="mmsearch-test-", dir=MEMORY)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made)


ITEMS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), max_size=20)


@settings(max_examples=15, deadline=None)
@given(ITEMS, st.one_of(st.tuples(st.just("shards"), st.integers(1, 5)), st.tuples(st.just("rows"), st.integers(1, 9))))
def test_split_and_merge_keep_every_byte_and_every_answer(drawn, rule):
    """Pictures, captions, skips, stamps and all: an index, its parts, and what they merge to say the same."""
    name, number = rule
    things = [item(f"n{i}", seed, captions=captions) for i, (seed, captions, _) in enumerate(drawn)]
    gone = [f"n{i}" for i, (_, _, is_gone) in enumerate(drawn) if is_gone]
    with folder() as at:
        whole = remove(index(at / "whole", things[::2], [*things[1::2], skip("broken")]), *gone)
        report = parted(whole, at / "parts", **{name: number})
        again = merged(report.indexes, at / "again")
        verified(*report.indexes, at / "again")
        assert contents(*report.indexes) == contents(at / "again") == contents(whole)
        for one in (report, again):
            assert (one.items, one.skipped, one.superseded) == (len(things) - len(gone), 1, 0)


def test_shards_of_so_many_rows_are_filled_one_after_another(tmp_path):
    """No row more than asked for, and as many items as fit, in order; an item with more has a shard of its own."""
    rows = [2, 2, 1, 2, 7, 2, 1, 2]
    source = index(tmp_path / "a", [item(f"n{i}", i, captions=count - 1) for i, count in enumerate(rows)])
    made = parted(source, tmp_path / "out", rows=5)
    assert [len(rows_of(path)) for path in made.indexes] == [5, 2, 7, 5]
    assert [sorted(name for _, name in contents(path)) for path in made.indexes] == [
        [b"n0", b"n1", b"n2"], [b"n3"], [b"n4"], [b"n5", b"n6", b"n7"],
    ]  # fmt: skip


def rows_of(path: Path) -> list[int]:
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        assert snapshot.row_count == sum(snapshot.count(modality) for modality in Modality), "dead rows were copied"
        return list(range(snapshot.row_count))


def test_merged_and_split_indexes_answer_as_their_inputs_do(tmp_path):
    """Derived files and all: the hits of shards, of their merger, and of the folder that split made are the same."""
    paths = [
        index(tmp_path / f"s{shard}", [row(f"r{shard}-{i}", 40 * shard + i) for i in range(40)]) for shard in range(3)
    ]
    merge(paths, tmp_path / "one")
    made = split(tmp_path / "one", tmp_path / "four", shards=4)
    assert len(made.indexes) == 4 and sum(len(rows_of(path)) for path in made.indexes) == 240
    with (
        Searcher.open(paths) as shards,
        Searcher.open(tmp_path / "one") as one,
        Searcher.open(tmp_path / "four") as four,
    ):
        for to in ("image", "text", "any"):
            for seed in range(5):
                answers = [s.search_vector(unit(900 + seed), k=30, to=to) for s in (shards, one, four)]
                assert len({tuple(hit.item.id for hit in hits) for hits in answers}) == 1
                for hits in answers[1:]:
                    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in answers[0]], abs=1e-6)


def test_an_index_goes_on_incrementally_after_a_merge(tmp_path):
    """Nothing is encoded again: every file is the one that was seen, in the part it came from or in the whole."""
    from PIL import Image

    from mmsearch.builder import build

    for name in ("a", "b"):
        for shade in (0, 100, 200):
            path = tmp_path / name / f"{shade}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (shade, 255 if name == "a" else 0, 0)).save(path)
        build([tmp_path / name], tmp_path / f"index-{name}", encoder=ColorEncoder(), workers=1)
    merge([tmp_path / "index-a", tmp_path / "index-b"], tmp_path / "all")
    report = build([tmp_path / "a", tmp_path / "b"], tmp_path / "all", encoder=ColorEncoder(), workers=1)
    assert (report.unchanged, report.added, report.encoded_images) == (6, 0, 0)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a" / "new.png")
    report = build([tmp_path / "a", tmp_path / "b"], tmp_path / "all", encoder=ColorEncoder(), workers=1)
    assert (report.unchanged, report.added, report.removed) == (6, 1, 0)


def test_of_items_of_one_name_the_newer_is_kept_and_the_other_is_counted(tmp_path):
    """Whichever input it is in; all that it has comes from one place."""
    old, new = item("same", 1, captions=2), item("same", 2, captions=1, at=5)
    first = index(tmp_path / "first", [old, item("mine", 3)])
    second = index(tmp_path / "second", [new, item("theirs", 4)])
    for order in ([first, second], [second, first]):
        out = tmp_path / order[0].name / "merged"
        report = merged(order, out)
        assert (report.items, report.superseded) == (3, 1)
        both = contents(first) | contents(second)
        assert contents(out) == {**both, (b"table", b"same"): contents(second)[b"table", b"same"]}
        verified(out)


def test_of_many_indexes_with_the_same_items_the_newest_counts(tmp_path):
    """In whatever order they are named."""
    paths = [index(tmp_path / f"s{i}", [item(f"n{j}", i, at=i) for j in range(3)]) for i in range(9)]
    for number, order in enumerate((paths, paths[::-1], paths[4:] + paths[:4])):
        report = merged(order, tmp_path / f"out{number}")
        assert (report.items, report.superseded) == (3, 24)
        assert contents(tmp_path / f"out{number}") == contents(paths[-1])


def test_of_items_of_one_id_the_newer_is_kept_whatever_it_is_called(tmp_path):
    """A photo that was renamed between two indexes is there once, where it is now."""
    first = index(tmp_path / "a", [item("old name", 1, id="photo"), item("x", 2)])
    second = index(tmp_path / "b", [item("new name", 1, id="photo", at=1)])
    report = merged([first, second], tmp_path / "out")
    assert (report.items, report.superseded) == (2, 1)
    assert {name for _, name in contents(tmp_path / "out")} == {b"x", b"new name"}


def test_of_equal_stamps_what_could_be_read_wins_and_then_what_was_named_first(tmp_path):
    """Copies of one index merge into one of them; a skip in one place does not hide the picture of another."""
    first = index(tmp_path / "a", [skip("s"), item("t", 1)])
    second = index(tmp_path / "b", [item("s", 0, captions=0), item("t", 2)])
    with IndexStore.open(str(second), write=True) as store:
        writer = store._writing()
        with writer.transaction() as db:  # the same moment of reading in both
            db.execute("UPDATE items SET read_ns = 7, size = 5")
    with IndexStore.open(str(first), write=True) as store, store._writing().transaction() as db:
        db.execute("UPDATE items SET read_ns = 7")
    merged([first, second], tmp_path / "out")
    out, one, two = contents(tmp_path / "out"), contents(first), contents(second)
    assert out == {(b"table", b"s"): two[b"table", b"s"], (b"table", b"t"): one[b"table", b"t"]}
    shutil.copytree(first, tmp_path / "copy")
    report = merged([first, tmp_path / "copy"], tmp_path / "twice")
    assert contents(tmp_path / "twice") == one and report.superseded == 2


def test_an_item_gives_way_only_to_one_that_is_kept(tmp_path):
    """b beats a by id, c beats b by name: a is not lost to b, which is not there."""
    a = index(tmp_path / "a", [item("one", 1, id="i")])
    b = index(tmp_path / "b", [item("two", 2, id="i", at=1)])
    c = index(tmp_path / "c", [item("two", 3, id="j", at=2)])
    merged([a, b, c], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(a) | contents(c)


class Killed(BaseException):
    """Stands for the end of the process."""


class Fuse(Disk):
    """Ends the 'process' at an operation; counts them."""

    def __init__(self, at: int | None = None) -> None:
        self.done, self._at = 0, at

    def step(self, operation: str, path: str) -> None:
        self.done += 1
        if self.done == self._at:
            raise Killed


def jobs(at: Path) -> dict[str, object]:
    a = index(at / "a", [item(f"a{i}", i) for i in range(4)], [item("both", 9)])
    b = index(at / "b", [item("both", 8, at=3), *(item(f"b{i}", 20 + i) for i in range(3)), skip("s")])
    return {
        "merge": lambda out, **options: merged([a, b], out, **options),
        "shards": lambda out, **options: parted(b, out, shards=2, **options),
        "rows": lambda out, **options: parted(a, out, rows=6, **options),
    }


@pytest.mark.parametrize(("name", "step"), [("merge", 1), ("shards", 5), ("rows", 5)])
def test_killed_at_any_operation_the_same_command_goes_on(name, step):
    """After each there is nothing at the place or all of it; run again, it is what an undisturbed run makes."""
    with folder() as at:
        job = jobs(at)[name]
        calm = Fuse()
        expected = contents(*job(at / "calm", disk=calm).indexes)
        for number in range(1, calm.done + 1, step):  # the steps of the three are of one kind
            out = at / f"out{number}"
            with pytest.raises(Killed):
                job(out, disk=Fuse(number))
            if not out.exists():
                report = job(out)
                assert contents(*report.indexes) == expected
                verified(*report.indexes)
            assert (out / "manifest.json").exists() or (out / "shards.json").exists()
        assert number > 25


def test_what_was_copied_before_a_kill_is_not_copied_again(tmp_path):
    """Going on is going on, not beginning anew."""
    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(40)])
    calm = Fuse()
    merged([source], tmp_path / "calm", disk=calm)
    with pytest.raises(Killed):
        merged([source], tmp_path / "out", disk=Fuse(calm.done - 10))
    assert not (tmp_path / "out").exists()
    rest = Fuse()
    merged([source], tmp_path / "out", disk=rest)
    assert rest.done < calm.done / 2
    assert contents(tmp_path / "out") == contents(source)
    assert not list(tmp_path.glob(".*"))


def test_inputs_that_changed_meanwhile_are_copied_anew(tmp_path):
    """Half of an old state and half of a new one is never what comes out."""
    notes: list[str] = []

    class Told:
        def start(self, total, *, what="", unit=""): ...
        def advance(self, n, *, note=""): ...

        def note(self, text):
            notes.append(text)

    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(10)])
    with pytest.raises(Killed):
        merged([source], tmp_path / "out", disk=Fuse(30))
    remove(source, "a0", "a5")
    merged([source], tmp_path / "out", progress=Told())
    assert contents(tmp_path / "out") == contents(source)
    assert "anew" in notes[0]


def test_a_process_that_is_killed_for_good_leaves_nothing_half(tmp_path):
    """SIGKILL, not an exception: the hidden draft is no index to anybody, and the next run ends what it began."""
    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(300)])
    driver = (
        "import os, signal, sys\n"
        "from mmsearch import reshard\n"
        "from mmsearch.store.disk import Disk\n"
        "class Dying(Disk):\n"
        "    left = 60\n"
        "    def step(self, operation, path):\n"
        "        self.left -= 1\n"
        "        if not self.left:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "reshard.merge([sys.argv[1]], sys.argv[2], disk=Dying(), batch_items=8)\n"
    )
    ended = subprocess.run([sys.executable, "-c", driver, str(source), str(tmp_path / "out")], check=False)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    from mmsearch.searcher import find_index

    assert find_index(tmp_path) == source
    merged([source], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    verified(tmp_path / "out")


def test_damaged_rows_are_never_copied(tmp_path):
    """The error names the file; nothing appears at the place."""
    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(4)])
    raw = bytearray((source / "vectors.f16").read_bytes())
    os.truncate(source / "vectors.f16", len(raw))
    from mmsearch.store.copying import Origin

    with Origin(source) as origin:  # opened while it was whole, as a large one would be
        raw[5] ^= 1
        with open(source / "vectors.f16", "r+b") as file:
            file.write(raw)
        with pytest.raises(IndexDamagedError, match=r"vectors\.f16"):
            origin.take(np.arange(4))
    with pytest.raises(IndexDamagedError, match=r"vectors\.f16"):
        merged([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_something_is_nothing_is_made(tmp_path):
    """An index, a file or a full folder is never written over; an empty folder is as good as none."""
    source = index(tmp_path / "a", [item("x")])
    (tmp_path / "file").write_text("")
    for place in (source, tmp_path / "file"):
        with pytest.raises(StoreError, match="nothing there"):
            merged([source], place)
    (tmp_path / "empty").mkdir()
    merged([source], tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(source)


def test_two_runs_for_one_place_do_not_meet(tmp_path):
    """The second is told who is at it."""
    source = index(tmp_path / "a", [item("x")])
    (tmp_path / ".out.part").mkdir()
    lock = WriterLock(str(tmp_path / ".out.part"))
    lock.acquire()
    with pytest.raises(IndexLockedError, match=f"pid {os.getpid()}"):
        merged([source], tmp_path / "out")
    lock.release()
    merged([source], tmp_path / "out")


def test_indexes_of_two_models_or_kinds_of_vectors_are_not_merged(tmp_path):
    """One line that names both."""
    a = index(tmp_path / "a", [item("x")])
    b = index(tmp_path / "b", [item("y")], model=ColorEncoder(name="other"))
    with pytest.raises(IndexMismatchError, match=r"b, to be merged with .*a: .*colors.*other"):
        merged([a, b], tmp_path / "out")
    c = index(tmp_path / "c", [item("z")], item_vectors="fused")
    with pytest.raises(IndexMismatchError, match=r"separate item vectors.*got fused"):
        merged([a, c], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{}, {"shards": 2, "rows": 2}, {"shards": 0}, {"shards": 1001}, {"rows": 0}], ids=str)
def test_splits_that_mean_nothing_are_refused(wrong, tmp_path):
    """Before anything is opened."""
    with pytest.raises(UsageError):
        split(tmp_path / "nowhere", tmp_path / "out", **wrong)


def test_rows_that_would_make_too_many_shards_are_refused(tmp_path):
    """Each shard is a directory with files to open."""
    source = index(tmp_path / "a", [item(f"a{i}", i, captions=0) for i in range(1001)])
    with pytest.raises(UsageError, match="1000 shards at most"):
        parted(source, tmp_path / "out", rows=1)


def test_more_shards_than_are_written_side_by_side():
    """Several passes over the index; some shards stay empty, and all are whole."""
    with folder() as at:
        source = index(at / "a", [item(f"a{i}", i) for i in range(80)])
        report = parted(source, at / "out", shards=66)
        assert len(report.indexes) == 66 and report.items == 80
        assert contents(*report.indexes) == contents(source)


def test_an_item_is_in_the_shard_that_its_id_says(tmp_path):
    """Stable: of today's items and of those to come, whoever asks. Known values pin the hash."""
    assert [shard_of(name, 4) for name in ("a", "b", "c", "photo")] == [3, 3, 3, 0]
    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(30)])
    made = parted(source, tmp_path / "out", shards=3)
    for number, path in enumerate(made.indexes):
        with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
            assert {shard_of(known.id, 3) for known in snapshot.items(state=None)} == {number}
    said = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert said["shards"] == ["shard-00", "shard-01", "shard-02"]


def test_a_shard_that_is_lost_is_missed(tmp_path):
    """The list in the folder says what belongs to it, so that nobody searches half of it unknowingly."""
    source = index(tmp_path / "a", [row(f"a{i}", i) for i in range(12)])
    made = parted(source, tmp_path / "out", shards=3)
    shutil.rmtree(made.indexes[1])
    with pytest.raises(StoreError, match="shard-01"):
        Searcher.open(tmp_path / "out")
    with Searcher.open(tmp_path / "out", partial=True) as searcher:
        assert "1 of 3" in searcher.search_vector(unit(3)).notes[0]
    (tmp_path / "out" / "shards.json").write_text('{"shards": ["../elsewhere"]}')
    with pytest.raises(IndexDamagedError, match=r"shards\.json"):
        Searcher.open(tmp_path / "out")


def test_item_numbers_are_never_used_again(tmp_path):
    """Also after a merge: a new item's number is above all that there were."""
    a = remove(index(tmp_path / "a", [item(f"a{i}", i) for i in range(5)]), "a1")
    b = index(tmp_path / "b", [item(f"b{i}", 10 + i) for i in range(5)])
    merged([a, b], tmp_path / "out")
    with IndexStore.open(str(tmp_path / "out"), write=True) as store:
        store.commit(Batch(upserts=[item("new", 99)]))
        with store.snapshot() as snapshot:
            numbers = {known.name: known.item for known in snapshot.items(state=None)}
        assert numbers["new"] == 11 and numbers["b0"] == 6 and numbers["a4"] == 5
        assert store.find("table", "a1") is None
    with IndexStore.open(str(tmp_path / "out")) as store, store.snapshot() as snapshot:
        assert all(known.state is ItemState.OK for known in snapshot.items(state=None))


def test_a_copy_is_no_engine_s_mirror(tmp_path):
    """Which index was pushed into an index is said of that one: another with the same rows is not kept up to date."""
    source = index(tmp_path / "a", [item("x"), item("y", 1)], pushed="somewhere 7", mine=1)
    merged([source], tmp_path / "out")
    for made in (tmp_path / "out", *parted(source, tmp_path / "parts", shards=2).indexes):
        assert IndexStore.stored_settings(str(made)) == {"mine": 1}


def test_a_layout_that_does_not_suit_what_is_made_costs_speed_only(tmp_path):
    """A budget that the rows exceed: a note, and all of them are there."""
    source = index(tmp_path / "a", [item(f"a{i}", i) for i in range(9)], index={"kind": "IVF2,Flat", "memory": 99})
    report = parted(source, tmp_path / "parts", shards=2)
    assert contents(*report.indexes) == contents(source)
    assert any("searches scan all rows" in note for note in report.notes)
    assert any("searches scan all rows" in note for note in merged(report.indexes, tmp_path / "out").notes)


def test_shards_share_the_memory_that_the_index_may_take(tmp_path):
    """Together they take what the index was allowed; merged again, one index may take that."""
    source = index(tmp_path / "a", [item("x"), item("y", 1)], index={"memory": 1 << 30, "overlap": 0.9})
    for made in parted(source, tmp_path / "parts", shards=4).indexes:
        assert IndexStore.stored_settings(str(made))["index"] == {"memory": 1 << 28, "overlap": 0.9}
    merged([tmp_path / "parts"], tmp_path / "out")
    assert IndexStore.stored_settings(str(tmp_path / "out")) == IndexStore.stored_settings(str(source))


def test_what_cannot_be_merged_is_told_what_helps(tmp_path):
    """Not how to ask an index: nobody asked one."""
    a = index(tmp_path / "a", [item("x")])
    b = index(tmp_path / "b", [item("y")], model=ColorEncoder(name="other"))
    with pytest.raises(IndexMismatchError, match="Give all of them one model first: mmsearch reindex"):
        merged([a, b], tmp_path / "out")

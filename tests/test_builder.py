"""What a build promises: only what is new is encoded, nothing is lost, one bad file costs itself only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.builder import build
from mmsearch.data.images import Limits
from mmsearch.errors import IndexLockedError, IndexMismatchError, InputError, PartialError, UsageError
from mmsearch.searcher import Searcher
from mmsearch.store import IndexStore
from mmsearch.testing import ColorEncoder
from mmsearch.types import BuildReport, Modality, Skipped, SkipReason, Source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


class CountingEncoder(ColorEncoder):
    """Knows how many pictures and texts went through it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.images = self.texts = 0

    def encode_pixels(self, pixels, **kwargs):
        self.images += len(pixels)
        return super().encode_pixels(pixels, **kwargs)

    def encode_texts(self, texts, **kwargs):
        self.texts += len(texts)
        return super().encode_texts(texts, **kwargs)


def paint(path: Path, colour, size=(24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        paint(tmp_path / "photos" / f"{name}.png", colour)
    return tmp_path / "photos"


def run(photos, out, **options) -> tuple[BuildReport, CountingEncoder]:
    encoder = options.pop("encoder", None) or CountingEncoder()
    paths = photos if isinstance(photos, list) else [photos]
    return build(paths, out, encoder=encoder, workers=1, **options), encoder


def contents(out: Path) -> dict[str, np.ndarray]:
    """Path -> vector of every picture in the index; fails when one is there twice."""
    with IndexStore.open(str(out)) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        located = snapshot.locate(rows)
        paths = [str(one.item.path) for one in located]
        assert len(paths) == len(set(paths))
        return dict(zip(paths, snapshot.vectors(rows), strict=True))


def first_hit(out: Path, text: str) -> str:
    with Searcher.open(out, encoder=ColorEncoder()) as searcher:
        return Path(str(searcher.search_text(text, k=1)[0].item.path)).name


def test_pictures_are_found_by_their_words(photos, tmp_path):
    """The thin line through the whole thing: files in, the right file out."""
    report, _ = run(photos, tmp_path / "index")
    assert (report.added, report.encoded_images, report.skipped) == (4, 4, ())
    for name in COLOURS:
        assert first_hit(tmp_path / "index", name) == f"{name}.png"


def test_second_run_encodes_nothing(photos, tmp_path):
    """What was indexed and did not change is not looked at again."""
    run(photos, tmp_path / "index")
    report, encoder = run(photos, tmp_path / "index")
    assert (report.unchanged, report.added, report.changed, encoder.images) == (4, 0, 0, 0)


def test_how_rows_are_laid_out_is_kept_until_something_else_is_asked_for(photos, tmp_path):
    """Through later runs, and when everything is encoded anew by another model."""
    out = tmp_path / "index"
    run(photos, out, kind="exact", overlap=0.9)
    run(photos, out)
    run(photos, out, encoder=CountingEncoder(name="other"), force=True)
    with IndexStore.open(str(out)) as store:
        assert store.settings["index"] == {"kind": "exact", "overlap": 0.9}
    run(photos, out, encoder=CountingEncoder(name="other"), kind="auto", overlap=0.95)
    with IndexStore.open(str(out)) as store:
        assert "index" not in store.settings
    with pytest.raises(UsageError, match="ivf-pq-fs"):
        run(photos, out, kind="fast")


def test_only_the_changed_file_is_encoded_again(photos, tmp_path):
    """A changed picture replaces its own vector and no other."""
    run(photos, tmp_path / "index")
    paint(photos / "red.png", COLOURS["blue"], size=(30, 30))
    report, encoder = run(photos, tmp_path / "index")
    assert (report.changed, report.unchanged, encoder.images) == (1, 3, 1)
    assert len(contents(tmp_path / "index")) == 4


def test_content_decides_when_the_stamp_proves_nothing(photos, tmp_path):
    """Same size and time set back by hand: the hash tells a changed file from a touched one."""
    run(photos, tmp_path / "index")
    before = (photos / "red.png").stat()
    data = bytearray((photos / "green.png").read_bytes())
    if len(data) == before.st_size:
        (photos / "red.png").write_bytes(data)
    os.utime(photos / "red.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(photos / "blue.png")
    report, encoder = run(photos, tmp_path / "index")
    assert encoder.images <= 1 and report.unchanged == 4 - report.changed
    assert first_hit(tmp_path / "index", "blue") == "blue.png"


def test_a_move_is_followed_without_encoding(photos, tmp_path):
    """A renamed or moved picture keeps its vector and its id."""
    run(photos, tmp_path / "index")
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        before = searcher.search_text("red", k=1)[0].item.id
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "red.png").rename(photos / "deep" / "er" / "rouge.png")
    report, encoder = run(photos, tmp_path / "index")
    assert (report.moved, report.added, report.removed, encoder.images) == (1, 0, 0, 0)
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        hit = searcher.search_text("red", k=1)[0]
    assert (Path(str(hit.item.path)).name, hit.item.id) == ("rouge.png", before)


def test_swapped_names_swap_vectors(photos, tmp_path):
    """Two files that exchange their names end with the right vector each."""
    run(photos, tmp_path / "index")
    (photos / "red.png").rename(photos / "x.png")
    (photos / "blue.png").rename(photos / "red.png")
    (photos / "x.png").rename(photos / "blue.png")
    run(photos, tmp_path / "index")
    assert first_hit(tmp_path / "index", "red") == "blue.png"
    assert first_hit(tmp_path / "index", "blue") == "red.png"
    assert len(contents(tmp_path / "index")) == 4


def test_a_copy_is_not_encoded(photos, tmp_path):
    """The same content under another name is another item with the same vector."""
    run(photos, tmp_path / "index")
    (photos / "copy.png").write_bytes((photos / "red.png").read_bytes())
    report, encoder = run(photos, tmp_path / "index")
    assert (report.added, report.moved, encoder.images) == (1, 0, 0)
    found = contents(tmp_path / "index")
    assert np.array_equal(found[str(photos / "copy.png")], found[str(photos / "red.png")])


def test_a_deleted_file_is_dropped(photos, tmp_path):
    """Gone from the folder, gone from the index."""
    run(photos, tmp_path / "index")
    (photos / "red.png").unlink()
    report, _ = run(photos, tmp_path / "index")
    assert report.removed == 1 and len(contents(tmp_path / "index")) == 3


@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_a_vanished_root_is_kept_unless_pruned(photos, tmp_path, how):
    """An unmounted disk must not cost an index; `prune` says that it is meant."""
    other = tmp_path / "other"
    paint(other / "white.png", (255, 255, 255))
    run([photos, other], tmp_path / "index")
    for file in photos.iterdir():
        file.unlink()
    if how == "gone":
        photos.rmdir()
    report, _ = run([photos, other], tmp_path / "index")
    assert report.removed == 0 and len(contents(tmp_path / "index")) == 5
    assert "--prune" in " ".join(report.notes)
    pruned, _ = run([photos, other], tmp_path / "index", prune=True)
    assert pruned.removed == 4 and len(contents(tmp_path / "index")) == 1


def test_an_unreadable_file_costs_itself_only_and_is_remembered(photos, tmp_path):
    """Reported with its reason, not tried again until it changes, and its neighbours keep their own vectors."""
    (photos / "a.jpg").write_bytes(b"<html>not a picture</html>")
    (photos / "z.png").write_bytes(b"")
    for name in ("a.jpg", "z.png"):
        os.utime(photos / name, (1e9, 1e9))  # not written just now: its stamp can be trusted
    report, _ = run(photos, tmp_path / "index")
    assert {s.reason for s in report.skipped} == {SkipReason.NOT_AN_IMAGE, SkipReason.EMPTY}
    for name in COLOURS:
        assert first_hit(tmp_path / "index", name) == f"{name}.png"
    again, encoder = run(photos, tmp_path / "index")
    assert (encoder.images, again.unchanged, len(again.skipped)) == (0, 4, 2)
    paint(photos / "z.png", (255, 255, 255))
    mended, encoder = run(photos, tmp_path / "index")
    assert (encoder.images, len(mended.skipped), mended.added) == (1, 1, 1)


def test_strict_turns_skips_into_an_error_after_indexing_the_rest(photos, tmp_path):
    """--strict is exit code 3 and still leaves a whole index."""
    (photos / "a.jpg").write_bytes(b"nonsense")
    with pytest.raises(PartialError):
        run(photos, tmp_path / "index", strict=True)
    assert len(contents(tmp_path / "index")) == 4


def test_overlapping_paths_name_a_picture_once(photos, tmp_path):
    """A folder, a folder in it, and a file of both are one item a picture."""
    paint(photos / "sub" / "white.png", (255, 255, 255))
    run([photos, photos / "sub", photos / "red.png"], tmp_path / "index")
    assert len(contents(tmp_path / "index")) == 5
    report, encoder = run([photos / "sub"], tmp_path / "index")
    assert (report.removed, encoder.images, len(contents(tmp_path / "index"))) == (0, 0, 5)


def test_side_car_captions_are_texts_of_the_item(photos, tmp_path):
    """name.txt beside name.png is searchable, and a changed caption encodes texts only."""
    (photos / "red.txt").write_text("a green tree\n")
    report, _ = run(photos, tmp_path / "index")
    assert report.encoded_texts == 1
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        hit = searcher.search_text("green", k=1, to="text")[0]
    assert (Path(str(hit.item.path)).name, hit.caption) == ("red.png", "a green tree")
    (photos / "red.txt").write_text("a blue tree\na yellow sun\n")
    report, encoder = run(photos, tmp_path / "index")
    assert (encoder.images, encoder.texts, report.changed) == (0, 2, 1)


def test_a_table_brings_captions_and_metadata(photos, tmp_path):
    """JSONL rows: picture, captions, and the rest as metadata; text-only rows are items too."""
    table = tmp_path / "table.jsonl"
    rows = [{"image": f"photos/{n}.png", "caption": f"something {n}", "year": 2000 + i} for i, n in enumerate(COLOURS)]
    rows.append({"id": "note", "caption": "a purple note", "kind": "text"})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, _ = run([table], tmp_path / "index")
    assert (report.added, report.encoded_images, report.encoded_texts) == (5, 4, 5)
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        hit = searcher.search_text("green", k=1)[0]
        assert dict(hit.item.metadata)["year"] == 2001
        note = searcher.search_text("purple", k=1, to="text")[0].item
        assert (note.path, note.id) == (None, "note")
    again, encoder = run([table], tmp_path / "index")
    assert (again.unchanged, encoder.images, encoder.texts) == (5, 0, 0)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert run([table], tmp_path / "index")[0].removed == 1


def test_ready_sources_need_no_files(tmp_path):
    """A backend hands over texts of its own."""
    sources = [Source("api", f"t{i}", None, None, captions=(f"a {name} thing",)) for i, name in enumerate(COLOURS)]
    build(sources, tmp_path / "index", encoder=ColorEncoder())
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        assert searcher.search_text("blue", k=1, to="text")[0].caption == "a blue thing"


def test_ready_sources_keep_their_own_names(photos, tmp_path):
    """Two products with the same picture are two items; a product that is handed over no more is dropped."""
    red = str(photos / "red.png")
    sources = [Source("shop", sku, red, None, captions=("thing",), metadata={"id": sku}) for sku in ("a", "b")]
    run(sources, tmp_path / "index")
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        assert {hit.item.id for hit in searcher.search_text("red", k=5)} == {"a", "b"}
    report, encoder = run(sources[1:], tmp_path / "index")
    assert (report.removed, encoder.images) == (1, 0)


class StopsAfter:
    """A progress display on which somebody presses Ctrl-C."""

    def __init__(self, items: int):
        self.left = items

    def start(self, total):
        pass

    def note(self, text):
        pass

    def advance(self, n, *, note=""):
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_encoded(tmp_path):
    """An interrupted build goes on where it stopped and ends as if nothing had happened."""
    rng = np.random.default_rng(0)
    for i in range(40):
        paint(tmp_path / "photos" / f"{i:02d}.png", tuple(rng.integers(0, 255, 3).tolist()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "photos", tmp_path / "index", progress=StopsAfter(16), batch_size=8)
    kept = len(contents(tmp_path / "index"))
    assert 16 <= kept < 40
    report, encoder = run(tmp_path / "photos", tmp_path / "index", batch_size=8)
    assert (report.unchanged, encoder.images) == (kept, 40 - kept)
    run(tmp_path / "photos", tmp_path / "calm")
    calm, stopped = contents(tmp_path / "calm"), contents(tmp_path / "index")
    assert calm.keys() == stopped.keys()
    assert all(np.array_equal(calm[path], stopped[path]) for path in calm)


class Sick(ColorEncoder):
    """Gives no finite vector for dark pictures."""

    def encode_pixels(self, pixels, **kwargs):
        vectors, ok = super().encode_pixels(pixels, **kwargs)
        return vectors, ok & (pixels.reshape(len(pixels), -1).max(axis=1) > 10)


def test_a_bad_embedding_is_listed_and_never_stored(photos, tmp_path):
    """NaN from the model costs that picture only."""
    paint(photos / "m.png", (0, 0, 0))
    report, _ = run(photos, tmp_path / "index", encoder=Sick())
    assert [(Path(s.path).name, s.reason) for s in report.skipped] == [("m.png", SkipReason.BAD_EMBEDDING)]
    for name in COLOURS:
        assert first_hit(tmp_path / "index", name) == f"{name}.png"


def test_failed_items_never_shift_their_neighbours(tmp_path):
    """Whichever files are broken, every picture keeps its own vector."""
    rng = np.random.default_rng(1)
    colours = {}
    for i in range(60):
        path = tmp_path / "photos" / f"{i:02d}.png"
        colour = tuple(rng.integers(20, 255, 3).tolist())
        paint(path, colour)
        if rng.random() < 0.3:
            path.write_bytes(path.read_bytes()[: int(rng.integers(0, 40))])
        else:
            colours[str(path)] = colour
    run(tmp_path / "photos", tmp_path / "index", batch_size=7)
    found = contents(tmp_path / "index")
    assert found.keys() == colours.keys()
    encoder = ColorEncoder()
    for path, colour in colours.items():
        size = encoder.preprocessing.size
        expected, _ = encoder.encode_pixels(np.full((1, size, size, 3), colour, np.uint8))
        assert float(found[path] @ expected[0]) > 0.999


def test_an_index_of_another_model_is_refused(photos, tmp_path):
    """Vectors of two models never meet in one index; --force starts anew."""
    run(photos, tmp_path / "index")
    other = CountingEncoder(name="other")
    with pytest.raises(IndexMismatchError, match="other"):
        run(photos, tmp_path / "index", encoder=other)
    report, encoder = run(photos, tmp_path / "index", encoder=other, force=True)
    assert (report.added, encoder.images) == (4, 4)


def test_two_writers_never_meet(photos, tmp_path):
    """The second one is told who is writing."""
    run(photos, tmp_path / "index")
    with IndexStore.open(str(tmp_path / "index"), write=True), pytest.raises(IndexLockedError, match=str(os.getpid())):
        run(photos, tmp_path / "index")


def test_nothing_to_index_is_an_error_that_says_so(tmp_path):
    """No such folder, and a folder without pictures."""
    with pytest.raises(InputError, match="no such path"):
        run(tmp_path / "nowhere", tmp_path / "index")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="at least one picture"):
        run(tmp_path / "empty", tmp_path / "index")
    assert not (tmp_path / "index").exists()


# What a review found: each of these once went wrong


def test_two_empty_files_are_two_skips(photos, tmp_path):
    """A file that cannot be hashed is left to the loader, which says why; nothing stops."""
    for name in ("e1.jpg", "e2.jpg", "e3.jpg"):
        (photos / name).write_bytes(b"")
        report, _ = run(photos, tmp_path / "index")
    assert len(report.skipped) == 3 and len(contents(tmp_path / "index")) == 4


def test_a_vanished_root_inside_another_root_is_kept(tmp_path):
    """A stick mounted below the photo folder, named too: emptied, its items stay until --prune."""
    paint(tmp_path / "a" / "x.png", (255, 0, 0))
    stick = paint(tmp_path / "a" / "usb" / "y.png", (0, 255, 0))
    roots = [tmp_path / "a", tmp_path / "a" / "usb"]
    run(roots, tmp_path / "index")
    stick.unlink()
    report, _ = run(roots, tmp_path / "index")
    assert report.removed == 0 and "--prune" in " ".join(report.notes)
    assert run(roots, tmp_path / "index", prune=True)[0].removed == 1


def test_a_root_inside_another_root_that_is_not_empty_loses_what_is_deleted(tmp_path):
    """Both named, both with files: a deletion in the inner one is a deletion."""
    paint(tmp_path / "a" / "x.png", (255, 0, 0))
    paint(tmp_path / "a" / "usb" / "y.png", (0, 255, 0))
    gone = paint(tmp_path / "a" / "usb" / "z.png", (0, 0, 255))
    roots = [tmp_path / "a", tmp_path / "a" / "usb"]
    run(roots, tmp_path / "index")
    gone.unlink()
    report, _ = run(roots, tmp_path / "index")
    assert (report.removed, report.notes) == (1, ())


def test_a_folder_that_cannot_be_read_loses_nothing(photos, tmp_path):
    """Rights taken away below a scanned folder: its items are not known to be gone."""
    paint(photos / "sub" / "white.png", (255, 255, 255))
    run(photos, tmp_path / "index")
    from mmsearch.scan import Scan

    scan = Scan([str(photos)], exclude=(), include_hidden=False)
    list(scan.sources())
    scan.skipped.append(Skipped(str(photos / "sub"), SkipReason.UNREADABLE, "permission denied"))
    gone = scan.gone(prune=False)
    assert not gone(str(photos / "sub" / "white.png"), "") and gone(str(photos / "red.png"), "")


def test_a_table_that_lost_its_rows_or_pictures_keeps_its_items(photos, tmp_path):
    """An emptied table, a deleted one, and rows whose pictures are on a disk that is away: kept until --prune."""
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nphotos/red.png,a red thing\n,only text\n")
    run([table], tmp_path / "index")
    (photos / "red.png").rename(tmp_path / "elsewhere.png")
    assert run([table], tmp_path / "index")[0].removed == 0
    table.write_text("image,caption\n")
    assert run([table], tmp_path / "index")[0].removed == 0
    table.unlink()
    other = paint(tmp_path / "other" / "blue.png", (0, 0, 255)).parent
    report, _ = run([table, other], tmp_path / "index")
    assert report.removed == 0 and "--prune" in " ".join(report.notes)
    assert run([table, other], tmp_path / "index", prune=True)[0].removed == 2


def test_other_limits_try_again_what_the_old_ones_refused(photos, tmp_path):
    """Skipped as too large under a small limit, indexed under the usual one."""
    paint(photos / "wide.png", (255, 255, 255), size=(200, 100))
    os.utime(photos / "wide.png", (1e9, 1e9))
    report, _ = run(photos, tmp_path / "index", limits=Limits(max_pixels=1000))
    assert [s.reason for s in report.skipped] == [SkipReason.TOO_LARGE]
    report, encoder = run(photos, tmp_path / "index")
    assert (report.skipped, report.added, encoder.images) == ((), 1, 1)


def test_a_rename_is_followed_after_a_caption_came(photos, tmp_path):
    """A new caption leaves what is known of the picture: size and hash, so that moves are still seen."""
    run(photos, tmp_path / "index")
    (photos / "red.txt").write_text("a warm colour")
    run(photos, tmp_path / "index")
    (photos / "red.png").rename(photos / "rouge.png")
    (photos / "red.txt").rename(photos / "rouge.txt")
    report, encoder = run(photos, tmp_path / "index")
    assert (report.moved, report.added, report.removed, encoder.images) == (1, 0, 0, 0)
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        assert searcher.search_text("red", k=1)[0].item.width == 24


def test_a_table_may_correct_its_ids(photos, tmp_path):
    """Ids that a table swaps are swapped in the index."""
    table = tmp_path / "t.csv"
    table.write_text("id,image\n1,photos/red.png\n2,photos/blue.png\n")
    run([table], tmp_path / "index")
    table.write_text("id,image\n2,photos/red.png\n1,photos/blue.png\n")
    run([table], tmp_path / "index")
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        assert (searcher.search_text("red", k=1)[0].item.id, searcher.search_text("blue", k=1)[0].item.id) == ("2", "1")


def test_one_path_is_one_path(photos, tmp_path):
    """A lone string is not a list of its letters."""
    assert build(str(photos), tmp_path / "index", encoder=ColorEncoder(), workers=1).added == 4


class StopsInTexts(ColorEncoder):
    """Ctrl-C while captions are encoded."""

    def encode_texts(self, texts, **options):
        raise KeyboardInterrupt


def test_ctrl_c_while_captions_are_encoded_doubles_and_loses_nothing(photos, tmp_path):
    """Whatever was committed is whole; the next run ends as a calm one."""
    for name in COLOURS:
        (photos / f"{name}.txt").write_text(f"a {name} one")
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "index", encoder=StopsInTexts())
    run(photos, tmp_path / "index")
    assert len(contents(tmp_path / "index")) == 4
    with Searcher.open(tmp_path / "index", encoder=ColorEncoder()) as searcher:
        assert len(searcher.search_text("red", k=9, to="text")) == 4


def test_a_big_batch_reaches_the_model(photos, tmp_path):
    """--batch-size is the size of a pass, not only of a list."""
    seen = []

    class Noting(ColorEncoder):
        def encode_pixels(self, pixels, *, batch_size=32):
            seen.append(batch_size)
            return super().encode_pixels(pixels, batch_size=batch_size)

    run(photos, tmp_path / "index", encoder=Noting(), batch_size=128)
    assert seen == [128]


def test_a_table_and_its_folder_name_each_picture_once(photos, tmp_path):
    """`index photos photos.csv`: rows bring captions, the folder brings the rest, nothing comes twice."""
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nphotos/red.png,a warm colour\n")
    run(photos, tmp_path / "index")
    report, encoder = run([photos, table], tmp_path / "index")
    assert (len(contents(tmp_path / "index")), encoder.images, report.moved) == (4, 0, 1)


def test_one_file_that_is_no_table_does_not_stop_a_list(photos, tmp_path):
    """`find -type f | mmsearch index -` meets all kinds of JSON."""
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    report, _ = run([photos / "red.png", tmp_path / "settings.json"], tmp_path / "index")
    assert (report.added, [s.reason for s in report.skipped]) == (1, [SkipReason.BAD_ROW])


def test_settings_that_a_build_does_not_make_outlive_it(photos, tmp_path):
    """A mirror's mark, or what a later version wrote down; what the build itself decides is replaced."""
    out = tmp_path / "index"
    run(photos, out)
    with IndexStore.open(str(out), write=True) as store:
        store.note_settings({**store.settings, "pushed": "somewhere 7", "tokens": True, "limits": {}})
        store.finish()
    run(photos, out, tokens=False)
    with IndexStore.open(str(out)) as store:
        assert store.settings["pushed"] == "somewhere 7" and store.settings["limits"]
        assert "tokens" not in store.settings

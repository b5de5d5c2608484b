"""Fused item vectors: one row for an item's picture and captions, right after every kind of change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.builder import SilentProgress, build
from mmsearch.data.images import DEFAULT_LIMITS
from mmsearch.data.reading import stamp_of
from mmsearch.errors import IndexMismatchError, ModelError, UsageError
from mmsearch.ingest import Ingest
from mmsearch.pictures import LocalPictures
from mmsearch.searcher import Searcher
from mmsearch.similarity import normalise
from mmsearch.store import IndexStore
from mmsearch.testing import COLORS, ColorEncoder, color_image
from mmsearch.types import Modality, Source


class JoiningEncoder(ColorEncoder):
    """Joins an item's sides by their mean, and counts what goes through it."""

    joins_items = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.images = self.items = 0

    def encode_pixels(self, pixels, **kwargs):
        self.images += len(pixels)
        return super().encode_pixels(pixels, **kwargs)

    def item_rows(self, images, texts, *, has_image, has_text):
        self.items += len(images)
        return normalise(images * has_image[:, None] + texts * has_text[:, None])


def paint(path: Path, colour: str, caption: str | None = None) -> Path:
    """A picture of one colour, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(color_image(colour)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def age(folder: Path) -> None:
    """Make the pictures old, so that a scan trusts their stamps."""
    for path in folder.glob("*.png"):
        os.utime(path, (1e9, 1e9))


def picture(colour):
    return ColorEncoder().encode_images([color_image(colour)])[0]


def text(*captions):
    return normalise(ColorEncoder().encode_texts(list(captions)).mean(axis=0, keepdims=True))[0]


def joined(colour, *captions):
    return normalise((picture(colour) + text(*captions))[None])[0]


def fused(paths, out, **options):
    encoder = options.pop("encoder", None) or JoiningEncoder()
    given = {"item_vectors": "fused", **options}
    return build(paths, out, encoder=encoder, workers=1, **given), encoder


def item_rows(out) -> dict[str, np.ndarray]:
    """Name of each item in the list of pictures -> its row."""
    with IndexStore.open(str(out)) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        names = [Path(one.item.path).name if one.item.path else one.item.captions[0] for one in snapshot.locate(rows)]
        assert len(names) == len(set(names))
        return dict(zip(names, snapshot.vectors(rows), strict=True))


def ids(out) -> dict[str, str]:
    with IndexStore.open(str(out)) as store, store.snapshot() as snapshot:
        return {Path(str(known.path)).name: known.id for known in snapshot.items()}


def assert_rows(out, **wanted):
    found = item_rows(out)
    assert found.keys() == {name.replace("__", ".") for name in wanted}
    for name, row in wanted.items():
        assert np.allclose(found[name.replace("__", ".")], row, atol=2e-3), name


@pytest.fixture
def photos(tmp_path):
    paint(tmp_path / "photos" / "red.png", "red", "blue")
    paint(tmp_path / "photos" / "green.png", "green")
    return tmp_path / "photos"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"


def test_picture_and_caption_make_one_row(photos, out):
    """Both together where both are, the picture's own where it is alone; captions stay searchable as texts."""
    report, _ = fused([photos], out)
    assert (report.added, report.encoded_images, report.encoded_texts) == (2, 2, 1)
    assert_rows(out, red__png=joined("red", "blue"), green__png=picture("green"))
    with Searcher.open(out, encoder=ColorEncoder()) as searcher:
        for word in ("red", "blue"):
            assert Path(searcher.search_text(word, k=1)[0].item.path).name == "red.png"
        assert searcher.search_text("blue", to="text")[0].caption == "blue"


def test_items_of_texts_alone_stand_in_the_same_list(photos, out):
    """One ranked list for items of every kind; several captions count by their mean."""
    note = Source(root="notes", name="1", path=None, stamp=None, captions=("yellow", "cyan cyan yellow"))
    fused([photos, note], out)
    rows = {"red__png": joined("red", "blue"), "green__png": picture("green")}
    assert_rows(out, **rows, yellow=text("yellow", "cyan cyan yellow"))
    with Searcher.open(out, encoder=ColorEncoder()) as searcher:
        hits = searcher.search_text("yellow", k=3)
    assert hits[0].item.captions[0] == "yellow" and hits[0].item.path is None
    with IndexStore.open(str(out)) as store:
        assert store.verify() == []


def test_a_second_run_encodes_nothing_and_stays_fused(photos, out):
    """Nobody has to say it again: the index knows how its rows are made."""
    note = Source(root="notes", name="1", path=None, stamp=None, captions=("yellow",))
    fused([photos, note], out)
    report, encoder = fused([photos, note], out, item_vectors=None)
    assert (report.unchanged, report.changed, encoder.images, encoder.items) == (3, 0, 0, 0)
    paint(photos / "cyan.png", "cyan", "black")
    fused([photos, note], out, item_vectors=None)
    assert np.allclose(item_rows(out)["cyan.png"], joined("cyan", "black"), atol=2e-3)


@pytest.mark.parametrize("stamped", ["long ago", "just now", "meanwhile"])
def test_a_new_caption_makes_a_new_row(photos, out, stamped):
    """The picture is read again, for its row is nowhere alone; whether or not its stamp says that it is the same."""
    if stamped == "long ago":
        age(photos)
    fused([photos], out)
    if stamped == "meanwhile":
        os.utime(photos / "red.png")
    (photos / "red.txt").write_text("white")
    (photos / "green.txt").write_text("black")
    report, encoder = fused([photos], out)
    assert (report.changed, encoder.images) == (2, 2)
    assert_rows(out, red__png=joined("red", "white"), green__png=joined("green", "black"))


def test_a_caption_that_goes_leaves_the_picture(photos, out):
    """Its row is then the picture's own."""
    fused([photos], out)
    (photos / "red.txt").unlink()
    fused([photos], out)
    assert_rows(out, red__png=picture("red"), green__png=picture("green"))


def test_new_metadata_reads_no_picture(photos, out):
    """Captions make a row, metadata do not."""
    for price in (1, 2):
        source = Source("shop", "1", str(photos / "red.png"), None, ("blue",), {"price": price})
        report, encoder = fused([source], out)
    assert (report.changed, encoder.images, encoder.items) == (1, 0, 0)
    assert_rows(out, red__png=joined("red", "blue"))


def test_a_changed_picture_takes_its_old_caption_along(photos, out):
    """The text's row is not kept apart from a row that it is part of."""
    fused([photos], out)
    paint(photos / "red.png", "yellow")
    fused([photos], out)
    assert_rows(out, red__png=joined("yellow", "blue"), green__png=picture("green"))


def test_an_item_that_loses_its_picture_is_found_by_its_text(photos, out):
    """And the other way round, when it gets one back."""
    with_picture = Source("shop", "1", str(photos / "red.png"), None, ("blue",))
    without = Source("shop", "1", None, None, ("blue",))
    for sources, name, row in ((with_picture, "red.png", joined("red", "blue")), (without, "blue", text("blue"))) * 2:
        fused([sources], out)
        found = item_rows(out)
        assert found.keys() == {name} and np.allclose(found[name], row, atol=2e-3)


def test_a_move_is_followed_and_with_a_new_caption_made_anew(photos, out):
    """The id stays in both cases; only what got another caption is read."""
    fused([photos], out)
    before = ids(out)
    (photos / "red.png").rename(photos / "rouge.png")
    (photos / "red.txt").rename(photos / "rouge.txt")
    (photos / "green.png").rename(photos / "vert.png")
    (photos / "vert.txt").write_text("black")
    report, encoder = fused([photos], out)
    assert (report.moved, report.changed, report.added, report.removed, encoder.images) == (1, 1, 0, 0, 1)
    assert ids(out) == {"rouge.png": before["red.png"], "vert.png": before["green.png"]}
    assert_rows(out, rouge__png=joined("red", "blue"), vert__png=joined("green", "black"))


def test_a_copy_has_its_own_row_unless_the_captions_are_the_same(photos, out):
    """Same picture, other words: another item vector."""
    fused([photos], out)
    for name, caption in (("same", "blue"), ("other", "white"), ("bare", None)):
        paint(photos / f"{name}.png", "red", caption)
    _, encoder = fused([photos], out)
    assert encoder.images == 2
    red = joined("red", "blue")
    assert_rows(
        out, red__png=red, green__png=picture("green"), same__png=red, other__png=joined("red", "white"),
        bare__png=picture("red"),
    )  # fmt: skip


class StoppedStore:
    """A store whose first commit is cut off by Ctrl-C."""

    def __init__(self, store):
        self.store, self.stopped = store, False

    def __getattr__(self, name):
        return getattr(self.store, name)

    def commit(self, batch):
        if not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt
        self.store.commit(batch)


def test_a_commit_that_was_cut_off_joins_its_rows_once(photos, out):
    """What was encoded is committed by the next attempt, from the sides and not from what was joined of them."""
    encoder, path = JoiningEncoder(), str(photos / "red.png")
    source = Source("", path, path, stamp_of(os.stat(path)), ("blue",))
    made = {"model": encoder.identity, "preprocessing": encoder.preprocessing}
    with IndexStore.create(str(out), **made) as store:
        store.begin_scan()
        store.seen([source])
        pictures = LocalPictures(encoder, batch_size=4, workers=1, limits=DEFAULT_LIMITS)
        ingest = Ingest(StoppedStore(store), encoder, pictures, told=SilentProgress(), joins=encoder)
        with pytest.raises(KeyboardInterrupt):
            ingest.run(store.changes(scanned_roots=[""]), lambda *_: False)
        ingest.run(iter(()), lambda *_: False)
        pictures.close()
    assert encoder.images == 1
    assert_rows(out, red__png=joined("red", "blue"))


def test_one_index_has_one_kind_of_rows(photos, out):
    """Going over from one to the other is refused, and with --force everything is encoded anew."""
    fused([photos], out)
    with pytest.raises(IndexMismatchError, match="fused item vectors"):
        fused([photos], out, item_vectors="separate")
    report, encoder = fused([photos], out, item_vectors="separate", force=True)
    assert (report.added, encoder.images, encoder.items) == (2, 2, 0)
    assert_rows(out, red__png=picture("red"), green__png=picture("green"))
    with pytest.raises(IndexMismatchError, match="separate item vectors"):
        fused([photos], out)


def test_a_model_without_a_head_is_refused_before_there_is_an_index(photos, out):
    """Nothing is made that would have to be removed; an unknown kind likewise."""
    for encoder in (ColorEncoder(), type("Headless", (JoiningEncoder,), {"joins_items": False})()):
        with pytest.raises(ModelError, match="joins an item's picture and text"):
            fused([photos], out, encoder=encoder)
    with pytest.raises(UsageError, match="separate or fused"):
        fused([photos], out, item_vectors="both")
    assert not out.exists()


@pytest.mark.parametrize("kind", [None, "separate"])
def test_separate_rows_are_what_they_always_were(photos, out, kind):
    """No head is asked, nothing new stands in the settings, a model without a head will do."""
    _, encoder = fused([photos], out, item_vectors=kind)
    assert encoder.items == 0
    assert_rows(out, red__png=picture("red"), green__png=picture("green"))
    assert IndexStore.stored_settings(str(out)).keys() == {"model", "limits"}


def test_however_an_index_came_about_its_rows_are_those_of_a_fresh_one(tmp_path, out):
    """Rounds of random captions, colours, moves and copies, twice compared with a build from nothing."""
    rng, colours, photos = np.random.default_rng(0), list(COLORS), tmp_path / "photos"
    paint(photos / "a.png", "red")
    for step in range(24):
        path, colour, word = photos / f"{rng.choice(list('abcd'))}.png", rng.choice(colours), rng.choice(colours)
        match rng.integers(4):
            case 0:
                paint(path, colour, word)
            case 1:
                path.with_suffix(".txt").write_text(word)
            case 2 if path.exists():
                path.rename(photos / f"{step}.png")
            case _ if path.exists():
                (photos / f"copy{step}.png").write_bytes(path.read_bytes())
        if step % 4 == 3:
            fused([photos], out)
        if step % 12 == 11:
            fused([photos], tmp_path / f"fresh{step}")
            found, fresh = item_rows(out), item_rows(tmp_path / f"fresh{step}")
            assert found.keys() == fresh.keys()
            assert all(np.allclose(found[name], fresh[name], atol=1e-3) for name in fresh)

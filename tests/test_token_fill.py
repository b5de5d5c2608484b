"""Patch tokens of an index: made once for every picture, right after every kind of change, resumed after every stop."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch import token_fill
from mmsearch.builder import build
from mmsearch.errors import IndexNotFoundError, ModelError
from mmsearch.rerank.reranker import Reranker
from mmsearch.rerank.tokens import Patches, dequantise, unpack
from mmsearch.store import IndexStore
from mmsearch.store.tokens import TOKENS_NAME, TokenStore
from mmsearch.testing import COLORS, ColorEncoder, GridPatches, color_image, tiny_reranker
from mmsearch.token_fill import fill_tokens
from mmsearch.types import SkipReason


class CountingPatches(GridPatches):
    """Counts the pictures it reads; stops with `error` after so many of them."""

    def __init__(self, *, stop_after: int | None = None, error: type[BaseException] = KeyboardInterrupt, **options):
        super().__init__(**options)
        self.read, self.stop_after, self.error = 0, stop_after, error

    def read_pixels(self, pixels, **options):
        if self.stop_after is not None and self.read >= self.stop_after:
            raise self.error
        self.read += len(pixels)
        return super().read_pixels(pixels, **options)


def paint(path: Path, colour, size=(20, 16)) -> Path:
    """A picture of one colour: a name, or (r, g, b)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(colour, str):
        Image.fromarray(color_image(colour, size=size)).save(path)
    else:
        Image.new("RGB", size, colour).save(path)
    return path


def photos(folder: Path, count: int = 8) -> Path:
    """That many pictures of different colours: the named ones first."""
    rng = np.random.default_rng(0)
    for number in range(count):
        colour = list(COLORS)[number] if number < len(COLORS) else tuple(rng.integers(0, 255, 3).tolist())
        paint(folder / f"{number:02d}.png", colour)
    return folder


def index(folder: Path, out: Path, **options):
    return build(folder, out, encoder=ColorEncoder(), workers=1, **options)


def fill(out: Path, reranker=None, **options):
    return fill_tokens(out, reranker or GridPatches(), workers=1, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Made once: `photos` (the eight colours; leave them as they are), `index` of them, and `filled` with tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    index(photos(folder / "photos"), folder / "index")
    shutil.copytree(folder / "index", folder / "filled")
    fill(folder / "filled")
    return folder


@pytest.fixture
def indexed(base, tmp_path) -> Path:
    """A copy of an index without tokens."""
    return Path(shutil.copytree(base / "index", tmp_path / "index"))


@pytest.fixture
def filled(base, tmp_path) -> Path:
    """A copy of an index whose eight pictures have tokens."""
    return Path(shutil.copytree(base / "filled", tmp_path / "filled"))


def colours(out: Path, reranker=None) -> dict[str, list[float]]:
    """File name of each picture that has tokens -> the colour of its first patch."""
    reranker = reranker or GridPatches()
    p, c = reranker.config.patches, reranker.config.patch_dim
    with (
        IndexStore.open(str(out)) as store,
        store.snapshot() as snapshot,
        TokenStore.open(out, identity=reranker.tokens_identity) as tokens,
    ):
        known = list(snapshot.pictures())
        found = tokens.get(digest for digest, _ in known)
        assert tokens.count == len(found), "no tokens but those of the index's pictures"
        return {
            Path(path).name: dequantise(unpack(found[digest], p=p, c=c))[0, 0].round(2).tolist()
            for digest, path in known
            if digest in found
        }


@pytest.mark.parametrize("size", [3, 32])
def test_every_picture_gets_its_own_tokens(indexed, size):
    """Whatever the batch size: those that the re-ranker makes of the decoded picture."""
    made = CountingPatches()
    report = fill(indexed, made, batch_size=size)
    assert (report.added, report.present, report.skipped, made.read) == (8, 0, (), 8)
    assert report.bytes_per_picture == 4 * (3 + 2)
    assert colours(indexed) == {f"{n:02d}.png": [v / 255 for v in rgb] for n, rgb in enumerate(COLORS.values())}


def test_a_second_run_reads_nothing(filled):
    """What is there is counted, not made again."""
    again = CountingPatches()
    report = fill(filled, again)
    assert (report.added, report.present, report.removed, again.read) == (0, 8, 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_run_keeps_what_was_made_and_the_next_goes_on(indexed, filled, monkeypatch, error):
    """Ctrl-C or a failure in the middle, also between commits: nothing twice, nothing lost, the same in the end."""
    monkeypatch.setattr(token_fill, "COMMIT_PICTURES", 2)
    for done in (3, 6):
        stopping = CountingPatches(stop_after=3, error=error)
        with pytest.raises(error):
            fill(indexed, stopping, batch_size=1)
        assert stopping.read == 3
        assert len(colours(indexed)) == done
    rest = CountingPatches()
    report = fill(indexed, rest)
    assert (report.added, report.present, rest.read) == (2, 6, 2)
    assert colours(indexed) == colours(filled)
    assert IndexStore.open(str(indexed)).verify() == []


def test_a_moved_photo_keeps_its_tokens(tmp_path):
    """Content decides, not the name."""
    folder = photos(tmp_path / "photos", 3)
    index(folder, tmp_path / "index", tokens=True, reranker=GridPatches())
    (folder / "01.png").rename(folder / "moved.png")
    made = CountingPatches()
    report = index(folder, tmp_path / "index", reranker=made)
    assert (report.moved, report.tokens, made.read) == (1, 0, 0)
    assert colours(tmp_path / "index")["moved.png"] == [0, 1, 0]


def test_a_changed_photo_gets_new_tokens_and_the_old_ones_go(tmp_path):
    """So do those of a photo that is gone."""
    folder = photos(tmp_path / "photos")
    index(folder, tmp_path / "index", tokens=True, reranker=GridPatches())
    paint(folder / "00.png", "blue", size=(30, 30))
    (folder / "01.png").unlink()
    made = CountingPatches()
    report = index(folder, tmp_path / "index", reranker=made)
    assert (report.changed, report.removed, report.tokens, made.read) == (1, 1, 1, 1)
    found = colours(tmp_path / "index")
    assert found["00.png"] == [0, 0, 1]
    assert len(found) == 7


def test_another_re_ranker_makes_all_of_them_anew(filled):
    """Tokens of one are never read by the other."""
    other = GridPatches(grid=3, name="other")
    assert fill(filled, other).added == 8
    assert colours(filled) == {}
    assert len(colours(filled, other)) == 8


def test_damaged_tokens_are_made_anew_where_that_is_asked_for(filled):
    """`thorough` reads what is there; without it only what is not there is made."""
    whole = colours(filled)
    with sqlite3.connect(filled / TOKENS_NAME) as db:
        db.execute("UPDATE tokens SET tokens = zeroblob(20) WHERE rowid IN (2, 5)")
    db.close()
    assert fill(filled, thorough=False).added == 0
    assert fill(filled).added == 2
    assert colours(filled) == whole


def test_a_photo_that_is_not_the_one_indexed_is_left_out(tmp_path):
    """The index is stale there: tokens of another picture would be wrong for its row."""
    folder = photos(tmp_path / "photos")
    index(folder, tmp_path / "index")
    paint(folder / "03.png", "white", size=(9, 9))
    (folder / "05.png").unlink()
    (folder / "06.png").write_bytes(b"no picture")
    report = fill(tmp_path / "index")
    reasons = {Path(one.path).name: one.reason for one in report.skipped}
    assert reasons == {
        "03.png": SkipReason.CHANGING, "05.png": SkipReason.VANISHED, "06.png": SkipReason.NOT_AN_IMAGE
    }  # fmt: skip
    assert report.added == 5
    assert not {"03.png", "05.png", "06.png"} & set(colours(tmp_path / "index"))


def test_of_several_copies_one_that_is_there_is_read(tmp_path):
    """The first one's disk may not be mounted."""
    folder = photos(tmp_path / "photos", 2)
    for name in ("a/copy.png", "z/copy.png"):
        paint(folder / name, "white", size=(9, 9))
    index(folder, tmp_path / "index")
    for gone, there in ("az", "za"):
        (folder / there).mkdir(exist_ok=True)
        paint(folder / there / "copy.png", "white", size=(9, 9))
        (folder / gone / "copy.png").unlink()
        made = CountingPatches(name=gone)
        report = fill(tmp_path / "index", made)
        assert (report.added, report.skipped, made.read) == (3, (), 3)


def test_a_picture_without_finite_tokens_costs_itself_only(indexed):
    """Its neighbours in the batch keep their own."""

    class Broken(GridPatches):
        def read_pixels(self, pixels, **options):
            good = super().read_pixels(pixels, **options)
            scales = good.scales.copy()
            scales[(pixels[:, 0, 0] == [0, 255, 0]).all(axis=1)] = np.nan
            return Patches(good.values, scales)

    report = fill(indexed, Broken())
    assert [(Path(one.path).name, one.reason) for one in report.skipped] == [("01.png", SkipReason.BAD_EMBEDDING)]
    found = colours(indexed)
    assert len(found) == 7 and found["02.png"] == [0, 0, 1] and found["00.png"] == [1, 0, 0]


def test_tokens_of_another_shape_are_refused(indexed):
    """A re-ranker whose graph and settings disagree writes nothing."""

    class Wrong(GridPatches):
        def read_pixels(self, pixels, **options):
            return GridPatches(grid=3).read_pixels(pixels)

    with pytest.raises(ModelError, match="patch tokens"):
        fill(indexed, Wrong())
    assert colours(indexed) == {}


def test_texts_alone_need_no_tokens(tmp_path):
    """An item without a picture, and an index of such items only."""
    table = tmp_path / "texts.jsonl"
    table.write_text('{"caption": "a red car"}\n{"caption": "a blue car"}\n')
    index(table, tmp_path / "index")
    report = fill(tmp_path / "index")
    assert (report.added, report.present, report.skipped) == (0, 0, ())


def test_without_an_index_there_is_nothing_to_fill(tmp_path):
    """And nothing is made."""
    with pytest.raises(IndexNotFoundError):
        fill(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_index_remembers_that_it_keeps_tokens(tmp_path):
    """True once, then every build; False removes them and the setting; without it nothing is said or made."""
    folder, out = photos(tmp_path / "photos", 2), tmp_path / "index"
    plain = index(folder, out, reranker=GridPatches())
    assert plain.tokens == 0 and plain.notes == () and not (out / TOKENS_NAME).exists()
    with IndexStore.open(str(out)) as store:
        assert "tokens" not in store.settings
    first = index(folder, out, tokens=True, reranker=GridPatches())
    assert first.tokens == 2
    assert first.notes == ("patch tokens of 2 pictures (2 new), 0.0 KB each",)
    with IndexStore.open(str(out)) as store:
        assert store.settings["tokens"] is True
    paint(folder / "new.png", "white")
    assert index(folder, out, reranker=GridPatches()).tokens == 1
    index(folder, out, tokens=False)
    with IndexStore.open(str(out)) as store:
        assert "tokens" not in store.settings
        assert store.verify() == []
    assert not (out / TOKENS_NAME).exists()
    assert index(folder, out, reranker=GridPatches()).tokens == 0


def test_a_model_without_a_re_ranker_is_refused_before_anything_is_done(plain_checkpoint, tmp_path):
    """Not after an hour of encoding."""
    folder = photos(tmp_path / "photos", 1)
    with pytest.raises(ModelError, match="rerank"):
        build(folder, tmp_path / "index", model=plain_checkpoint.directory, tokens=True, workers=1)
    assert not (tmp_path / "index").exists()


def test_a_re_ranker_that_reads_no_patches_has_none_to_keep(tmp_path):
    """A fusion of the two rows alone; said before anything is done."""
    tiny_reranker(tmp_path / "model", fusion="gated")
    with pytest.raises(ModelError, match="gated"):
        build(photos(tmp_path / "photos", 1), tmp_path / "index", model=tmp_path / "model", tokens=True, workers=1)
    assert not (tmp_path / "index").exists()


def test_the_model_s_own_re_ranker_fills_and_goes_on(tmp_path):
    """Without a word about it in later builds: what is stored is what it reads of the picture."""
    folder, out = photos(tmp_path / "photos", 2), tmp_path / "index"
    tiny_reranker(tmp_path / "model")
    assert build(folder, out, model=tmp_path / "model", tokens=True, workers=1, device="cpu").tokens == 2
    own = Reranker.load(tmp_path / "model", device="cpu")
    with TokenStore.open(out, identity=own.tokens_identity) as tokens:
        assert (tokens.count, tokens.bytes) == (2, 2 * own.config.bytes_per_picture)
    paint(folder / "new.png", "white")
    report = build(folder, out, workers=1, device="cpu")
    assert (report.added, report.tokens) == (1, 1)


def test_pictures_that_lack_their_tokens_are_said(tmp_path):
    """In a line of the report; the build itself skipped nothing."""
    folder, out = photos(tmp_path / "photos", 4), tmp_path / "index"
    index(folder, out)
    for path in folder.iterdir():
        path.unlink()
    report = index(folder, out, tokens=True, reranker=GridPatches())
    assert report.skipped == ()
    assert any(note.startswith("no patch tokens for 4 pictures") and "vanished" in note for note in report.notes)


def test_progress_tells_every_picture_once(tmp_path):
    """Those that are there, those that are made, and those that cannot be."""

    class Told:
        def __init__(self):
            self.parts, self.done = [], 0

        def start(self, total, *, what="", unit=""):
            self.parts.append((what, total))

        def advance(self, n, *, note=""):
            self.done += n

        def note(self, text):
            pass

    folder = photos(tmp_path / "photos", 4)
    index(folder, tmp_path / "index")
    fill(tmp_path / "index")
    for number in range(4):
        paint(folder / f"new{number}.png", (10 * number, 0, 0))
    index(folder, tmp_path / "index")
    (folder / "new3.png").unlink()
    told = Told()
    report = fill(tmp_path / "index", batch_size=2, progress=told)
    assert (report.added, report.present, len(report.skipped)) == (3, 4, 1)
    assert told.parts == [("patch tokens", 8)]
    assert told.done == 8

"""What a new model for an index promises: the same items with other rows, and no moment without a whole index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reindex_kit import (
    JoiningColors,
    JoiningEncoder,
    TurnedEncoder,
    captioned,
    make_index,
    paint,
    photos,
    shades,
)

from mmsearch.bridge_build import build_bridge, needs_bridge
from mmsearch.errors import IndexLockedError, IndexMismatchError, ModelError, UsageError
from mmsearch.exchange import export_vectors, import_vectors
from mmsearch.progress import Estimating
from mmsearch.reindex import NO_TEXT, abort, reindex
from mmsearch.reshard import split
from mmsearch.searcher import Searcher
from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.store.tokens import TOKENS_NAME
from mmsearch.testing import COLORS, ColorEncoder, GridPatches
from mmsearch.types import Modality, SkipReason, Source


def again(path: Path, encoder=None, **options):
    encoder = encoder or TurnedEncoder()
    return reindex(path, encoder=encoder, workers=1, **options), encoder


def facts(path: Path) -> dict:
    """Everything that a new model must not change, by (root, name): whole lines of items.sqlite but for the row."""
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        columns = "root, name, item, id, path, size, mtime_ns, ctime_ns, hash, state, reason, detail, width, height"
        query = f"SELECT {columns}, taken_at, note, captions, metadata, image IS NULL FROM items"
        return {line[:2]: line[2:] for line in snapshot.execute(query)}


def rows(path: Path) -> dict:
    """By (id, modality): the item's rows; fails when verify is not clean."""
    with IndexStore.open(str(path)) as store:
        assert store.verify() == []
        with store.snapshot() as snapshot:
            known = list(snapshot.items())
            return {(k.id, m): snapshot.vectors(snapshot.rows_of(k.id, m)).round(2).tolist()
                    for k in known for m in Modality}  # fmt: skip


def first_hit(path: Path, text: str, encoder=None, **options) -> str:
    with Searcher.open(path, encoder=encoder or TurnedEncoder()) as searcher:
        hit = searcher.search_text(text, k=1, **options)[0]
        return hit.caption or Path(str(hit.item.path)).stem


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of nine items and the sources it was made of. Read only."""
    folder = tmp_path_factory.mktemp("made")
    sources = captioned(folder / "photos")
    return make_index(folder / "index", sources), sources


@pytest.fixture
def index(made, tmp_path):
    """Of pictures that are there; a test that takes some away makes its own."""
    return Path(shutil.copytree(made[0], tmp_path / "index"))


def test_items_are_what_they_were_and_rows_are_those_of_the_new_model(index, made, tmp_path):
    """As if the index had been built with the new model, but with its own ids, stamps and numbers."""
    before = facts(index)
    report, _ = again(index)
    assert (report.switched, report.items, report.encoded_images, report.encoded_texts) == (True, 9, 8, 17)
    assert (report.before, report.after, report.missing, report.kept) == ("colors", "turned", (), 0)
    assert facts(index) == before
    anew = make_index(tmp_path / "anew", made[1], encoder=TurnedEncoder())
    assert rows(index) == rows(anew)
    for name in COLORS:
        assert first_hit(index, name) == name
    assert first_hit(index, "green words", to="text") in ("green words", "a green thing", "so green")


def test_the_facts_of_the_index_name_the_new_model(index):
    """Manifest, settings, preprocessing: whoever opens it next loads the right encoder. Nothing is left behind."""
    again(index)
    encoder = TurnedEncoder()
    with IndexStore.open(str(index)) as store:
        assert store.model == encoder.identity
        assert (store.preprocessing, store.settings["model"]) == (encoder.preprocessing, "turned")
        assert "limits" in store.settings
        assert "reindex" not in store.info()
    assert sorted(n for n in os.listdir(index) if not n.startswith("items")) == [
        "faiss", "lock", "manifest.json", "vectors-2.f16"]  # fmt: skip
    with pytest.raises(IndexMismatchError):
        Searcher.open(index, encoder=ColorEncoder())


def test_a_remembered_skip_stays_remembered(tmp_path):
    """What was skipped is not tried again, and is there after the switch."""
    folder = tmp_path / "photos"
    photos(folder)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    index = make_index(tmp_path / "index", [folder])
    before = facts(index)
    report, _ = again(index)
    assert report.switched
    assert facts(index) == before
    assert sum(line[7] == "skipped" for line in before.values()) == 1


def test_an_interrupted_run_keeps_what_it_encoded_and_the_old_index_answers(tmp_path):
    """Ctrl-C in the middle: old model, all hits; the next run encodes only the rest."""
    index = make_index(tmp_path / "index", [shades(tmp_path / "photos", 30)[0].parent])
    before = rows(index)
    with pytest.raises(KeyboardInterrupt):
        again(index, TurnedEncoder(stop_after=12), batch_size=4)
    assert rows(index) == before
    with IndexStore.open(str(index)) as store:
        assert store.info()["reindex"]["items"] == 12
        assert store.info()["reindex"]["model"]["name"] == "turned"
    report, encoder = again(index, batch_size=4)
    assert (report.kept, encoder.images, report.items) == (12, 18, 30)
    assert all(len(row) == 12 for found in rows(index).values() for row in found)


def test_what_changed_between_two_runs_is_caught_up_with(tmp_path):
    """New, changed, moved and removed items, and new captions: `index` works as usual in between."""
    sources = captioned(tmp_path / "photos")
    index = make_index(tmp_path / "index", sources)
    (tmp_path / "photos" / "red.png").rename(tmp_path / "aside.png")
    report, _ = again(index)
    assert not report.switched
    (tmp_path / "aside.png").rename(tmp_path / "photos" / "red.png")
    paint(tmp_path / "photos" / "blue.png", COLORS["yellow"], size=(40, 40))
    recaptioned = Source("/table.csv", "cyan", sources[4].path, None, ("now a black one",), {})
    kept = [s for s in sources if s.name not in ("cyan", "magenta")]
    new = Source("/table.csv", "extra", str(paint(tmp_path / "photos" / "extra.png", COLORS["white"])), None, (), {})
    make_index(index, [*kept, recaptioned, new])
    before = facts(index)
    report, encoder = again(index)
    # red was missing, blue is another picture, extra is new; cyan has only another caption, magenta is gone
    assert (report.switched, encoder.images, report.items) == (True, 3, 9)
    assert encoder.texts == 2 + 1, "of red and cyan: blue's captions are what they were"
    assert facts(index) == before
    anew = make_index(tmp_path / "anew", [*kept, recaptioned, new], encoder=TurnedEncoder())
    assert rows(index) == rows(anew)


def test_a_picture_that_changed_since_it_was_indexed_is_stored_as_it_is(tmp_path):
    """Row, hash and stamp go together: a later copy of the old content must not get the new content's row."""
    index = make_index(tmp_path / "index", [photos(tmp_path / "photos")[0].parent])
    red = tmp_path / "photos" / "red.png"
    old = red.read_bytes()
    paint(red, COLORS["blue"], size=(33, 33))
    again(index)
    (tmp_path / "photos" / "copy.png").write_bytes(old)
    make_index(index, [tmp_path / "photos"], encoder=TurnedEncoder())
    with Searcher.open(index, encoder=TurnedEncoder()) as searcher:
        assert [Path(h.item.path).stem for h in searcher.search_text("red", k=1)] == ["copy"]
        assert {Path(h.item.path).stem for h in searcher.search_text("blue", k=2)} == {"blue", "red"}


def test_items_that_cannot_be_encoded_refuse_the_switch_until_they_may_be_dropped(tmp_path):
    """A file that is gone and a broken one are listed with their reasons; the old index stays until it is said."""
    index = make_index(tmp_path / "index", captioned(tmp_path / "photos"))
    (tmp_path / "photos" / "red.png").unlink()
    (tmp_path / "photos" / "blue.png").write_bytes(b"broken")
    before = rows(index)
    report, _ = again(index)
    assert not report.switched
    assert {Path(s.path).stem: s.reason for s in report.missing} == {
        "red": SkipReason.VANISHED, "blue": SkipReason.NOT_AN_IMAGE}  # fmt: skip
    assert rows(index) == before
    report, encoder = again(index, drop_missing=True)
    assert (report.switched, report.items, encoder.images, len(report.missing)) == (True, 7, 0, 2)
    assert len(rows(index)) == 2 * 7
    assert first_hit(index, "red") != "red"


def test_vectors_without_a_picture_are_listed(tmp_path):
    """An imported row has nothing that could be encoded."""
    index = make_index(tmp_path / "index", [photos(tmp_path / "photos")[0].parent])
    row = ColorEncoder().encode_texts(["red"])[0]
    with IndexStore.open(str(index), write=True) as store:
        store.commit(Batch(upserts=[Upsert(Source("/import", "r1", None, None), image_vector=row)]))
    report, _ = again(index)
    assert [(s.path, s.reason) for s in report.missing] == [("/import: r1", SkipReason.VANISHED)]
    assert again(index, drop_missing=True)[0].items == 8


def test_an_item_without_a_picture_s_row_does_not_get_one(tmp_path):
    """An imported text may name a picture that never had a row: only its text is encoded."""
    index = make_index(tmp_path / "index", [photos(tmp_path / "photos")[0].parent])
    text = Source("/import", "t1", str(tmp_path / "photos" / "red.png"), None, ("a red text",))
    with IndexStore.open(str(index), write=True) as store:
        store.commit(Batch(upserts=[Upsert(text, text_vectors=ColorEncoder().encode_texts(text.captions))]))
    report, encoder = again(index)
    assert (report.switched, encoder.images, encoder.texts) == (True, 8, 1)
    assert first_hit(index, "red", to="text") == "a red text"


def test_a_layout_that_does_not_fit_the_new_rows_costs_speed_only(index):
    """A kind chosen for 8 axes may not divide 12: searches scan the rows, and a note says why."""
    with IndexStore.open(str(index), write=True) as store:
        store.note_settings({**store.settings, "index": {"kind": "IVF4,PQ8"}})
    report, _ = again(index)
    assert report.switched
    assert any("searches scan all rows" in note for note in report.notes)
    assert first_hit(index, "red") == "red"


def test_another_model_does_not_go_on_with_what_one_began(index):
    """Two half-done models in one index would be mixed up; giving the first up makes room."""
    with pytest.raises(KeyboardInterrupt):
        again(index, TurnedEncoder(stop_after=4), batch_size=4)
    with pytest.raises(IndexMismatchError, match="turned"):
        again(index, TurnedEncoder(name="third"))
    assert abort(index)
    assert not abort(index)
    assert not (index / "reindex").exists()
    assert again(index, TurnedEncoder(name="third"))[0].switched


def test_the_same_model_again_changes_nothing(index):
    """Also after a run that was killed between the switch and the derived files."""
    again(index)
    before = facts(index), rows(index)
    report, encoder = again(index)
    assert (report.switched, encoder.images) == (True, 0)
    assert any("already" in note for note in report.notes)
    assert (facts(index), rows(index)) == before


def test_a_second_writer_is_told_who_writes(index):
    """The lock is held for the whole run; readers are not kept waiting."""

    class Nosy(TurnedEncoder):
        def encode_pixels(self, pixels, **options):
            with pytest.raises(IndexLockedError):
                IndexStore.open(str(index), write=True)
            assert first_hit(index, "red", ColorEncoder()) == "red"
            return super().encode_pixels(pixels, **options)

    assert again(index, Nosy())[0].switched


def test_fused_item_vectors_stay_fused(tmp_path):
    """An item's row is made of picture and captions by the new model, or the model is refused before any work."""
    sources = captioned(tmp_path / "photos")
    index = make_index(tmp_path / "index", sources, encoder=JoiningColors(), item_vectors="fused")
    with pytest.raises(ModelError):
        again(index)
    assert not (index / "reindex").exists()
    report, _ = again(index, JoiningEncoder())
    assert (report.switched, report.items) == (True, 9)
    anew = make_index(tmp_path / "anew", sources, encoder=JoiningEncoder(), item_vectors="fused")
    assert rows(index) == rows(anew)
    with IndexStore.open(str(index)) as store:
        assert store.settings["item_vectors"] == "fused"


def test_patch_tokens_are_made_anew_or_dropped(index):
    """They belong to the old model: a new re-ranker makes its own, without one they go and a note says so."""
    with IndexStore.open(str(index), write=True) as store:
        store.note_settings({**store.settings, "tokens": True})
    report, _ = again(index, reranker=GridPatches(size=24))
    assert report.tokens == 8
    assert (index / TOKENS_NAME).exists()
    report, _ = again(index, TurnedEncoder(name="third"))
    assert any("patch tokens were dropped" in note for note in report.notes)
    assert not (index / TOKENS_NAME).exists()
    with IndexStore.open(str(index)) as store:
        assert "tokens" not in store.settings


def test_minutes_are_estimated_early_and_then_seldom():
    """A job of hours says so after ten seconds, and again every ten minutes."""
    now, said = [0.0], []

    class Told:
        def start(self, total, *, what="", unit=""):
            pass

        def advance(self, n, *, note=""):
            pass

        def note(self, text):
            said.append(text)

    estimating = Estimating(Told(), clock=lambda: now[0])
    estimating.start(100_000)
    for _ in range(700):
        now[0] += 1.0
        estimating.advance(10)
    assert said == [
        "100 of 100,000 items, 10.0 a second: about 166 minutes left",
        "6,100 of 100,000 items, 10.0 a second: about 156 minutes left",
    ]
    estimating = Estimating(Told(), item_bytes=1000, clock=lambda: now[0])
    estimating.start(100_000)
    now[0] += 20.0
    estimating.advance(1000)
    assert said[-1].endswith("33 minutes left, 100 MB in the end")


DRIVER = """
import sys
sys.path.insert(0, sys.argv[2])
from mmsearch import ingest
from mmsearch.reindex import reindex
from reindex_kit import TurnedEncoder

class Slow(TurnedEncoder):
    def encode_pixels(self, pixels, **options):
        import time
        print("batch", flush=True)
        time.sleep(0.01)
        return super().encode_pixels(pixels, **options)

ingest.COMMIT_ROWS = 8
reindex(sys.argv[1], encoder=Slow(), batch_size=4, workers=1)
"""


def test_sigkill_at_any_moment_leaves_the_old_or_the_new_index(tmp_path):
    """Killed again and again, the same command gets there in the end; every time the index is whole."""
    index = make_index(tmp_path / "index", [shades(tmp_path / "photos", 64)[0].parent])
    command = [sys.executable, "-c", DRIVER, str(index), str(Path(__file__).parent)]
    kills, sizes = 0, set()
    for batches in (1, 5, 4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(batches):
            process.stdout.readline()
        kills += process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        sizes.add({len(row) for found in rows(index).values() for row in found}.pop())
    assert kills == 3
    assert sizes == {8}
    report, encoder = again(index)
    assert report.kept > 8
    assert encoder.images == 64 - report.kept
    assert {len(row) for found in rows(index).values() for row in found} == {12}


def test_texts_that_nobody_kept_are_listed_and_never_made_of_their_ids(tmp_path):
    """Vectors of texts alone have their ids for captions: what a new model makes of "0" is not what the text was."""
    index, vectors = make_index(tmp_path / "index", photos(tmp_path / "photos")), tmp_path / "x.npy"
    np.save(vectors, ColorEncoder().encode_texts(["red", "blue"]))
    import_vectors(vectors, index, encoder=ColorEncoder(), modality="text")
    report, encoder = again(index)
    assert [(one.path.rpartition(": ")[2], one.detail) for one in report.missing] == [("0", NO_TEXT), ("1", NO_TEXT)]
    assert (report.switched, encoder.texts) == (False, 0)
    assert first_hit(index, "blue", ColorEncoder(), to="text") == "1"


def test_the_model_that_an_index_has_leaves_its_patch_tokens(index):
    """They were not made by that model perhaps, and nothing was switched that they would no longer fit."""
    with IndexStore.open(str(index), write=True) as store:
        store.note_settings({**store.settings, "tokens": True})
    again(index, reranker=GridPatches(size=24))
    again(index)
    assert (index / TOKENS_NAME).exists()


def test_whole_jobs_on_one_index_say_so_for_a_folder_of_shards(index, tmp_path):
    """What takes one index names the way out, instead of saying that there is none."""
    split(index, tmp_path / "parts", shards=2)
    for job in (
        lambda: again(tmp_path / "parts"),
        lambda: needs_bridge(tmp_path / "parts", TurnedEncoder()),
        lambda: build_bridge(tmp_path / "parts", encoder=TurnedEncoder()),
        lambda: export_vectors(tmp_path / "parts", tmp_path / "out", format="npy"),
        lambda: split(tmp_path / "parts", tmp_path / "out", shards=3),
    ):
        with pytest.raises(UsageError, match=r"a folder of 2 shards.*each shard"):
            job()

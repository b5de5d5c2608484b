"""What a search promises: the right things, best first, and only what is there."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.builder import build
from mmsearch.errors import IndexMismatchError, IndexNotFoundError, UsageError
from mmsearch.searcher import Searcher, View, find_index
from mmsearch.similarity import normalise
from mmsearch.store import IndexStore
from mmsearch.testing import COLORS, ColorEncoder
from mmsearch.types import Modality


@pytest.fixture
def index(tmp_path: Path) -> Path:
    for name, colour in COLORS.items():
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(path)
    (tmp_path / "photos" / "red.txt").write_text("a blue word\n")
    (tmp_path / "photos" / "green.txt").write_text("green grass\nblue sky\n")
    build([tmp_path / "photos"], tmp_path / "index", encoder=ColorEncoder(), workers=1)
    return tmp_path / "index"


@pytest.fixture
def searcher(index: Path):
    with Searcher.open(index, encoder=ColorEncoder()) as opened:
        yield opened


def names(hits) -> list[str]:
    return [Path(str(hit.item.path)).stem for hit in hits]


def test_hits_come_best_first_with_ranks_from_one(searcher):
    """Scores fall, ranks count from 1, the named colour is first."""
    hits = searcher.search_text("blue", k=8)
    assert names(hits)[0] == "blue" and len(hits) == 8
    assert [hit.rank for hit in hits] == list(range(1, 9))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.modality is Modality.IMAGE and hit.caption is None for hit in hits)


def test_scores_are_cosines(searcher):
    """The score of a hit is the cosine of query and stored row, to half precision."""
    encoder = ColorEncoder()
    query = encoder.encode_texts(["red"])[0]
    for hit in searcher.search_text("red", k=8):
        with Image.open(str(hit.item.path)) as image:
            assert hit.score == pytest.approx(float(query @ encoder.encode_images([image])[0]), abs=2e-3)


def test_k_beyond_the_collection_gives_all(searcher):
    """k larger than the index is not an error."""
    assert len(searcher.search_text("red", k=500)) == len(COLORS)


@pytest.mark.parametrize("k", [0, -1, 10**9])
def test_k_outside_its_range_is_refused(searcher, k):
    """k below 1 and absurd k are usage errors."""
    with pytest.raises(UsageError):
        searcher.search_text("red", k=k)


@pytest.mark.parametrize("text", ["", "   ", "\n", None, 3, ["red"]])
def test_an_empty_query_is_refused(searcher, text):
    """Nothing cannot be looked for, nor what a service made of a request without a text."""
    with pytest.raises(UsageError):
        searcher.search_text(text)


@pytest.mark.parametrize("text", ["the of and", "😀", "мир", "a\0b", "x" * 100_000])
def test_odd_queries_have_defined_answers(searcher, text):
    """Stop words, emoji, unknown scripts, NUL and very long texts answer like any other."""
    assert len(searcher.search_text(text, k=3)) == 3


def test_a_long_query_says_that_it_was_cut(searcher):
    """More words than the model reads: a note, not silence."""
    assert "longer than" in searcher.search_text("red " * 50).notes[0]


def test_a_threshold_keeps_only_what_reaches_it(searcher):
    """Nothing below the threshold is shown, everything above is."""
    every = searcher.search_text("red", k=8)
    bar = every[2].score
    assert names(searcher.search_text("red", k=8, threshold=bar)) == names(h for h in every if h.score >= bar)
    assert len(searcher.search_text("red", k=8, threshold=1.0)) == 0 or every[0].score == 1.0


def test_a_deleted_file_is_never_shown(searcher, index):
    """Files that are gone are left out, the next ones move up, and the notes say so."""
    photos = index.parent / "photos"
    before = names(searcher.search_text("red", k=8))
    (photos / "red.png").unlink()
    (photos / f"{before[1]}.png").unlink()
    hits = searcher.search_text("red", k=3)
    assert names(hits) == before[2:5]
    assert hits.notes == ("2 better or equal hits are not shown: their files are gone",)


def test_image_to_image_finds_itself_first(searcher, index):
    """A stored picture is its own nearest neighbour, given as path, pixels or PIL image."""
    path = index.parent / "photos" / "yellow.png"
    with Image.open(path) as image:
        for query in (path, image, np.asarray(image)):
            hit = searcher.search_image(query, k=1)[0]
            assert names([hit]) == ["yellow"] and hit.score == pytest.approx(1.0, abs=2e-3)


def test_image_to_text_finds_captions(searcher, index):
    """--to text searches captions and says which caption it was."""
    hits = searcher.search_image(index.parent / "photos" / "green.png", k=1, to="text")
    assert (hits[0].caption, hits[0].modality) == ("green grass", Modality.TEXT)


def test_any_merges_pictures_and_captions_by_item(searcher):
    """Each item once, found by what fits best."""
    hits = searcher.search_text("blue", k=3, to="any")
    assert len({hit.item.id for hit in hits}) == 3
    assert set(names(hits[:2])) == {"blue", "green"}  # the blue picture; the caption "blue sky"
    with pytest.raises(UsageError):
        searcher.search_text("blue", to="sound")


def test_a_vector_that_nobody_normalised_is_refused(searcher):
    """Inner products that only look like cosines never get in."""
    with pytest.raises(UsageError, match="norm"):
        searcher.search_vector(np.ones(8, np.float32))
    assert len(searcher.search_vector(normalise(np.ones((1, 8))), k=2)) == 2


def test_threads_get_the_answers_one_thread_gets(searcher):
    """One searcher serves many threads at once."""
    expected = {name: names(searcher.search_text(name, k=4)) for name in COLORS}
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            if names(searcher.search_text(name, k=4)) != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in COLORS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_reader_keeps_its_generation_until_it_asks(searcher, index):
    """A build does not change an open searcher; refresh does."""
    photos = index.parent / "photos"
    Image.new("RGB", (9, 9), (250, 0, 0)).save(photos / "red2.png")
    build([photos], index, encoder=ColorEncoder(), workers=1)
    assert len(searcher.search_text("red", k=20)) == len(COLORS)
    searcher.refresh()
    assert len(searcher.search_text("red", k=20)) == len(COLORS) + 1


def test_refresh_never_disturbs_a_search_that_is_under_way(searcher, index):
    """Searches run in other threads while generations change below them; a closed searcher says so."""
    photos, failures = index.parent / "photos", []

    def ask() -> None:
        for _ in range(60):
            try:
                assert names(searcher.search_text("green", k=1)) == ["green"]
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(3):
        Image.new("RGB", (9, 9), (10 * i, 0, 0)).save(photos / f"more{i}.png")
        build([photos], index, encoder=ColorEncoder(), workers=1)
        searcher.refresh()
    for thread in threads:
        thread.join()
    assert not failures
    searcher.close()
    with pytest.raises(UsageError, match="closed"):
        searcher.search_text("red")


def test_another_models_encoder_is_refused(index):
    """Rows of two models are never compared."""
    with pytest.raises(IndexMismatchError):
        Searcher.open(index, encoder=ColorEncoder(name="other"))


def test_find_index_takes_the_most_recently_updated(index, tmp_path):
    """Without a name, the newest index below the folder; none is an error that says what to do."""
    build([tmp_path / "photos"], tmp_path / "later", encoder=ColorEncoder(), workers=1)
    assert find_index(tmp_path) == tmp_path / "later"
    (tmp_path / "bare").mkdir()
    with pytest.raises(IndexNotFoundError, match="mmsearch index"):
        find_index(tmp_path / "bare")


def test_refresh_refuses_an_index_that_was_rebuilt_for_another_model(searcher, index):
    """The old encoder must not ask the new vectors."""
    build([index.parent / "photos"], index, encoder=ColorEncoder(name="other"), workers=1, force=True)
    with pytest.raises(IndexMismatchError, match="other"):
        searcher.refresh()


def test_a_home_that_cannot_be_listed_holds_no_index(tmp_path):
    """One line, not a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexNotFoundError):
        find_index(tmp_path / "file")


def test_a_generation_closes_after_its_last_search(index):
    """Retired while a search is inside: the search ends well, and only then the files are let go."""
    query = ColorEncoder().encode_texts(["red"])
    with IndexStore.open(str(index)) as store:
        view = View(store.snapshot())
        view.enter()
        view.retire()
        assert len(view.ranked(query, Modality.IMAGE, 3, threshold=None)[0]) == 3
        view.leave()
        with pytest.raises(UsageError):
            view.snapshot.locate([0])
        with pytest.raises(UsageError, match="closed"):
            view.enter()

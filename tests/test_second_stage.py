"""What re-ranking promises: words and pictures read together decide, and what is not known is said."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.builder import build
from mmsearch.errors import ModelError, UsageError
from mmsearch.evidence import Question
from mmsearch.rerank.request import Rerank, depth_of
from mmsearch.rerank.tokens import dequantise
from mmsearch.searcher import Searcher
from mmsearch.second_stage import NOTHING, SecondStage
from mmsearch.store import IndexStore
from mmsearch.store.tokens import TokenStore
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker
from mmsearch.types import Hit, Item, Modality
from mmsearch.where import parse_condition

PAIRS = tuple(itertools.combinations(COLORS, 2))
HARD = (("white", "black"), ("red", "cyan"), ("green", "magenta"), ("blue", "yellow"), ("red", "blue"))
"""Pictures that the first stage does not put first."""


def halves(left: str, right: str) -> Image.Image:
    """A picture of two colours, whose mean is neither."""
    image = Image.new("RGB", (20, 20), COLORS[left])
    image.paste(COLORS[right], (10, 0, 20, 20))
    return image


def photos(folder: Path, *pairs: tuple[str, str]) -> Path:
    for left, right in pairs or PAIRS:
        path = folder / "photos" / f"{left}-{right}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        halves(left, right).save(path)
    return folder / "photos"


def indexed(folder: Path, *, tokens: bool = True, **options) -> Path:
    build(
        [folder / "photos"], folder / "index", encoder=ColorEncoder(), workers=1, tokens=tokens,
        reranker=ColorReranker(), **options,
    )  # fmt: skip
    return folder / "index"


def opened(index: Path, reranker: ColorReranker | None = None) -> Searcher:
    return Searcher.open(index, encoder=ColorEncoder(), reranker=reranker or ColorReranker())


def names(hits) -> list[str]:
    return [Path(hit.item.path).stem if hit.item.path else str(hit.caption) for hit in hits]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Pictures of two colours with stored tokens; two have captions."""
    folder = tmp_path_factory.mktemp("stored")
    photos(folder)
    (folder / "photos" / "red-green.txt").write_text("red and green\n")
    (folder / "photos" / "cyan-black.txt").write_text("yellow words\nblack words\n")
    return indexed(folder)


@pytest.mark.parametrize("pair", HARD, ids="-".join)
def test_two_colours_are_found_that_a_mean_colour_hides(stored, pair):
    """The right picture is first after re-ranking, read from its tokens without opening any file."""
    reranker = ColorReranker()
    with opened(stored, reranker) as searcher:
        assert names(searcher.search_text(f"{pair[0]} and {pair[1]}", k=1)) != ["-".join(pair)]
        hits = searcher.search_text(f"{pair[0]} and {pair[1]}", k=3, rerank=64)
    assert names(hits)[0] == "-".join(pair)
    assert reranker.read == 0


def test_scores_of_a_re_ranked_list_are_falling_probabilities_with_their_parts(stored):
    """One scale from top to bottom; the parts add up to the log-odds."""
    with opened(stored) as searcher:
        hits = searcher.search_text("red and blue", k=28, rerank=28)
    assert [hit.rank for hit in hits] == list(range(1, 29))
    assert all(hit.score == hit.probability and 0 < hit.score < 1 for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert {"cosine", "logit", "log_odds"} <= set(hit.parts)
        given = sum(value for name, value in hit.parts.items() if name.startswith("from_"))
        assert given == pytest.approx(hit.parts["log_odds"])


def test_only_the_depth_competes_and_it_grows_to_the_hits_asked_for(stored):
    """The right picture outside the depth stays outside; k hits are always of one kind."""
    with opened(stored) as searcher:
        first = names(searcher.search_text("white and black", k=28))
        place = first.index("white-black")
        assert place > 3  # else this test says nothing
        shallow = searcher.search_text("white and black", k=3, rerank=3)
        assert set(names(shallow)) == set(first[:3])
        deep = searcher.search_text("white and black", k=place + 1, rerank=3)
        assert names(deep)[0] == "white-black"
        assert all(hit.probability is not None for hit in deep)


def test_no_depth_is_the_first_stage(stored):
    """0 and off change nothing, not even how a hit looks."""
    with opened(stored) as searcher:
        plain = searcher.search_text("red and blue", k=9)
        for wish in (0, "off", Rerank(0)):
            assert list(searcher.search_text("red and blue", k=9, rerank=wish)) == list(plain)
        assert all(hit.probability is None and not hit.parts for hit in plain)


def test_what_is_filtered_is_re_ranked(tmp_path):
    """Conditions on metadata choose who competes, of several indexes too; for a cut-off nobody else is there."""
    wide = photos(tmp_path, ("red", "blue"), ("white", "black"), ("green", "black"))
    for name, year in (("red-blue", 1999), ("white-black", 2021), ("green-black", 2022)):
        (wide / f"{name}.json").write_text(json.dumps({"year": year}))
    index = indexed(tmp_path)
    recent = (parse_condition("year>=2020"),)
    with opened(index) as one, opened([index, index]) as several:
        for searcher in (one, several):
            assert names(searcher.search_text("red and blue", k=1, rerank=8)) == ["red-blue"]
            hits = searcher.search_text("white and black", k=5, rerank="auto", where=recent)
            assert names(hits) == ["white-black", "green-black"] and hits[0].probability > 0.9
            none = searcher.search_text("red and blue", rerank=Rerank(cut="auto"), where=recent)
            assert (len(none), none.notes) == (0, (NOTHING,))
            alike = searcher.search_image(halves("red", "blue"), k=5, where=recent)
            assert set(names(alike)) == {"white-black", "green-black"}
            assert not searcher.search_text("red", rerank=8, where=(parse_condition("year>=2030"),))
            made = (parse_condition(one) for one in ["year<=2000"])  # used up by whoever looks first
            assert names(searcher.search_text("red", k=3, to="any", where=made)) == ["red-blue"]
            for wrong in ("year>=2020", parse_condition("year>=2020"), ["year>=2020"]):
                with pytest.raises(UsageError, match="a tuple of conditions"):
                    searcher.search_text("red", where=wrong)


def test_without_tokens_a_named_depth_reads_the_files_and_auto_reads_none(tmp_path):
    """The same answers, only slower; "auto" is the first stage there."""
    photos(tmp_path)
    index = indexed(tmp_path, tokens=False)
    reranker = ColorReranker()
    with opened(index, reranker) as searcher:
        auto = searcher.search_text("red and blue", k=5, rerank="auto")
        assert list(auto) == list(searcher.search_text("red and blue", k=5))
        assert reranker.read == 0
        hits = searcher.search_text("red and blue", k=5, rerank=28)
        assert names(hits)[0] == "red-blue"
        assert reranker.read == 28


def test_auto_re_ranks_where_the_tokens_are(stored):
    """As --rerank 64 would, opening no picture."""
    reranker = ColorReranker()
    with opened(stored, reranker) as searcher:
        auto = searcher.search_text("red and blue", k=5, rerank="auto")
        assert list(auto) == list(searcher.search_text("red and blue", k=5, rerank=64))
    assert auto[0].probability is not None and reranker.read == 0


@pytest.mark.parametrize(("kept", "re_ranked"), [(26, True), (25, False)])
def test_auto_wants_nine_tenths_of_the_tokens(tmp_path, kept, re_ranked):
    """26 of 28 are enough, 25 are not; nothing is decoded either way."""
    photos(tmp_path)
    index, reranker = indexed(tmp_path), ColorReranker()
    with IndexStore.open(str(index)) as store, store.snapshot() as snapshot:
        hashes = [digest for digest, _ in snapshot.pictures()]
    with TokenStore.open(index, identity=reranker.tokens_identity, write=True) as tokens:
        tokens.prune(hashes[:kept])
    with opened(index, reranker) as searcher:
        hits = searcher.search_text("red and blue", k=28, rerank="auto")
    assert (hits[0].probability is not None) is re_ranked
    assert reranker.read == 0


def test_stored_and_decoded_tokens_give_the_same_scores(stored, tmp_path):
    """The cache changes the time, not the answer."""
    photos(tmp_path)
    (tmp_path / "photos" / "red-green.txt").write_text("red and green\n")
    (tmp_path / "photos" / "cyan-black.txt").write_text("yellow words\nblack words\n")
    with opened(stored) as cached, opened(indexed(tmp_path, tokens=False)) as bare:
        one, two = (one.search_text("red and green", k=28, rerank=28) for one in (cached, bare))
    assert names(one) == names(two)
    assert [hit.score for hit in one] == pytest.approx([hit.score for hit in two], abs=1e-9)


class Aligned(ColorReranker):
    """Says how well each picture's row fits its patches."""

    def logits(self, words, text_rows, patches, image_rows, *, pairs, batch_size=64):
        means = dequantise(patches).mean(axis=1) * 255  # (n, p, 3) -> (n, 3)
        own = ColorEncoder().encode_images([np.tile(mean, (2, 2, 1)) for mean in means])
        return np.einsum("nd,nd->n", own, image_rows)[pairs[:, 1]].astype(np.float32)


def test_every_picture_keeps_its_own_row_where_some_tokens_are_stored_and_some_are_not(tmp_path):
    """Stored and decoded ones are read in two goes; no picture is taken for another."""
    photos(tmp_path)
    index, reranker = indexed(tmp_path), Aligned()
    with IndexStore.open(str(index)) as store, store.snapshot() as snapshot:
        hashes = [digest for digest, _ in snapshot.pictures()]
    with TokenStore.open(index, identity=reranker.tokens_identity, write=True) as tokens:
        tokens.prune(hashes[::2])
    with opened(index, reranker) as searcher:
        hits = searcher.search_text("red", k=28, rerank=28)
    assert reranker.read == 14
    assert all(hit.parts["logit"] == pytest.approx(1.0, abs=0.01) for hit in hits)


def test_a_picture_that_cannot_be_read_keeps_its_cosine_and_is_counted(tmp_path):
    """It stays in the list, judged by the first stage's evidence; a note says so."""
    photos(tmp_path)
    index = indexed(tmp_path, tokens=False)
    (tmp_path / "photos" / "red-blue.png").write_bytes(b"no picture any more")
    with opened(index) as searcher:
        hits = searcher.search_text("red and blue", k=28, rerank=28)
    broken = next(hit for hit in hits if names([hit]) == ["red-blue"])
    assert "logit" not in broken.parts and broken.probability is not None
    assert "1 picture could not be read" in hits.notes[0]


def test_items_are_judged_by_what_they_have(stored):
    """A picture alone, and a picture with captions: the best caption is a part of its own."""
    with opened(stored) as searcher:
        parts = {names([hit])[0]: hit.parts for hit in searcher.search_text("black", k=28, rerank=28)}
    assert "text_cosine" not in parts["red-blue"]
    assert parts["cyan-black"]["text_cosine"] == pytest.approx(1.0, abs=2e-3)  # "black words", not "yellow words"


def test_captions_alone_are_judged_as_texts(tmp_path):
    """`to="any"`: an item without a picture competes with pictures, by log-odds and not by ranks."""
    photos(tmp_path, ("red", "blue"), ("cyan", "black"))
    table = tmp_path / "t.jsonl"
    table.write_text('{"caption": "red things"}\n{"caption": "yellow things"}\n')
    build(
        [tmp_path / "photos", table], tmp_path / "index", encoder=ColorEncoder(), workers=1,
        tokens=True, reranker=ColorReranker(),
    )  # fmt: skip
    with opened(tmp_path / "index") as searcher:
        hits = searcher.search_text("yellow", k=4, to="any", rerank=64)
        assert names(hits)[0] == "yellow things"
        assert set(hits[0].parts) == {"text_cosine", "from_bias", "from_text_cosine", "from_calibration", "log_odds"}
        assert all(hit.probability < 0.5 for hit in hits[1:])
        assert names(searcher.search_text("red and blue", k=4, to="any", rerank=64))[0] == "red-blue"


def test_captions_are_re_ranked_for_a_picture(stored, tmp_path):
    """Words and the query picture are read together; pictures of two colours find the caption that names both."""
    reranker = ColorReranker()
    with opened(stored, reranker) as searcher:
        hits = searcher.search_image(halves("red", "green"), k=3, to="text", rerank=64)
        assert (hits[0].caption, hits[0].modality) == ("red and green", Modality.TEXT)
        assert hits[0].parts["logit"] > 7 > -7 > hits[1].parts["logit"]
    assert reranker.read == 1  # the query picture


def test_pictures_like_a_picture_are_left_as_they_are(stored):
    """There are no words to read; said where re-ranking was named, silent with "auto"."""
    with opened(stored) as searcher:
        plain = searcher.search_image(halves("red", "green"), k=4)
        named = searcher.search_image(halves("red", "green"), k=4, rerank=64)
        assert list(named) == list(plain) == list(searcher.search_image(halves("red", "green"), k=4, rerank="auto"))
        assert "no words" in named.notes[0]
        with pytest.raises(UsageError, match="no words"):
            searcher.search_image(halves("red", "green"), rerank=Rerank(64, min_probability=0.5))


def test_captions_for_a_picture_need_no_stored_tokens(tmp_path):
    """The picture is the query: "auto" re-ranks them without the tokens of any other."""
    folder = photos(tmp_path, ("red", "green"), ("cyan", "black"))
    (folder / "red-green.txt").write_text("red and green\n")
    (folder / "cyan-black.txt").write_text("yellow words\n")
    with opened(indexed(tmp_path, tokens=False)) as searcher:
        hits = searcher.search_image(halves("red", "green"), k=2, to="text", rerank="auto")
        assert hits[0].caption == "red and green" and hits[0].probability is not None
        strict = Rerank(min_probability=0.5)
        assert [h.caption for h in searcher.search_image(halves("red", "green"), to="text", rerank=strict)] == [
            "red and green"
        ]
        texts = searcher.search_text("yellow", to="text", rerank=strict)
        assert [hit.caption for hit in texts] == ["yellow words"]


def test_a_fusion_that_reads_no_tokens_needs_none_stored(tmp_path):
    """`mmsearch index --tokens` has nothing to keep for it, so "auto" must not ask for that."""
    photos(tmp_path, ("red", "blue"), ("green", "black"))
    reranker = ColorReranker()
    reranker.reads_tokens = False
    reranker.logits = lambda words, texts, patches, rows, *, pairs, batch_size=64: (
        8.0 * (texts @ rows.T)[0][pairs[:, 1]].astype(np.float32)
    )
    with opened(indexed(tmp_path, tokens=False), reranker) as searcher:
        assert searcher.search_text("red", k=1, rerank="auto")[0].probability is not None
        assert searcher.search_text("red", k=1, rerank=Rerank(min_probability=0.01))
    assert reranker.read == 0


def test_what_to_do_instead_fits_the_case(stored):
    """Storing tokens helps nobody who asks for pictures like a picture."""
    wish = Rerank(64, cut="auto")
    with opened(stored) as searcher, pytest.raises(UsageError, match=r"--to text\.") as raised:
        searcher.search_image(halves("red", "green"), rerank=wish)
    assert "tokens" not in str(raised.value)


def test_a_budget_does_not_count_what_is_loaded_once(stored):
    """A first query reads as many as the next: graphs and banks are there before the clock starts."""
    calls = []

    class Lazy(ColorReranker):
        def logits(self, *args, pairs, **options):
            calls.append(len(pairs))
            return super().logits(*args, pairs=pairs, **options)

    with opened(stored, Lazy()) as searcher:
        for _ in range(2):
            assert len(searcher.search_text("red", k=3, rerank=Rerank(8, budget_ms=10_000.0))) == 3
        for _ in range(2):
            searcher.search_image(halves("red", "green"), k=3, to="text", rerank=Rerank(3, budget_ms=10_000.0))
    assert calls == [2, 8, 8, 2, 3, 3]  # two pairs of nothing, then both queries, either way


def test_texts_for_a_text_keep_their_order_and_get_probabilities(stored):
    """Nothing is read together, but a cosine can be calibrated; "auto" leaves them alone."""
    with opened(stored) as searcher:
        plain = searcher.search_text("yellow", k=3, to="text")
        hits = searcher.search_text("yellow", k=3, to="text", rerank=64)
        assert [hit.caption for hit in hits] == [hit.caption for hit in plain]
        assert hits[0].probability > 0.9 > 0.5 > hits[1].probability
        assert list(searcher.search_text("yellow", k=3, to="text", rerank="auto")) == list(plain)


def test_a_query_that_matches_nothing_returns_nothing_and_says_so(tmp_path):
    """`cut`: two colours that no picture has together; what is there is still found."""
    photos(tmp_path, *(pair for pair in PAIRS if pair != ("red", "blue")))
    with opened(indexed(tmp_path)) as searcher:
        none = searcher.search_text("red and blue", rerank=Rerank(64, cut="auto"))
        assert (len(none), none.notes) == (0, (NOTHING,))
        some = searcher.search_text("red and green", rerank=Rerank(cut="auto"))
        assert names(some) == ["red-green"]


def test_a_least_probability_drops_what_is_below(stored):
    """All above stay, in order; a note where none is."""
    with opened(stored) as searcher:
        every = searcher.search_text("red", k=28, rerank=28)
        hits = searcher.search_text("red", k=28, rerank=Rerank(28, min_probability=0.9))
        assert names(hits) == names(hit for hit in every if hit.probability >= 0.9)
        assert 0 < len(hits) < len(every)
        none = searcher.search_text("dog", rerank=Rerank(28, min_probability=0.9))
        assert not len(none) and "0.9" in none.notes[0]


def test_conditions_on_probabilities_need_them(tmp_path):
    """Without tokens "auto" knows none: an error that says what helps; so does a depth of 0."""
    photos(tmp_path, ("red", "blue"))
    with opened(indexed(tmp_path, tokens=False)) as searcher:
        for wish in (Rerank(cut="auto"), Rerank(min_probability=0.5)):
            with pytest.raises(UsageError, match=r"index --tokens.*--rerank 64"):
                searcher.search_text("red", rerank=wish)
        assert len(searcher.search_text("red", rerank=Rerank(1, min_probability=0.5))) == 1
    with pytest.raises(UsageError, match="off"):
        Rerank(0, cut="auto")


def test_a_re_ranker_without_a_cut_off_says_so(stored):
    """Not silently all or nothing."""
    with opened(stored, ColorReranker(cutoff=False)) as searcher, pytest.raises(ModelError, match="cut-off"):
        searcher.search_text("red", rerank=Rerank(8, cut="auto"))


@pytest.mark.parametrize(
    "wish", [-1, 1001, True, "all", "1.5", "-3", "", 2.0, {"min_probability": 0.0}, {"min_probability": 1.1},
             {"min_probability": float("nan")}, {"cut": "hard"}, {"budget_ms": 0.0}, {"budget_ms": float("nan")}],
)  # fmt: skip
def test_wishes_that_mean_nothing_are_refused(stored, wish):
    """Depths, probabilities and budgets outside their range, before anything is loaded."""
    with opened(stored) as searcher, pytest.raises(UsageError):
        searcher.search_text("red", rerank=Rerank(64, **wish) if isinstance(wish, dict) else wish)


def test_depths_in_words(stored):
    """As the command line writes them."""
    assert [depth_of(words) for words in ("auto", "off", "0", "64")] == ["auto", 0, 0, 64]
    with opened(stored) as searcher, pytest.raises(UsageError, match="1 to 1000"):
        searcher.search_text("red", k=1001, rerank=64)


class Slow(ColorReranker):
    """Takes a second a candidate, by a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.judged = 0.0, 0

    def logits(self, *args, pairs, **options):
        self.now += len(pairs)
        self.judged += len(pairs)
        return super().logits(*args, pairs=pairs, **options)


@pytest.mark.parametrize(
    ("budget_s", "k", "read"), [(20, 1, 20), (20.9, 1, 20), (1000, 1, 28), (8, 1, 8), (0.001, 1, 8), (0.001, 12, 12)]
)
def test_a_budget_reads_as_many_as_fit_and_at_least_the_hits(stored, budget_s, k, read):
    """A second each: 8 are tried, the rest follows at their pace; never fewer than 8 or than are shown."""
    slow = Slow()
    with IndexStore.open(str(stored)) as store, store.snapshot() as snapshot, opened(stored) as searcher:
        hits = list(searcher.search_text("red", k=28))
        stage = SecondStage(slow, ColorEncoder(), None, clock=lambda: slow.now)
        found = stage.reorder(
            Question(ColorEncoder().encode_texts(["red"]), "red"), hits,
            snapshot=snapshot, to="image", k=k, asked=Rerank(28, budget_ms=1000 * budget_s),
        )  # fmt: skip
    assert found is not None and slow.judged == read
    assert len(found.hits) == k
    assert bool(found.notes) is (read < 28)


def test_candidates_that_no_case_covers_come_last_and_a_note_says_so(tmp_path):
    """A scoring that knows pictures only leaves captions to their cosine."""
    reranker = ColorReranker()
    reranker.scoring = replace(reranker.scoring, cases={"picture": reranker.scoring.cases["picture"]})
    photos(tmp_path, ("red", "blue"))
    (tmp_path / "t.jsonl").write_text('{"caption": "red things"}\n')
    build([tmp_path / "photos", tmp_path / "t.jsonl"], tmp_path / "index", encoder=ColorEncoder(), workers=1)
    with opened(tmp_path / "index", reranker) as searcher:
        hits = searcher.search_text("red", k=2, to="any", rerank=8)
    assert names(hits) == ["red-blue", "red things"]
    assert hits[1].probability is None and "come last" in hits.notes[0]


def test_ties_keep_the_order_of_the_first_stage():
    """Equal final scores are no reason to change places."""

    class Blind(ColorReranker):
        def logits(self, *args, pairs, **options):
            return np.zeros(len(pairs), np.float32)

    hits = [Hit(i + 1, 0.5, Item(f"{i}", None), Modality.TEXT, f"caption {i}") for i in range(5)]
    stage = SecondStage(Blind(), ColorEncoder(), None)
    row = ColorEncoder().encode_texts(["red"])
    found = stage.reorder(Question(row, "red"), hits, snapshot=None, to="text", k=5, asked=Rerank(5))
    assert [hit.item.id for hit in found.hits] == ["0", "1", "2", "3", "4"]


def test_a_model_without_a_re_ranker(stored):
    """A named depth is an error that says so; "auto" is the first stage."""
    with Searcher.open(stored, encoder=ColorEncoder()) as searcher:
        with pytest.raises(ModelError):
            searcher.search_text("red", rerank=8)
        assert searcher.search_text("red", rerank="auto")[0].probability is None


def test_a_re_ranker_that_cannot_be_loaded_leaves_the_first_stage_to_auto(stored, tmp_path):
    """A search does not fail for want of its second stage; the note names the reason."""
    with Searcher.open(stored, encoder=ColorEncoder(), reranker=tmp_path) as searcher:
        hits = searcher.search_text("red", k=3, rerank="auto")
        assert len(hits) == 3 and hits[0].probability is None
        assert hits.notes[0].startswith("not re-ranked: ")
        with pytest.raises(ModelError):
            searcher.search_text("red", rerank=8)


def test_threads_get_the_re_ranked_answers_of_one_thread(stored):
    """One searcher, its re-ranker and its tokens serve many threads."""
    wrong = []
    with opened(stored) as searcher:
        expected = {pair: names(searcher.search_text(" ".join(pair), k=4, rerank=28)) for pair in PAIRS[:6]}

        def ask(pair: tuple[str, str]) -> None:
            for _ in range(8):
                if names(searcher.search_text(" ".join(pair), k=4, rerank=28)) != expected[pair]:
                    wrong.append(pair)

        threads = [threading.Thread(target=ask, args=(pair,)) for pair in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong

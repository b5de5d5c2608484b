"""What a matcher promises: one probability a pair, in order, whatever the pairs come in."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mmsearch.errors import ImageError, InputError, ModelError, UsageError
from mmsearch.matcher import Match, Matcher, PairToMatch, Tally, read_pairs_to_match
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker, tiny_checkpoint, tiny_reranker
from mmsearch.types import Skipped, SkipReason


@pytest.fixture
def matcher() -> Matcher:
    return Matcher(ColorEncoder(), ColorReranker())


def saved(folder: Path, *names: str) -> list[Path]:
    """Pictures of the colours in their names, side by side."""
    for name in names:
        colours = name.split("-")
        image = Image.new("RGB", (20, 20), COLORS[colours[0]])
        image.paste(COLORS[colours[-1]], (10, 0, 20, 20))
        image.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in names]


def table(folder: Path, *rows: dict) -> str:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def test_pairs_that_match_are_probable_and_others_are_not(matcher, tmp_path):
    """Pair by pair: paths, pixels and PIL images alike."""
    one, two = saved(tmp_path, "red-blue", "green")
    found = matcher.match([one, Image.open(one), np.asarray(Image.open(two))], ["red, blue", "a green one", "green"])
    assert found.shape == (3,) and found.dtype == np.float64
    assert found[0] > 0.99 > 0.01 > found[1] and found[2] > 0.99


def test_what_a_pair_is_answered_with_changes_nothing(matcher, tmp_path):
    """Alone, in a list longer than a batch, and streamed: the same number."""
    paths = saved(tmp_path, "red-blue", "green", "red-white")
    texts = ["red and blue", "white", "red"]
    pictures, words = [paths[i % 3] for i in range(150)], [texts[i % 7 % 3] for i in range(150)]
    alone = [matcher.match_one(picture, text).probability for picture, text in zip(pictures[:9], words, strict=False)]
    every = matcher.match(pictures, words)
    assert every[:9] == pytest.approx(alone, abs=1e-9)
    pairs = [PairToMatch(str(picture), text) for picture, text in zip(pictures, words, strict=True)]
    streamed = list(matcher.match_pairs(pairs, workers=1, batch_size=17))
    assert [answer.pair for answer in streamed] == pairs
    assert [answer.probability for answer in streamed] == pytest.approx(every.tolist(), abs=1e-9)


def test_a_picture_that_cannot_be_read_costs_its_own_pairs_only(matcher, tmp_path):
    """Reported in its place with a reason; its neighbours keep their own answers."""
    good, other = saved(tmp_path, "red", "blue")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pairs = [
        PairToMatch(str(good), "red"), PairToMatch(str(tmp_path / "bad.png"), "red"),
        PairToMatch(str(tmp_path / "gone.png"), "red"), PairToMatch(str(good), " "), PairToMatch(str(other), "red"),
    ]  # fmt: skip
    found = list(matcher.match_pairs(pairs, workers=1))
    assert [type(one) for one in found] == [Match, Skipped, Skipped, Skipped, Match]
    assert [one.reason for one in found[1:4]] == [SkipReason.NOT_AN_IMAGE, SkipReason.VANISHED, SkipReason.BAD_ROW]
    assert found[0].probability > 0.99 > 0.01 > found[4].probability
    with pytest.raises(ImageError):
        matcher.match_one(tmp_path / "bad.png", "red")


def test_an_answer_shows_its_parts(matcher, tmp_path):
    """JSON has the probability, yes or no, and what adds up to the log-odds."""
    (path,) = saved(tmp_path, "red")
    read = matcher.match_one(path, "a red one").to_json(threshold=0.5)
    assert (read["image"], read["text"], read["match"]) == (str(path), "a red one", True)
    parts = read["parts"]
    given = sum(value for name, value in parts.items() if name.startswith("from_"))
    assert given == pytest.approx(parts["log_odds"], abs=1e-5)
    assert read["probability"] == pytest.approx(1 / (1 + np.exp(-parts["log_odds"])), abs=1e-5)
    assert not matcher.match_one(path, "blue").to_json()["match"]


def test_a_picture_may_be_named_by_an_address(matcher, tmp_path):
    """What lies in a bucket is fetched, and answered like the same file here."""
    (path,) = saved(tmp_path, "red")
    fsspec.filesystem("memory").pipe("/matched/red.png", path.read_bytes())
    far = matcher.match_one("memory://matched/red.png", "red")
    assert far.probability == matcher.match_one(path, "red").probability > 0.9
    assert far.pair.image == "memory://matched/red.png"
    every = matcher.match(["memory://matched/red.png", str(path), path], ["red"] * 3)
    assert every == pytest.approx([far.probability] * 3, abs=1e-9)
    with pytest.raises(ImageError, match=r"gone\.png"):
        matcher.match(["memory://matched/gone.png"], ["red"])


@pytest.mark.parametrize(("pictures", "texts"), [(1, ["a", "b"]), (1, "red"), (1, ["  "]), (1, [None])])
def test_lists_that_do_not_fit_are_refused(matcher, tmp_path, pictures, texts):
    """Unequal lengths, one str, an empty text, no text."""
    with pytest.raises(UsageError):
        matcher.match(saved(tmp_path, "red")[:pictures], texts)


def test_one_str_is_no_list_of_pictures(matcher):
    """Its letters are not taken for paths."""
    with pytest.raises(UsageError, match=r"pictures: .*one str"):
        matcher.match("red.png", ["r"] * len("red.png"))


def test_towers_and_re_ranker_must_belong_together():
    """Rows of one model mean nothing to the re-ranker of another."""
    with pytest.raises(ModelError, match="towers"):
        Matcher(ColorEncoder(name="other"), ColorReranker())


def test_a_table_is_read_row_by_row_with_its_labels(tmp_path):
    """Two rows of one picture keep their own labels; broken rows are reported, and once that a value is no label."""
    red, blue = saved(tmp_path, "red", "blue")
    skipped: list[Skipped] = []
    notes: list[str] = []
    path = table(
        tmp_path,
        {"image": "red.png", "text": "red", "label": 1},
        {"image": "blue.png", "text": "blue", "label": "Yes"},
        {"image": "red.png", "text": "blue", "label": False},
        {"image": "red.png", "text": "maybe", "label": "perhaps"},
        {"image": "red.png", "text": "or not", "label": "dog"},
        {"image": "red.png", "captions": ["one", "two"]},
        {"text": "no picture"},
        {"image": "gone.png", "text": "red"},
        {"image": "red.png"},
    )
    found = list(read_pairs_to_match(path, on_skip=skipped.append, on_note=notes.append))
    assert found == [
        PairToMatch(str(red), "red", True), PairToMatch(str(blue), "blue", True), PairToMatch(str(red), "blue", False),
        PairToMatch(str(red), "maybe"), PairToMatch(str(red), "or not"), PairToMatch(str(red), "one"),
        PairToMatch(str(red), "two"),
    ]  # fmt: skip
    assert [one.detail.split(",")[0] for one in skipped] == [
        "no picture", "named in line 8 of pairs.jsonl", "no text",
    ]  # fmt: skip
    assert notes == [f"{path}:4: 'perhaps' is no label (1 or 0, yes or no, true or false); such rows have none"]


def test_csv_and_folders_are_pairs_too(tmp_path):
    """Columns image,text,label; a folder with side-car captions; anything else is an error."""
    (red,) = saved(tmp_path, "red")
    (tmp_path / "p.csv").write_text("image,text,label\nred.png,a red one,1\nred.png,a dog,0\n")
    skipped: list[Skipped] = []
    assert [pair.label for pair in read_pairs_to_match(str(tmp_path / "p.csv"), on_skip=skipped.append)] == [
        True,
        False,
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    red.rename(folder / "red.png")
    (folder / "red.txt").write_text("one\ntwo\n")
    found = list(read_pairs_to_match(str(folder), on_skip=skipped.append))
    assert [(pair.text, pair.label) for pair in found] == [("one", None), ("two", None)]
    assert not skipped
    for wrong in ("photo.png", "gone.csv"):
        with pytest.raises(InputError):
            list(read_pairs_to_match(str(tmp_path / wrong), on_skip=skipped.append))


@pytest.mark.parametrize("name", ["empty.csv", "empty.jsonl", "folder"])
def test_nothing_to_match_is_an_error(tmp_path, name):
    """A folder without captions, a table without rows: no output and exit 0 would say that all is well."""
    (tmp_path / "folder").mkdir()
    saved(tmp_path / "folder", "red")
    (tmp_path / "empty.csv").write_text("image,text\n")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError):
        list(read_pairs_to_match(str(tmp_path / name), on_skip=lambda skipped: None))


@pytest.mark.parametrize("broken", ["direction", "patches"])
def test_a_picture_that_the_model_makes_nothing_of_is_an_error(tmp_path, broken):
    """Its row has no direction, or its patches are NaN; among many pairs it costs its own only."""

    class NoRows(ColorEncoder):
        def encode_pixels(self, pixels, **options):
            rows, usable = super().encode_pixels(pixels, **options)
            brightest = pixels.max(axis=(1, 2, 3))
            return np.where(usable[:, None] & (brightest < 1)[:, None], 0, rows), brightest > 0

    class NoPatches(ColorReranker):
        def logits(self, words, text_rows, patches, image_rows, *, pairs, **options):
            found = super().logits(words, text_rows, patches, image_rows, pairs=pairs, **options)
            return np.where(image_rows[pairs[:, 1]].argmax(axis=1) == list(COLORS).index("black"), np.nan, found)

    matcher = Matcher(NoRows(), ColorReranker()) if broken == "direction" else Matcher(ColorEncoder(), NoPatches())
    red, black = saved(tmp_path, "red", "black")
    with pytest.raises(ModelError, match="picture 1"):
        matcher.match([red, black], ["red", "black"])
    with pytest.raises(ModelError, match=r"black\.png"):
        matcher.match_one(black, "black")
    found = list(matcher.match_pairs([PairToMatch(str(red), "red"), PairToMatch(str(black), "black")], workers=1))
    assert found[0].probability > 0.99 and found[1].reason is SkipReason.BAD_EMBEDDING


def test_a_text_that_was_cut_is_marked(matcher, tmp_path):
    """Alone and among others."""
    (path,) = saved(tmp_path, "red")
    long = "red " * (matcher.encoder.max_tokens + 1)
    assert matcher.match_one(path, long).cut and not matcher.match_one(path, "red").cut
    found = matcher.match_pairs([PairToMatch(str(path), "red"), PairToMatch(str(path), long)], workers=1)
    assert [one.cut for one in found] == [False, True]


def answer(label: bool | None, probability: float, image: str = "a") -> Match:
    return Match(PairToMatch(image, "t", label), probability, {})


def test_labels_are_summed_up():
    """The share answered rightly; ROC AUC and ECE where both kinds are there; nothing without labels."""
    tally = Tally("m", threshold=0.5)
    assert list(tally.lines()) == []
    tally.add(answer(None, 0.9))
    assert (tally.answered, list(tally.lines())) == (1, [])
    tally.add(answer(True, 0.9))
    assert list(tally.lines()) == ["1 labelled pairs: 100.0 % answered rightly at 0.5"]
    for number, (label, probability) in enumerate([(False, 0.2), (False, 0.6), (True, 0.8)]):
        tally.add(answer(label, probability, image=f"{number}"))
    lines = list(tally.lines())
    assert lines[0] == "4 labelled pairs: 75.0 % answered rightly at 0.5"
    assert any(line.startswith("ROC AUC") and " 100.0 " in line for line in lines)
    assert any(line.startswith("ECE") for line in lines)


def test_a_model_directory_is_towers_and_re_ranker_together(tmp_path):
    """`Matcher.load` with a real (tiny, random) model; one without a re-ranker says so."""
    (path,) = saved(tmp_path, "red")
    tiny_reranker(tmp_path / "model")
    matcher = Matcher.load(tmp_path / "model", device="cpu")
    found = matcher.match([path, path], ["a dog", "a cat on the beach"])
    assert found.shape == (2,) and ((found > 0) & (found < 1)).all() and found[0] != found[1]
    assert matcher.match_one(path, "a dog").probability == pytest.approx(found[0], abs=1e-5)
    tiny_checkpoint(tmp_path / "bare")
    with pytest.raises(ModelError, match="re-ranker"):
        Matcher.load(tmp_path / "bare", device="cpu")

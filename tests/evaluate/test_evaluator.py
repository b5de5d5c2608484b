"""A whole evaluation with an encoder whose answers are known: colours that are called by their names."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.data.loading import Failed, Loaded
from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.comparison import Verdict, compare
from mmsearch.evaluate.evaluator import compare_file, evaluate_file, evaluate_pairs
from mmsearch.similarity import normalise
from mmsearch.types import ModelIdentity, Pair, Preprocessing, Skipped, SkipReason

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
}


class NamesColours:
    """Pictures are their mean colour, texts the sum of the colours they name, both minus grey."""

    identity = ModelIdentity("names-colours", "0", Preprocessing(size=4).digest(), 3)
    preprocessing = Preprocessing(size=4)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode_texts(self, texts, *, batch_size=64):
        rows = [sum(np.array(COLOURS[w], float) for w in text.split() if w in COLOURS) - 127.5 for text in texts]
        return normalise(np.array(rows))

    def encode_pixels(self, pixels, *, batch_size=32):
        self.batches.append(len(pixels))
        rows = pixels.reshape(len(pixels), -1, 3).mean(axis=1) - 127.5
        ok = ~(np.abs(rows) < 1).all(axis=1)  # grey has no direction
        rows[~ok] = 1.0
        return normalise(rows), ok


class FromNames:
    """A loader that makes pictures out of their names, and fails where the name is "broken"."""

    def load(self, requests) -> Iterator[Loaded | Failed]:
        for key, name in requests:
            colour = Path(name).stem
            if colour == "broken":
                yield Failed(key, Skipped(name, SkipReason.TRUNCATED), None, None)
            else:
                pixels = np.empty((4, 4, 3), np.uint8)
                pixels[:] = COLOURS.get(colour, (127, 128, 127))
                yield Loaded(key, pixels, b"", None, None)


class Told:
    def __init__(self) -> None:
        self.total, self.done = None, 0

    def start(self, total):
        self.total = total

    def advance(self, n, *, note=""):
        self.done += n


def pair(colour: str, *captions: str, group: str | None = None) -> Pair:
    return Pair(f"{colour}.png", captions or (colour,), group or colour)


def run(pairs, **options):
    return evaluate_pairs(pairs, encoder=NamesColours(), loader=FromNames(), **options)


def test_right_pairs_hit_at_one_in_both_directions():
    """Every colour finds its name and every name its colour."""
    found = run([pair(colour) for colour in COLOURS])
    assert (found.images, found.texts) == (5, 5)
    assert found.text_to_image.values["hit@1"] == found.image_to_text.values["hit@1"] == 1.0
    assert found.text_to_image.values["median_rank"] == 1.0
    assert found.model == "names-colours"


def test_wrong_pairs_do_not_hit():
    """The opposite captions: nothing is right at 1, so the numbers cannot come from the order of the input."""
    found = run([pair("red", "cyan"), pair("cyan", "red")])
    assert found.text_to_image.values["hit@1"] == found.image_to_text.values["hit@1"] == 0.0
    assert found.text_to_image.values["mean_rank"] == 2.0


def test_several_captions_of_an_image_are_all_right_answers():
    """Image to text: one of two captions at 1 is a hit and half the recall; text to image counts each caption."""
    found = run([pair("red", "red", "a red thing"), pair("blue", "blue", "yellow")])
    assert (found.images, found.texts) == (2, 4)
    assert found.image_to_text.values["hit@1"] == 1.0
    assert found.image_to_text.values["recall@1"] == 0.5
    assert found.text_to_image.values["hit@1"] == 0.75  # "yellow" is nearer to red


def test_a_picture_listed_once_a_caption_is_one_picture():
    """CSV files repeat the picture; its lines are no rivals of each other."""
    found = run([pair("red", "red"), pair("blue", "blue"), pair("red", "red again")])
    assert (found.images, found.texts) == (2, 3)
    assert found.text_to_image.values["hit@1"] == 1.0


def test_pictures_of_one_group_are_right_answers_for_each_others_captions():
    """Two views of one thing: either is a hit."""
    found = run([pair("red", "red", group="g"), pair("cyan", "cyan", group="g"), pair("blue", "blue")])
    assert found.text_to_image.values["hit@1"] == 1.0
    assert found.text_to_image.values["recall@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_a_picture_that_cannot_be_read_takes_only_its_own_captions_along():
    """Captions after it stay with their own pictures, and it is counted."""
    pairs = [pair("red"), pair("broken", "green", "cyan"), pair("grey", "blue"), pair("blue"), pair("yellow")]
    for batch_size in (1, 2, 64):
        found = run(pairs, batch_size=batch_size)
        assert (found.images, found.texts) == (3, 3)
        assert found.text_to_image.values["hit@1"] == found.image_to_text.values["hit@1"] == 1.0
        assert sorted(found.skipped, key=lambda one: one.path) == [
            Skipped("broken.png", SkipReason.TRUNCATED),
            Skipped("grey.png", SkipReason.BAD_EMBEDDING),
        ]


def test_pictures_without_captions_are_skipped():
    """They have no right answer to find."""
    found = run([pair("red"), Pair("blue.png", (), "blue"), pair("green")])
    assert (found.images, len(found.skipped)) == (2, 1)


def test_the_limit_counts_pictures_and_keeps_their_later_captions():
    """--limit 2 of a file with a line a caption is two pictures with all their captions."""
    found = run([pair("red"), pair("blue"), pair("green"), pair("red", "red again")], limit=2)
    assert (found.images, found.texts) == (2, 3)


def test_nothing_to_evaluate_is_an_error_that_says_why():
    """No pairs at all, or none that can be read."""
    with pytest.raises(InputError):
        run([])
    with pytest.raises(InputError, match=r"broken\.png"):
        run([pair("broken")])
    with pytest.raises(UsageError):
        run([pair("red")], limit=0)


def test_progress_ends_at_its_total_whatever_is_skipped():
    """A bar that stops at 97 % looks like a crash."""
    told = Told()
    run([pair("red", "red", "red"), pair("broken", "a", "b"), pair("blue")], progress=told, batch_size=1)
    assert told.done == told.total == 8


def test_batches_are_full():
    """The model gets as many pictures a step as it was asked to, also around broken ones."""
    encoder = NamesColours()
    pairs = [pair(colour) for colour in ("red", "green", "blue", "yellow", "cyan")]
    evaluate_pairs([*pairs[:1], pair("broken"), *pairs[1:]], encoder=encoder, loader=FromNames(), batch_size=2)
    assert encoder.batches == [2, 2, 1]


def test_a_file_of_pairs_with_real_pictures(tmp_path):
    """JSONL, split, real decoding: what `mmsearch eval` runs."""
    lines = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (9, 7), colour).save(tmp_path / f"{name}.png")
        split = "train" if number == 0 else "test"
        lines.append(f'{{"image": "{name}.png", "split": "{split}", "captions": ["{name}", "so {name}"]}}')
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate_file(tmp_path / "pairs.jsonl", encoder=NamesColours(), split="test", workers=1)
    assert (found.images, found.texts) == (4, 8)
    assert found.to_json()["image_to_text"]["recall@5"] == 1.0


def colour_files(folder) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (9, 7), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def test_two_models_on_the_same_file(tmp_path):
    """The one that mixes everything up falls; each is loaded when its turn comes; one bar ends at its total."""
    told, loaded = Told(), []

    class Wrong(NamesColours):
        def encode_texts(self, texts, *, batch_size=64):
            return super().encode_texts(["cyan" if text == "red" else "red" for text in texts])

    def load(kind):
        loaded.append(kind)
        return kind()

    found = compare_file(
        colour_files(tmp_path), before=lambda: load(NamesColours), after=lambda: load(Wrong), workers=1, progress=told
    )
    assert found.differences["text_to_image"]["hit@1"].verdict is Verdict.FALLS
    assert loaded == [NamesColours, Wrong]
    assert told.done == told.total == 20


def test_models_that_skip_other_pictures_are_not_compared():
    """As many pictures in both, but not the same ones: their queries must not be paired by position."""
    grey, blue = Pair("grey.png", ("red",), "grey"), pair("blue")
    one = run([pair("red"), grey, blue, Pair("green.png", ("green",), "green")])
    other = run([pair("red"), pair("yellow"), Pair("broken.png", ("x",), "b"), Pair("green.png", ("green",), "green")])
    assert one.images == other.images == 3
    with pytest.raises(UsageError, match="same pictures"):
        compare(one, other)


def test_json_has_plain_numbers_and_the_names_that_were_promised():
    """Shares between 0 and 1, both directions, counts."""
    read = run([pair(colour) for colour in COLOURS]).to_json()
    assert list(read)[:3] == ["model", "images", "texts"]
    names = {f"{metric}@{k}" for metric in ("hit", "recall") for k in (1, 5, 10)}
    assert set(read["text_to_image"]) == names | {"mrr@10", "ndcg@10", "median_rank", "mean_rank"}
    assert all(type(value) is float for value in read["image_to_text"].values())
    assert all(0 <= low <= high <= 1 for low, high in read["ci95"]["image_to_text"].values())

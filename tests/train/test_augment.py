"""Random views: a function of their seed, within what was allowed, and never against the caption."""

import numpy as np
import pytest
from PIL import Image

from mmsearch.errors import UsageError
from mmsearch.train.augment import (
    _OPERATIONS,
    NO_AUGMENTATION,
    Augmentation,
    augment_image,
    drop_words,
    names_a_side,
)  # fmt: skip

WIDTH, HEIGHT = 60, 40
OFF = {"crop": 1.0, "ratio": 1.0, "flip": 0.0, "colour": 0.0}


def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red grows to the right, green downwards."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 99)], 2).astype(np.uint8))


def view(seed: int = 0, *, may_flip: bool = True, image: Image.Image | None = None, **settings) -> Image.Image:
    return augment_image(image or photo(), Augmentation(**{**OFF, **settings}), seed=seed, may_flip=may_flip)


def test_a_view_is_a_function_of_its_seed():
    """Not of what was drawn before; other seeds give other views."""
    everything = Augmentation(randaugment=2)
    first = [augment_image(photo(), everything, seed=seed).tobytes() for seed in range(8)]
    again = [augment_image(photo(), everything, seed=seed).tobytes() for seed in reversed(range(8))]
    assert first == again[::-1]
    assert len(set(first)) == 8


def test_without_augmentation_the_photo_stays_as_it_is():
    """Every pixel of it."""
    assert augment_image(photo(), NO_AUGMENTATION, seed=3).tobytes() == photo().tobytes()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (200, 9)])
def test_a_crop_keeps_its_share_and_its_shape(shape):
    """At least half of the area, and a shape within a factor of 1.33 of the photo's own; sizes vary."""
    sizes = [view(seed, image=photo(*shape), crop=0.5, ratio=1.33).size for seed in range(200)]
    for width, height in sizes:
        assert width * height >= 0.45 * shape[0] * shape[1]
        assert 1 / 1.5 < width / height / (shape[0] / shape[1]) < 1.5
    assert len(set(sizes)) > 10


def test_a_photo_is_mirrored_only_where_it_may_be():
    """About half of the time at a probability of a half; never when the caption speaks of sides."""
    mirrored = photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    hits = sum(view(seed, flip=0.5).tobytes() == mirrored for seed in range(200))
    assert 70 < hits < 130
    assert all(view(seed, flip=1.0, may_flip=False).tobytes() == photo().tobytes() for seed in range(20))


def test_whether_it_may_be_mirrored_changes_nothing_else():
    """The same crop and colours with and without: a random number is drawn either way."""
    for seed in range(20):
        one = view(seed, flip=0.0, crop=0.5, colour=0.3)
        assert one.tobytes() == view(seed, flip=1.0, may_flip=False, crop=0.5, colour=0.3).tobytes()


@pytest.mark.parametrize("operation", range(len(_OPERATIONS)))
@pytest.mark.parametrize("strength", [-0.6, 0.0, 0.6])
def test_every_operation_gives_a_picture_of_the_same_size(operation, strength):
    """Also of one pixel's height, and at both ends of its strength."""
    for image in (photo(), photo(30, 1), photo(1, 1)):
        out = _OPERATIONS[operation](image, strength)
        assert (out.size, out.mode) == (image.size, "RGB")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on the left", True), ("The RIGHTMOST car", True), ("a stop sign", True), ("a man reads", True),
        ("a dog left of it.", True), ("leftover food", False), ("a bright day", False), ("two cats", False),
        ("", False), ("looking leftwards", True), ("a right-handed batter", True), ("the western wall", True),
        ("two signs", True), ("a bright-eyed cat", False),
    ],
)  # fmt: skip
def test_captions_that_mirroring_would_make_false_are_known(caption, expected):
    """Sides, and what can be read; whole words in any case."""
    assert names_a_side(["a dog", caption]) is expected


def test_words_are_dropped_by_seed_and_never_all():
    """One in three or so, in their order; the only word of a caption stays."""
    caption = "a red dog runs over the green grass of a park"
    kept = [drop_words(caption, 0.33, seed=seed) for seed in range(100)]
    assert kept == [drop_words(caption, 0.33, seed=seed) for seed in range(100)]
    share = sum(len(one.split()) for one in kept) / (100 * len(caption.split()))
    assert 0.6 < share < 0.74
    words = iter(caption.split())
    assert all(word in words for word in kept[0].split())
    assert drop_words(caption, 1.0, seed=0) == "a"
    assert drop_words("dog", 1.0, seed=0) == "dog"
    assert drop_words(caption, 0.0, seed=0) == caption


@pytest.mark.parametrize(
    "values", [{"crop": 0.0}, {"crop": 1.1}, {"ratio": 0.5}, {"flip": 2.0}, {"colour": -0.1}, {"word_drop": 1.5},
               {"randaugment": -1}]
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(values):
    """By the setting's name."""
    with pytest.raises(UsageError, match=next(iter(values))):
        Augmentation(**values)

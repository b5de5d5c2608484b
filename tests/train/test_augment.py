"""Random views: repeatable, inside their bounds, and never against the caption."""

import numpy as np
import pytest
from PIL import Image

from mmsearch.errors import UsageError
from mmsearch.train.augment import NO_AUGMENTATION, Augmentation, augment_image, drop_words, names_a_side


def ramp(width: int = 40, height: int = 30) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)[None, :]
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def mirrored(view: Image.Image) -> bool:
    red = np.asarray(view)[:, :, 0].astype(int)
    return red[:, 0].mean() > red[:, -1].mean()


@pytest.mark.parametrize("settings", [Augmentation(), Augmentation(randaugment=2), Augmentation(colour=0.0)])
def test_a_view_is_a_function_of_its_seed(settings):
    """The same seed gives the same pixels, twelve seeds do not all give the same."""
    first, again = (np.asarray(augment_image(ramp(), settings, seed=3)) for _ in range(2))
    assert np.array_equal(first, again)
    views = {augment_image(ramp(), settings, seed=seed).tobytes() for seed in range(12)}
    assert len(views) > 6


def test_without_augmentation_a_picture_stays_as_it_is():
    """Every part has a switch."""
    assert augment_image(ramp(), NO_AUGMENTATION, seed=1).tobytes() == ramp().tobytes()


def test_a_crop_keeps_its_share_of_the_area_and_nearly_the_shape():
    """Bounds of the settings, to a pixel of rounding."""
    settings = Augmentation(crop=0.5, ratio=1.33, flip=0.0, colour=0.0)
    for seed in range(50):
        width, height = augment_image(ramp(400, 300), settings, seed=seed).size
        assert 0.49 <= width * height / 120_000 <= 1.0
        assert 1 / 1.36 <= (width / height) / (4 / 3) <= 1.36


def test_a_picture_is_mirrored_at_the_probability_and_never_where_it_may_not():
    """Half of the views; none where a caption names a side."""
    settings = Augmentation(crop=1.0, flip=0.5, colour=0.0)
    share = np.mean([mirrored(augment_image(ramp(), settings, seed=seed)) for seed in range(200)])
    assert 0.35 < share < 0.65
    assert not any(mirrored(augment_image(ramp(), settings, seed=s, may_flip=False)) for s in range(50))


@pytest.mark.parametrize("caption", ["a dog on the LEFT", "the rightmost car", "a sign that reads stop"])
def test_captions_that_a_mirror_makes_false_are_known(caption):
    """Sides, and what is to be read."""
    assert names_a_side(["a cat", caption])


def test_other_captions_may_be_mirrored():
    """Words that only hold such a word do not count."""
    assert not names_a_side(["a bright day", "leftover food", "two dogs"])


def test_words_are_dropped_at_the_probability_and_one_stays():
    """Known values at 0 and 1; about a tenth at 0.1."""
    caption = "a brown dog runs over the green grass with a ball"
    assert drop_words(caption, 0.0, seed=1) == caption
    assert drop_words(caption, 1.0, seed=1) == "a"
    assert drop_words("dog", 1.0, seed=1) == "dog"
    kept = np.mean([len(drop_words(caption, 0.1, seed=seed).split()) for seed in range(300)]) / 11
    assert 0.86 < kept < 0.94


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop", 0.0),
        ("crop", 1.5),
        ("ratio", 0.9),
        ("flip", 2.0),
        ("colour", -0.1),
        ("randaugment", -1),
        ("word_drop", 2),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    """Before any picture is read."""
    with pytest.raises(UsageError, match=rf"augment\.{name}"):
        Augmentation(**{name: value})


def test_every_operation_of_randaugment_gives_a_picture_of_the_same_size():
    """Thirty operations in a row."""
    view = augment_image(ramp(), Augmentation(crop=1.0, flip=0.0, colour=0.0, randaugment=30), seed=5)
    assert (view.size, view.mode) == ((40, 30), "RGB")

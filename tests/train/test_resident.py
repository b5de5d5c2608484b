"""Views made on the device are those that a decode worker makes, and batches are those of any other feed."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import picture, tokeniser

from mmsearch.train.augment import Augmentation, DrawnView, augment_image, draw_view
from mmsearch.train.batches import Draw
from mmsearch.train.feed import Batch, PixelFeed
from mmsearch.train.resident import Canvases, ResidentFeed, canvas_of, make_views
from mmsearch.types import Pair, Preprocessing

SIZE = 32
ALL = Augmentation(crop=0.3, ratio=1.5, flip=0.5, colour=0.4)


def smooth(side: int, *, seed: int = 0) -> Image.Image:
    """A picture without sharp edges, which every way of resampling shows alike."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def as_canvas(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())[None]


def whole(side: int, *, mirrored: bool = False) -> DrawnView:
    return DrawnView((0, 0, side, side), mirrored, (1.0, 1.0, 1.0))


def test_the_whole_picture_at_its_own_size_is_that_picture():
    image = as_canvas(smooth(SIZE))
    assert torch.equal(make_views(image, [whole(SIZE)], size=SIZE), image)
    assert torch.equal(make_views(image, [whole(SIZE, mirrored=True)], size=SIZE), image.flip(2))


@pytest.mark.parametrize("seed", range(12))
def test_a_view_does_not_depend_on_the_size(seed):
    """Drawn for a photo and for its canvas: the same mirror image and colour, boxes alike but for rounding."""
    photo, canvas = (draw_view(size, ALL, random.Random(seed)) for size in ((500, 375), (312, 312)))
    assert (photo.mirrored, photo.colour) == (canvas.mirrored, canvas.colour)
    shares = [np.array(view.box) / (w, h, w, h) for view, w, h in ((photo, 500, 375), (canvas, 312, 312))]
    assert np.abs(shares[0] - shares[1]).max() < 0.01


@pytest.mark.parametrize("seed", range(12))
def test_a_view_is_that_of_a_decode_worker(seed):
    """The same crop, mirror image and colour by the same seed; pixels differ by resampling alone."""
    image = smooth(96, seed=seed)
    expected = augment_image(image, ALL, seed=seed).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    view = draw_view((96, 96), ALL, random.Random(seed))
    found = make_views(as_canvas(image), [view], size=SIZE)[0]
    off = np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))
    assert off.mean() < 2 and off.max() < 16


def test_what_cannot_be_held_is_said():
    """Pictures cut to their middle and RandAugment; without crops a canvas is of the towers' size."""
    squash, crop = Preprocessing(size=100, fit="squash"), Preprocessing(size=100, fit="crop")
    assert canvas_of(crop, ALL) is None
    assert canvas_of(squash, Augmentation(randaugment=2)) is None
    assert canvas_of(squash, ALL).size == 120
    assert canvas_of(squash, Augmentation(crop=1.0)).size == canvas_of(squash, None).size == 100


def feeds(folder, *, broken=(), captions=1, augmentation=None):
    """(resident feed, the feed of pixels that it stands for)."""
    pairs = []
    for i, colour in enumerate(("red", "green", "blue", "yellow")):
        path = picture(folder / f"{i}.png", colour, "black", seed=i)
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"no picture")
        pairs.append(Pair(path, (f"a {colour} car", f"the {colour} dog", "a beach"), f"g{i}"))
    preprocessing = Preprocessing(size=SIZE, fit="squash")

    def pixel_feed(chosen, count=1):
        return PixelFeed(
            pairs, preprocessing=preprocessing, tokeniser=tokeniser(), augmentation=chosen, workers=0,
            on_skip=lambda skipped: None, captions=count,
        )  # fmt: skip

    held = Canvases.filled(
        pixel_feed(None).batches, count=len(pairs), size=SIZE, batch_size=3, device=torch.device("cpu")
    )
    pixels = pixel_feed(augmentation, captions)
    feed = ResidentFeed(held, pixels=pixels, augmentation=augmentation, size=SIZE)
    return feed, pixels


PLAN = [[Draw(0, 1, 5), Draw(2, 2, 6)], [Draw(1, 0, 7), Draw(3, 0, 8)]]


@pytest.mark.parametrize("captions", [1, 2, 9])
def test_batches_are_those_of_a_feed_of_pixels(captions, tmp_path):
    """Plain pictures bit for bit, texts, owners and groups; also with several captions a picture."""
    resident, pixels = feeds(tmp_path, captions=captions)
    for own, other in zip(resident.batches(PLAN), pixels.batches(PLAN), strict=True):
        assert (own.draws, own.captions) == (other.draws, other.captions)
        for name in ("images", "ids", "mask", "groups", "owners"):
            assert torch.equal(getattr(own, name), getattr(other, name))
        assert own.owners.bincount().tolist() == [min(captions, 3)] * 2
        assert own.captions[0] in ("the red dog", "a green car")  # the drawn one comes first


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path):
    resident, _ = feeds(tmp_path, broken=(2,))
    assert [[draw.row for draw in batch.draws] for batch in resident.batches(PLAN)] == [[0], [1, 3]]


def test_a_batch_without_a_usable_picture_is_empty(tmp_path):
    """Of the shape of any other."""
    resident, _ = feeds(tmp_path, broken=(0, 2), augmentation=ALL)
    empty, full = resident.batches(PLAN)
    assert (empty.draws, tuple(empty.images.shape), len(full.draws)) == ([], (0, SIZE, SIZE, 3), 2)


def test_a_picture_that_was_away_is_tried_once_more():
    """What the second pass gives is held; what it does not is left out."""
    asked = []

    def batches(plan):
        for draws in plan:
            asked.append([draw.row for draw in draws])
            kept = [draw for draw in draws if draw.row == 0 or (draw.row == 1 and len(asked) > 2)]
            images = torch.full((len(kept), 4, 4, 3), 7, dtype=torch.uint8)
            yield Batch(kept, images, *[torch.zeros(0)] * 3, [], torch.zeros(0))

    told = []
    held = Canvases.filled(batches, count=4, size=4, batch_size=2, device=torch.device("cpu"), advance=told.append)
    assert asked == [[0, 1], [2, 3], [1, 2], [3]] and sum(told) == 4
    assert held.unfit == {2, 3} and held.pixels.amax(dim=(1, 2, 3)).tolist() == [7, 7, 0, 0]


def test_views_do_not_depend_on_the_batch(tmp_path):
    """A draw gives the same view in whatever company."""
    resident, _ = feeds(tmp_path, augmentation=ALL)
    together = next(iter(resident.batches([PLAN[0]])))
    alone = next(iter(resident.batches([[PLAN[0][1]]])))
    assert torch.equal(together.images[1], alone.images[0])

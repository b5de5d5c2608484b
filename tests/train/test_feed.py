"""Planned batches as tensors: right, the same with any number of workers, and safe from broken pictures."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mmsearch.data.images import open_image, prepare
from mmsearch.errors import ImageError, UsageError
from mmsearch.testing import tiny_tokenizer_json
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.augment import NO_AUGMENTATION, Augmentation
from mmsearch.train.batches import Draw, plan_epoch
from mmsearch.train.feed import PixelFeed, plain_pixels
from mmsearch.train.views import open_view, view_of
from mmsearch.types import Pair, Preprocessing, SkipReason

SMALL = Preprocessing(size=16)
FLIP = Augmentation(crop=1.0, ratio=1.0, flip=1.0, colour=0.0)


def picture(path, *, width: int = 48, height: int = 32, seed: int = 0) -> str:
    """Red grows to the right, green downwards; blue tells pictures apart."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    Image.fromarray(np.stack([x, y, np.full_like(x, 20 * seed % 256)], 2).astype(np.uint8)).save(path)
    return str(path)


def some_pairs(folder, count: int = 10) -> list[Pair]:
    """Ten pictures of five groups, two captions each."""
    return [
        Pair(picture(folder / f"{i}.png", seed=i), (f"a photo of the {w}", f"the {w} on the beach"), f"g{i % 5}")
        for i, w in zip(range(count), ["dog", "cat", "car", "red", "blue"] * count, strict=False)
    ]


def feed(pairs, *, skipped: list | None = None, **options) -> PixelFeed:
    tokeniser = options.pop("tokeniser", None)
    if tokeniser is None:
        from tokenizers import Tokenizer

        tokeniser = Tokeniser(Tokenizer.from_str(tiny_tokenizer_json()), max_tokens=12)
    report = [] if skipped is None else skipped
    settings = {"preprocessing": SMALL, "augmentation": Augmentation(), "workers": 0, **options}
    return PixelFeed(pairs, tokeniser=tokeniser, on_skip=report.append, **settings)


def plan(pairs, *, batch_size: int = 4, epoch: int = 0) -> list[list[Draw]]:
    return plan_epoch(pairs, [1] * len(pairs), batch_size=batch_size, seed=0, epoch=epoch)


def blue(batch) -> list[int]:
    """Which picture is at each place, by its blue."""
    return [round(float(image[..., 2].float().mean()) / 20) for image in batch.images]


def test_a_batch_holds_what_was_planned(tmp_path):
    """Pictures, tokens, groups and captions of the draws, place by place."""
    pairs = some_pairs(tmp_path)
    wanted = plan(pairs)
    with feed(pairs, augmentation=NO_AUGMENTATION) as source:
        batches = list(source.batches(wanted))
    assert [batch.draws for batch in batches] == wanted
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((4, 16, 16, 3), torch.uint8)
        assert batch.ids.shape == batch.mask.shape
        assert (batch.ids.dtype, batch.mask.dtype, batch.groups.dtype) == (torch.int64,) * 3
        assert blue(batch) == [draw.row for draw in batch.draws]
        assert batch.captions == [pairs[draw.row].captions[draw.caption] for draw in batch.draws]
        same = batch.groups[:, None] == batch.groups[None]
        names = [pairs[draw.row].group for draw in batch.draws]
        assert same.tolist() == [[a == b for b in names] for a in names]


def test_plain_views_are_what_the_encoder_sees(tmp_path):
    """No augmentation: `prepare(open_image(...))`."""
    pairs = some_pairs(tmp_path, 2)
    with feed(pairs, augmentation=None) as source:
        (batch,) = source.batches([[Draw(1, 0, 7)]])
    expected = prepare(open_image(pairs[1].image, target=16)[0], SMALL)
    np.testing.assert_array_equal(batch.images[0].numpy(), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(tmp_path, workers):
    """Random views and dropped words included, also when batches are cut differently."""
    pairs = some_pairs(tmp_path)
    strong = Augmentation(crop=0.3, colour=0.4, word_drop=0.3)
    with feed(pairs, augmentation=strong) as source:
        expected = list(source.batches(plan(pairs)))
    with feed(pairs, augmentation=strong, workers=workers) as source:
        found = list(source.batches(plan(pairs)))
        (joined,) = source.batches([[draw for batch in plan(pairs) for draw in batch]])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ids, other.ids)
        assert one.captions == other.captions
    assert torch.equal(torch.cat([batch.images for batch in expected]), joined.images)


def test_views_differ_from_draw_to_draw(tmp_path):
    """And are the same for the same seed."""
    pairs = some_pairs(tmp_path, 1)
    with feed(pairs) as source:
        (batch,) = source.batches([[Draw(0, 0, 1), Draw(0, 0, 2), Draw(0, 0, 1)]])
    assert not torch.equal(batch.images[0], batch.images[1])
    assert torch.equal(batch.images[0], batch.images[2])


def test_a_picture_is_not_mirrored_when_its_caption_names_a_side(tmp_path):
    """The caption that was drawn decides, not the others of the picture."""
    pairs = [Pair(picture(tmp_path / "a.png"), ("a car on the left", "a car"), "g")]
    with feed(pairs, augmentation=FLIP) as source:
        (batch,) = source.batches([[Draw(0, 0, 0), Draw(0, 1, 0)]])
    red = batch.images[..., 0].float().mean(dim=1)
    assert red[0, 0] < red[0, -1]
    assert red[1, 0] > red[1, -1]


def test_words_are_dropped_from_captions(tmp_path):
    """By the seed of the draw, and never all of them."""
    pairs = some_pairs(tmp_path, 1)
    with feed(pairs, augmentation=Augmentation(word_drop=0.5)) as source:
        (batch,) = source.batches([[Draw(0, 0, seed) for seed in range(20)]])
    lengths = {len(caption.split()) for caption in batch.captions}
    assert len(lengths) > 2
    assert 0 not in lengths
    assert batch.mask.sum(dim=1).tolist() == [len(caption.split()) + 2 for caption in batch.captions]


def break_some(pairs, folder) -> set[int]:
    """Rows of pictures that are truncated, one pixel, no picture, or gone."""
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    picture(folder / "3.png", width=1, height=1)
    (folder / "4.png").write_text("<html>")
    (folder / "8.png").unlink()
    return {1, 3, 4, 8}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_left_out_and_shift_nothing(tmp_path, workers):
    """Reported once with a reason; every caption that is left still stands beside its own picture."""
    pairs, skipped = some_pairs(tmp_path), []
    broken = break_some(pairs, tmp_path)
    with feed(pairs, skipped=skipped, augmentation=NO_AUGMENTATION, workers=workers) as source:
        for epoch in range(3):
            wanted = plan(pairs, epoch=epoch)
            batches = list(source.batches(wanted))
            assert len(batches) == len(wanted)
            for batch, draws in zip(batches, wanted, strict=True):
                assert batch.draws == [draw for draw in draws if draw.row not in broken]
                assert blue(batch) == [draw.row for draw in batch.draws]
                assert len(batch.ids) == len(batch.mask) == len(batch.groups) == len(batch.draws)
    reasons = {os.path.basename(one.path): one.reason for one in skipped}
    assert len(skipped) == len(broken)
    assert reasons == {
        "1.png": SkipReason.TRUNCATED,
        "3.png": SkipReason.TOO_SMALL,
        "4.png": SkipReason.NOT_AN_IMAGE,
        "8.png": SkipReason.VANISHED,
    }


def test_a_batch_of_broken_pictures_is_empty_not_missing(tmp_path):
    """Steps are counted by the plan."""
    pairs = some_pairs(tmp_path)
    break_some(pairs, tmp_path)
    with feed(pairs) as source:
        empty, full = source.batches([[Draw(1, 0, 0), Draw(3, 0, 0)], [Draw(0, 0, 0), Draw(2, 0, 0)]])
    assert (empty.draws, empty.images.shape, empty.ids.shape) == ([], (0, 16, 16, 3), (0, 1))
    assert (empty.groups.shape, empty.groups.dtype) == ((0,), torch.int64)
    assert len(full.draws) == 2


def test_a_picture_that_comes_back_is_used_again(tmp_path):
    """A mount may have been away; a picture that is broken is not read a second time."""
    pairs, skipped = some_pairs(tmp_path), []
    break_some(pairs, tmp_path)
    with feed(pairs, skipped=skipped) as source:
        list(source.batches([[Draw(8, 0, 0), Draw(4, 0, 0)]]))
        picture(tmp_path / "8.png")
        picture(tmp_path / "4.png")
        (batch,) = source.batches([[Draw(8, 0, 0), Draw(4, 0, 0)]])
    assert [draw.row for draw in batch.draws] == [8]
    assert len(skipped) == 2


def gone(pids) -> bool:
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_no_worker_is_left(tmp_path):
    """After the end, after stopping in the middle, and after an error in a step."""
    pairs = some_pairs(tmp_path)
    source = feed(pairs, workers=1)
    with pytest.raises(ZeroDivisionError), source:
        for _ in source.batches(plan(pairs, batch_size=2)):
            pids = source.worker_pids
            raise ZeroDivisionError
    assert pids
    assert gone(pids)
    source.close()


def test_a_plan_left_in_the_middle_does_not_disturb_the_next(tmp_path):
    """Early stopping, then another epoch."""
    pairs = some_pairs(tmp_path)
    with feed(pairs, workers=1, augmentation=NO_AUGMENTATION) as source:
        first = source.batches(plan(pairs, batch_size=1))
        next(first)
        first.close()
        (batch,) = source.batches([[Draw(5, 0, 0), Draw(6, 0, 0)]])
    assert blue(batch) == [5, 6]


def test_worker_numbers_that_cannot_be_are_refused(tmp_path):
    """Before any process is started."""
    with pytest.raises(UsageError, match="workers"):
        feed(some_pairs(tmp_path, 1), workers=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_pictures_come_plain_in_order_and_without_the_broken(tmp_path, workers):
    """With the positions they have; a tiny one counts, since an evaluation would count it."""
    pairs, skipped = some_pairs(tmp_path), []
    broken = break_some(pairs, tmp_path) - {3}
    found = list(
        plain_pixels(
            [pair.image for pair in pairs], preprocessing=SMALL, batch_size=4, workers=workers, on_skip=skipped.append
        )
    )
    assert np.concatenate([rows for rows, _ in found]).tolist() == [i for i in range(10) if i not in broken]
    assert [len(pixels) for _, pixels in found] == [4, 3]
    assert found[0][1].shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(found[0][1][0], prepare(open_image(pairs[0].image, target=16)[0], SMALL))
    assert len(skipped) == 3


def test_a_view_is_decoded_large_enough_for_its_crop(tmp_path):
    """A crop of a quarter of the area needs twice the side, also of a JPEG that could come back smaller."""
    path = tmp_path / "large.jpg"
    Image.new("RGB", (1600, 1200)).save(path)
    view = view_of(Augmentation(crop=0.25, colour=0.0, ratio=1.0), seed=1, may_flip=True)
    for seed in range(20):
        image, info = open_view(path.read_bytes(), target=100, where="large.jpg", **{**view, "seed": seed})
        assert min(image.size) >= 100
        assert (info.width, info.height) == (1600, 1200)
    plain, _ = open_view(path.read_bytes(), target=100, where="large.jpg")
    assert plain.size == (200, 150)


@pytest.mark.parametrize(("width", "height", "fits"), [(8, 8, True), (7, 500, False), (1, 1, False)])
def test_tiny_pictures_are_refused_with_their_size(tmp_path, width, height, fits):
    """A tracking pixel is no photo of anything."""
    picture(tmp_path / "a.png", width=width, height=height)
    data = (tmp_path / "a.png").read_bytes()
    if fits:
        assert open_view(data, target=16, where="a.png")[0].size == (8, 8)
    else:
        with pytest.raises(ImageError, match=rf"too small \({width}x{height} pixels"):
            open_view(data, target=16, where="a.png")

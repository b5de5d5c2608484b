"""Batches from kept views: what a feed of pixels would give, but for the pictures themselves."""

import pytest
import torch
from train_kit import passes, picture, tokeniser, tokens

from mmsearch.testing import tiny_dual_encoder
from mmsearch.train.augment import Augmentation, names_a_side
from mmsearch.train.batches import Draw, plan_epoch
from mmsearch.train.encoding import Texts
from mmsearch.train.feed import PixelFeed
from mmsearch.train.pictures import KeptFeed, closing_feed, joined_captions
from mmsearch.train.prefix import FrozenBackbone, KeptViews, view_seed
from mmsearch.types import Pair, Preprocessing

VIEWS = 2
PLAIN = Augmentation(crop=1.0, ratio=1.0, flip=0.0, colour=0.0, word_drop=0.4)


def pairs_of(folder, *, broken=()) -> list[Pair]:
    made = []
    for i, colour in enumerate(("red", "green", "blue", "yellow", "white", "cyan")):
        path = picture(folder / f"{i}.png", colour, "black", seed=i)
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"no picture")
        made.append(Pair(path, (f"a {colour} car on the beach", f"photo of the {colour} dog"), f"g{i % 5}"))
    return made


def feeds(folder, *, broken=(), augmentation=PLAIN, keep_texts=False):
    """(kept feed, pixel feed, the passes that both are made for)."""
    pairs, model = pairs_of(folder, broken=broken), tiny_dual_encoder()
    one = passes(model, prefix=FrozenBackbone(model.image.backbone, model.image.pooling))

    def pixel_feed(of):
        return PixelFeed(
            of, preprocessing=Preprocessing(size=32), tokeniser=tokeniser(), augmentation=augmentation, workers=0,
            on_skip=lambda skipped: None,
        )  # fmt: skip

    views = KeptViews(folder / "views", pairs, views=VIEWS, made_by=("w", Preprocessing(size=32), augmentation))
    views.fill(
        pixel_feed(joined_captions(pairs)).batches, shape=(16,), batch_size=4, encode=one.prefix_outputs,
        advance=lambda n: None,
    )  # fmt: skip
    texts = None
    if keep_texts:
        texts = Texts([caption for pair in pairs for caption in pair.captions], one, tokens, keep=True)
    pixels = pixel_feed(pairs)
    return KeptFeed(pairs, views, pixels=pixels, texts=texts), pixels, one


def plan_of(pairs: int = 6):
    fake = [Pair(str(i), ("a", "b"), f"g{i % 5}") for i in range(pairs)]
    return plan_epoch(fake, [1] * pairs, batch_size=3, seed=0, epoch=0)


def test_batches_are_those_of_a_feed_of_pixels(tmp_path):
    """Draws, tokens with the same words dropped, groups and captions; of the pictures the features."""
    kept, pixels, one = feeds(tmp_path)
    for own, other in zip(kept.batches(plan_of()), pixels.batches(plan_of()), strict=True):
        assert (own.draws, own.captions) == (other.draws, other.captions)
        for name in ("ids", "mask", "groups", "owners"):
            assert torch.equal(getattr(own, name), getattr(other, name))
        expected = one.prefix_outputs(other.images)  # all views are the plain one here
        assert (own.images.float() - expected).abs().max() < 0.01 * (1 + expected.abs().max())


@pytest.mark.parametrize("keep_texts", [False, True])
def test_a_picture_that_cannot_be_read_is_left_out_of_its_batches(keep_texts, tmp_path):
    """As a feed of pixels would; a batch of nothing but those is empty, and there is one for each that was planned."""
    kept, pixels, _ = feeds(tmp_path, broken=[1, 2], keep_texts=keep_texts)
    plan = [*plan_of(), [draw for draws in plan_of() for draw in draws if draw.row in (1, 2)]]
    for own, other in zip(kept.batches(plan), pixels.batches(plan), strict=True):
        assert own.draws == other.draws
        assert len(own.images) == len(own.ids) == len(own.mask) == len(own.groups) == len(own.draws)


@torch.no_grad()
def test_kept_texts_give_the_rows_that_tokens_give(tmp_path):
    """Features of the very caption that was drawn stand in the place of its tokens."""
    kept, pixels, one = feeds(tmp_path, augmentation=None, keep_texts=True)
    for own, other in zip(kept.batches(plan_of()), pixels.batches(plan_of()), strict=True):
        assert own.ids.is_floating_point()
        assert (one.texts(own.ids, own.mask) - one.texts(other.ids, other.mask)).abs().max() < 1e-5


def test_a_view_is_drawn_by_the_draws_seed(tmp_path):
    """The same draw sees the same view in every epoch and every process; another seed another one."""
    kept, _, _ = feeds(tmp_path, augmentation=Augmentation(crop=0.3, flip=0.0))
    one = [next(kept.batches([[draw]])).images for draw in plan_of()[0] for _ in range(2)]
    assert torch.equal(one[0], one[1])
    draw = plan_of()[0][0]
    other = next(kept.batches([[type(draw)(draw.row, draw.caption, draw.seed + 1)]])).images
    assert not torch.equal(one[0], other)


def test_a_kept_view_is_what_decoding_it_anew_gives(tmp_path):
    """The view of that number, of that file: cropped, mirrored and coloured alike; only half precision is between."""
    kept, pixels, one = feeds(tmp_path, augmentation=Augmentation(crop=0.3, colour=0.5))
    draws = [draw for draws in plan_of() for draw in draws]
    (own,) = kept.batches([draws])
    anew = [Draw(draw.row, 0, view_seed(pixels._pairs[draw.row], draw.seed % VIEWS)) for draw in draws]
    (other,) = pixels.batches([anew])
    expected = one.prefix_outputs(other.images)
    assert (own.images.float() - expected).abs().max() < 0.01 * (1 + expected.abs().max())


def test_one_caption_that_names_a_side_keeps_all_views_as_they_are():
    """A kept view is shared by all captions of its picture."""
    joined = joined_captions([Pair("a.png", ("a dog", "the dog on the left", "a cat"), "g")])
    assert len(joined[0].captions) == 1
    assert names_a_side(joined[0].captions)


def test_what_makes_batches_ends_with_the_block():
    """Not when the traceback of an error in a step is forgotten; a plain iterator has nothing to end."""
    ended = []

    def endless():
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    with pytest.raises(ZeroDivisionError), closing_feed(endless()) as batches:
        next(batches)
        raise ZeroDivisionError
    assert ended == [True]
    with closing_feed(iter([1])) as batches:
        assert list(batches) == [1]

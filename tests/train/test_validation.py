"""Held-out pairs, encoded again and again: the same as the model itself gives, and nothing about the model changes."""

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import passes, picture, tokens

from mmsearch.errors import InputError
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.train.prefix import FrozenPrefix
from mmsearch.train.validation import Validation, score_of
from mmsearch.types import Pair, SkipReason

COLOURS = ("red", "green", "blue", "yellow", "white")


def pairs_of(folder, *, broken=()) -> list[Pair]:
    """Five pictures, one or two captions each; the first two are of one group."""
    made = []
    for i, colour in enumerate(COLOURS):
        path = picture(folder / f"{i}.png", colour, "black", seed=i)
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"no picture")
        texts = (f"a {colour} car", f"the {colour} dog")[: 1 + i % 2]
        made.append(Pair(path, texts, "both" if i < 2 else str(i)))
    return made


def validation_of(pairs, one, *, skipped=None, **options) -> Validation:
    report = [] if skipped is None else skipped
    return Validation(
        pairs, passes=one, tokens=tokens, preprocessing=one.model.config.preprocessing, workers=0,
        on_skip=report.append, **options,
    )  # fmt: skip


def decoded(pair, model) -> np.ndarray:
    size = model.config.preprocessing.size
    return np.array(Image.open(pair.image).resize((size, size), Image.Resampling.BICUBIC))


def by_hand(model, pairs):
    """The same evaluation with the model's own two methods, one picture at a time."""
    with torch.no_grad():
        images = torch.cat([model.encode_images(torch.from_numpy(decoded(pair, model))[None]) for pair in pairs])
        texts = model.encode_texts(*tokens([caption for pair in pairs for caption in pair.captions]))
    names = [pair.group for pair in pairs]
    numbers = np.array([names.index(name) for name in names])
    owners = np.repeat(np.arange(len(pairs)), [len(pair.captions) for pair in pairs])
    return evaluate_rows(
        texts.numpy(), images.numpy(), text_groups=numbers[owners], image_groups=numbers, model="by hand"
    )


def same(one, other) -> bool:
    return (one.images, one.texts, one.text_to_image.values, one.image_to_text.values) == (
        other.images, other.texts, other.text_to_image.values, other.image_to_text.values,
    )  # fmt: skip


def test_an_evaluation_is_that_of_the_rows_of_the_model(tmp_path):
    """Captions of one group belong to all its pictures; the second time, from what was kept, it is the same."""
    model, pairs = tiny_dual_encoder(), pairs_of(tmp_path)
    validation = validation_of(pairs, passes(model))
    found = validation.evaluate(name="tiny")
    assert same(found, by_hand(model, pairs))
    assert same(validation.evaluate(name="again"), found)
    assert (found.model, len(validation)) == ("tiny", 5)


@pytest.mark.parametrize("mirror", [False, True])
def test_from_frozen_stages_it_is_the_same(mirror, tmp_path):
    """What is kept between validations are then their outputs, of both mirror images where the model wants both."""
    config = {**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "mirror": mirror}}
    model, pairs = tiny_dual_encoder(config), pairs_of(tmp_path)
    one = passes(model, prefix=FrozenPrefix(model.image.backbone, 1))
    validation = validation_of(pairs, one, keep_texts=True)
    assert same(validation.evaluate(name="a"), by_hand(model, pairs))
    assert same(validation.evaluate(name="b"), by_hand(model, pairs))
    model.eval()
    with torch.no_grad():
        rows = model.encode_images(torch.stack([torch.from_numpy(decoded(pair, model)) for pair in pairs])).numpy()
        found = validation._images()[1]
    assert np.allclose(found, rows, atol=2e-3)  # kept in half precision


def test_it_is_measured_in_evaluation_mode_and_every_mode_comes_back(tmp_path):
    """A step that follows finds each module as it was, also when no picture could be read."""
    model = tiny_dual_encoder()
    model.train()
    model.text.eval()
    modes = [module.training for module in model.modules()]
    found = validation_of(pairs_of(tmp_path), passes(model)).evaluate(name="a")
    assert [module.training for module in model.modules()] == modes
    assert same(found, by_hand(model.eval(), pairs_of(tmp_path)))
    model.train()
    with pytest.raises(InputError, match="at least one that can be read"):
        validation_of(pairs_of(tmp_path, broken=range(5)), passes(model)).evaluate(name="a")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_a_broken_picture_is_left_out_with_its_captions_and_told_once(budget, tmp_path):
    """However often it is measured, and whether pictures are kept or decoded anew."""
    pairs, model, skipped = pairs_of(tmp_path, broken=[1]), tiny_dual_encoder(), []
    validation = validation_of(pairs, passes(model), skipped=skipped, budget=budget)
    found = [validation.evaluate(name="a") for _ in range(3)]
    assert all(same(one, by_hand(model, [pairs[0], *pairs[2:]])) for one in found)
    assert [(one.path, one.reason) for one in skipped] == [(pairs[1].image, SkipReason.NOT_AN_IMAGE)]


@pytest.mark.parametrize("cut", [0, 1])
def test_more_pictures_than_the_budget_are_decoded_each_time(cut, tmp_path):
    """Also outputs of frozen stages, which may be larger than the pictures; what fits is decoded once."""
    pairs, model = pairs_of(tmp_path), tiny_dual_encoder()
    one = passes(model, prefix=FrozenPrefix(model.image.backbone, 1) if cut else None)
    small, large = validation_of(pairs, one, budget=100), validation_of(pairs, one, budget=1 << 20)
    before = [validation.evaluate(name="a") for validation in (small, large)]
    for pair in pairs[1:]:
        (tmp_path / pair.image).write_bytes(b"gone")
    assert small.evaluate(name="b").images == 1
    assert same(large.evaluate(name="b"), before[1])
    large.forget()
    assert large.evaluate(name="c").images == 1


def test_the_score_is_the_mean_of_six_shares(tmp_path):
    """hit@1, hit@5 and hit@10 of both directions."""
    found = validation_of(pairs_of(tmp_path), passes()).evaluate(name="a")
    six = [way.values[f"hit@{k}"] for way in (found.text_to_image, found.image_to_text) for k in (1, 5, 10)]
    assert score_of(found) == pytest.approx(sum(six) / 6)

"""The gradient of one batch: the same however it is cut, and with all that is asked for beside the loss."""

import numpy as np
import pytest
import torch
from torch import nn
from train_kit import passes, pixels, some_captions, tokens

from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.train.batches import Draw
from mmsearch.train.distributed import Ranks
from mmsearch.train.feed import Batch
from mmsearch.train.losses import Distillation, InfoNce, build_objective
from mmsearch.train.step import BatchGradient, StepParts, Taught
from mmsearch.types import Pair

COUNT = 6
PAIRS = [Pair(f"{i}.png", (f"a red dog {'of ' * i}", f"the blue cat {'on ' * i}"), f"g{i % 5}") for i in range(COUNT)]


def batch_of(count: int = COUNT) -> Batch:
    draws = [Draw(i, i % 2, i) for i in range(count)]
    captions = [PAIRS[draw.row].captions[draw.caption] for draw in draws]
    groups = torch.tensor([i % 5 for i in range(count)])
    return Batch(draws, pixels(count), *tokens(captions), groups, captions, torch.arange(count))


def gradient_of(model, objective, **parts):
    """(loss, {name: gradient}) of one batch."""
    model.zero_grad()
    objective.zero_grad()
    own = BatchGradient(StepParts(passes(model), objective, Ranks(), PAIRS, tokens, **parts))
    loss = own.backward(batch_of())
    named = [*model.named_parameters(), *objective.named_parameters()]
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def close(one, other, *, within: float = 1e-4) -> bool:
    assert one.keys() == other.keys()
    return all((one[name] - other[name]).norm() <= within * (1 + other[name].norm()) for name in one)


def with_items(kind: str = "gated"):
    return tiny_dual_encoder({**TINY_CONFIG, "item": {"kind": kind}})


def test_the_loss_is_the_objective_of_the_models_own_rows():
    """Texts, pictures, groups and the temperature arrive where they belong."""
    model, objective = tiny_dual_encoder(), InfoNce()
    batch = batch_of()
    texts, images = model.encode_texts(batch.ids, batch.mask), model.encode_images(batch.images)
    named = {"text_groups": batch.groups, "image_groups": batch.groups}
    expected = objective(texts, images, model.logit_scale, **named)
    expected.backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss, gradients = gradient_of(model, objective)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert close(gradients, by_hand)
    assert "log_logit_scale" in gradients


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "info_nce+10*max_hinge"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_cut_into_chunks_loss_and_gradients_are_the_same(name, chunk):
    """Also of the objective's own numbers (the sigmoid's bias), and of a side with items."""
    for model in (tiny_dual_encoder(), with_items()):
        whole, expected = gradient_of(model, build_objective(name))
        cut, got = gradient_of(model, build_objective(name), chunk=chunk)
        assert cut == pytest.approx(whole, rel=1e-4)
        assert close(got, expected, within=1e-3)


def test_the_returned_loss_is_not_scaled_and_the_gradient_is():
    """Half of it for two accumulated batches."""
    model = tiny_dual_encoder()
    parts = StepParts(passes(model), InfoNce(), Ranks(), PAIRS, tokens)
    whole, expected = gradient_of(model, InfoNce())
    model.zero_grad()
    half = BatchGradient(parts).backward(batch_of(), scale=lambda value: value / 2)
    got = {name: 2 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert half == pytest.approx(whole)
    assert close(got, expected)


def test_a_head_for_items_learns_from_a_part_of_the_loss_of_its_own():
    """A model without one has the same loss less that part; the head's numbers get a gradient."""
    model = with_items()
    _, gradients = gradient_of(model, InfoNce(), modality_dropout=0.5)
    assert any(name.startswith("item.") for name in gradients)
    with_part, _ = gradient_of(model, InfoNce())
    model.item = None
    without, _ = gradient_of(model, InfoNce())
    assert with_part > without + 0.1


def taught(*, scale: float = 20.0, same_as=None) -> Taught:
    """Rows of a teacher of d = 3 that knows each pair; or the rows of a model."""
    captions = [caption for pair in PAIRS for caption in pair.captions]
    if same_as is not None:
        with torch.no_grad():
            images, texts = same_as.encode_images(pixels(COUNT)), same_as.encode_texts(*tokens(captions))
    else:
        draw = torch.Generator().manual_seed(3)
        images = nn.functional.normalize(torch.randn(COUNT, 3, generator=draw), dim=1)
        texts = images.repeat_interleave(2, dim=0)
    return Taught(Distillation(1.0, scale), images, texts, torch.from_numpy(np.arange(COUNT) * 2))


def test_a_teacher_adds_what_is_not_its_own_ranking():
    """Nothing when the teacher is the model itself at its own scale; rows of the very captions that were drawn."""
    model = tiny_dual_encoder()
    plain, _ = gradient_of(model, InfoNce())
    own = taught(same_as=model, scale=float(model.logit_scale.detach()))
    assert gradient_of(model, InfoNce(), taught=own)[0] == pytest.approx(plain, abs=1e-4)
    assert gradient_of(model, InfoNce(), taught=taught())[0] > plain + 0.1
    texts, images = own.rows(batch_of().draws)
    with torch.no_grad():
        assert (texts - model.encode_texts(*tokens(batch_of().captions))).abs().max() < 1e-5
        assert (images - model.encode_images(pixels(COUNT))).abs().max() < 1e-5


def test_captions_of_any_number_take_the_same_path():
    """A batch of forty is encoded in pieces by length, as one of six is at once."""
    model = tiny_dual_encoder()
    captions = some_captions(40)
    batch = Batch([Draw(0, 0, 0)] * 40, pixels(40), *tokens(captions), torch.arange(40), captions, torch.arange(40))
    parts = StepParts(passes(model), InfoNce(), Ranks(), PAIRS, tokens)
    with torch.no_grad():
        rows = model.encode_texts(batch.ids, batch.mask), model.encode_images(batch.images)
        named = {"text_groups": batch.groups, "image_groups": batch.groups}
        expected = float(InfoNce()(*rows, model.logit_scale, **named))
    assert BatchGradient(parts).backward(batch) == pytest.approx(expected, rel=1e-4)


def test_several_captions_of_a_picture_are_pairs_of_their_own():
    """The same loss and gradient as a batch that holds the picture once for each of its captions."""
    model, draws = tiny_dual_encoder(), [Draw(i, 0, i) for i in range(3)]
    captions = [caption for draw in draws for caption in PAIRS[draw.row].captions]
    owners, images, groups = torch.arange(3).repeat_interleave(2), pixels(3), torch.arange(3)
    once = Batch(draws, images, *tokens(captions), groups, captions, owners)
    repeated = [Draw(draw.row, number, draw.seed) for draw in draws for number in (0, 1)]
    each = Batch(repeated, images[owners], *tokens(captions), groups[owners], captions, torch.arange(6))
    found = []
    for batch, chunk in ((once, 0), (each, 0), (once, 2)):
        model.zero_grad()
        own = BatchGradient(StepParts(passes(model), InfoNce(), Ranks(), PAIRS, tokens, chunk=chunk))
        loss = own.backward(batch)
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5) and close(found[0][1], gradient, within=1e-3)


def test_a_teacher_looks_at_the_first_caption_alone():
    """Its part of the loss is that of a batch with one caption a picture."""
    model, draws = tiny_dual_encoder(), [Draw(i, 0, i) for i in range(3)]
    rng = np.random.default_rng(0)
    rows = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(12, 8)).astype(np.float32)), dim=1)
    taught = Taught(Distillation(1.0, 20.0), rows[:6], rows, torch.arange(0, 12, 2))
    values = []
    for count in (1, 2):
        captions = [caption for draw in draws for caption in PAIRS[draw.row].captions[:count]]
        owners = torch.arange(3).repeat_interleave(count)
        batch = Batch(draws, pixels(3), *tokens(captions), torch.arange(3), captions, owners)
        with_teacher, without = (
            BatchGradient(StepParts(passes(model), InfoNce(), Ranks(), PAIRS, tokens, taught=one)).backward(batch)
            for one in (taught, None)
        )
        values.append(with_teacher - without)
    assert values[0] == pytest.approx(values[1], abs=1e-5)

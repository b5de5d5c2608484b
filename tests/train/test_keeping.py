"""Keeping the classifier's verdicts: nothing while nothing moves, and the same however it is cut."""

import pytest
import torch
from train_kit import passes, pixels

from mmsearch.testing import tiny_dual_encoder
from mmsearch.train.keeping import KeptClasses
from mmsearch.train.prefix import FrozenPrefix


def moved(model, by: float = 0.2):
    """The last convolution is another one."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        model.image.backbone.stages[3].weight.add_(by * torch.randn(16, 8, 3, 3, generator=draw))
    return model


def by_hand(before, now, images) -> float:
    """KL of the verdicts of the first pictures, an eighth but at least four."""
    part = images[: max(4, len(images) // 8)]
    verdicts = []
    for model in (before, now):
        with torch.no_grad():
            features = model.image.pooled(model.normalise_pixels(part))
            verdicts.append(model.image.anchors.classifier(features).log_softmax(dim=-1))
    first, second = verdicts
    return float((first.exp() * (first - second)).sum(dim=1).mean())


def test_it_is_nothing_while_the_backbone_is_what_it_was():
    """And has no gradient there."""
    model = tiny_dual_encoder()
    value = KeptClasses(passes(model), weight=3.0).backward(pixels(6))
    assert value == pytest.approx(0.0, abs=1e-6)
    assert model.image.backbone.stages[3].weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize("count", [2, 6, 40])
def test_it_is_the_weighted_divergence_of_an_eighth_of_the_batch(count):
    """At least four pictures, or as many as there are."""
    model = tiny_dual_encoder()
    kept = KeptClasses(passes(model), weight=3.0)
    expected = 3.0 * by_hand(tiny_dual_encoder(), moved(model), pixels(count))
    assert kept.backward(pixels(count)) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize("chunk", [1, 3])
def test_in_chunks_value_and_gradient_are_the_same(chunk):
    """A big batch's part is itself larger than what fits."""
    found = []
    for size in (0, chunk):
        model = tiny_dual_encoder()
        kept = KeptClasses(passes(model), weight=2.0, chunk=size)
        weight = moved(model).image.backbone.stages[3].weight
        found.append((kept.backward(pixels(40), scale=lambda value: value * 4), weight.grad))
    (whole, expected), (cut, got) = found
    assert cut == pytest.approx(whole, rel=1e-3)
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_from_frozen_stages_it_is_the_same():
    """What is frozen is shared with the copy, and takes no second place in memory."""
    model = tiny_dual_encoder()
    one = passes(model, prefix=FrozenPrefix(model.image.backbone, 1))
    kept = KeptClasses(one, weight=1.0)
    expected = by_hand(tiny_dual_encoder(), moved(model), pixels(6))
    with torch.no_grad():
        outputs = one.prefix_outputs(pixels(6))
    assert kept.backward(outputs) == pytest.approx(expected, rel=1e-3)
    assert kept._before[0].stages[0].weight is model.image.backbone.stages[0].weight

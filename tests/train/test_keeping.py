"""Keeping the classifier's verdicts and names: what the value is, who follows it, and the same however it is cut."""

import pytest
import torch
from train_kit import passes, pixels, tokens

from mmsearch.testing import tiny_dual_encoder
from mmsearch.train.keeping import NAMES_MARGIN, NAMES_SAID, KeptClasses, KeptNames
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix


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


# Names

NAMES = ["dog", "cat", "car", "beach", "red"]


def named(model, *, heads_only=True, whole=False, weight=2.0, chunk=0, one=None):
    return KeptNames(
        one or passes(model), names=NAMES, tokens=tokens, weight=weight, heads_only=heads_only, whole=whole, chunk=chunk
    )  # fmt: skip


def shortfall(model, images, sentence) -> float:
    """As the class says, by whole towers."""
    with torch.no_grad():
        names = model.encode_texts(*tokens([sentence.format(name) for name in NAMES]))
        normalised = model.normalise_pixels(images)
        verdicts = model.image.anchors.classifier(model.image.pooled(normalised)).softmax(dim=-1)
        told = []
        for row, verdict in zip(model.image(normalised), verdicts, strict=True):
            found, seen = (row @ names.T).tolist(), int(verdict.argmax())
            rival = max(score for place, score in enumerate(found) if place != seen)
            told.append(float(verdict[seen]) * max(0.0, NAMES_MARGIN - found[seen] + rival))
        return sum(told) / len(told)


def drawn_by(seed) -> str:
    torch.manual_seed(seed)
    sentence = NAMES_SAID[int(torch.randint(len(NAMES_SAID), ()))]
    torch.manual_seed(seed)
    return sentence


def test_names_are_how_far_the_own_one_is_behind_weighted_by_how_sure_the_verdict_is():
    """Of an eighth of the batch, in one sentence after the other, drawn by torch's numbers."""
    model = tiny_dual_encoder().eval()
    kept, seen = named(model), set()
    for seed in range(12):
        sentence = drawn_by(seed)
        expected = 2.0 * shortfall(model, pixels(40)[:5], sentence)
        assert kept.backward(pixels(40)) == pytest.approx(expected, rel=1e-4)
        seen.add(sentence)
    assert len(seen) > 3


def test_names_that_are_found_teach_nothing():
    """0 where each picture's own name is ahead by more than the margin; the own one is no rival."""
    model = tiny_dual_encoder().eval()
    model.image.anchors.set_names(torch.eye(5, model.config.dim))
    with torch.no_grad():
        model.image.anchors.scale.fill_(100.0)
        model.image.anchors.classifier.weight.mul_(100.0)
    assert named(model, heads_only=False).backward(pixels(6)) == 0.0


def test_a_class_of_the_same_name_is_no_rival():
    """ImageNet has two cranes: neither can be ahead of the other, in whatever case they are written."""
    model = tiny_dual_encoder().eval()
    rows = torch.eye(5, model.config.dim)
    with torch.no_grad():
        model.image.anchors.scale.fill_(100.0)
        model.image.anchors.classifier.weight.mul_(100.0)
        seen = model.image.anchors.classifier(model.image.pooled(model.normalise_pixels(pixels(6)))).argmax(-1)
    own, twin = int(seen[0]), (int(seen[0]) + 1) % 5
    rows[twin] = rows[own]
    model.image.anchors.set_names(rows)
    assert named(model, heads_only=False).backward(pixels(6)) > 0.0
    twins = [*NAMES]
    twins[twin] = twins[own].upper()
    kept = KeptNames(passes(model), names=twins, tokens=tokens, weight=2.0, heads_only=False, whole=False)
    assert kept.backward(pixels(6)) == 0.0


@pytest.mark.parametrize("pooled", [False, True])
def test_where_only_heads_learn_all_pictures_are_taught(pooled):
    """From pixels, and from features that are kept."""
    model = tiny_dual_encoder().eval()
    one = passes(model, prefix=FrozenBackbone(model.image.backbone, model.image.pooling) if pooled else None)
    with torch.no_grad():
        images = one.prefix_outputs(pixels(40)) if pooled else pixels(40)
    expected = 2.0 * shortfall(model, pixels(40), drawn_by(0))
    assert named(model, whole=True, one=one).backward(images) == pytest.approx(expected, rel=1e-3)


def test_both_heads_follow_the_names():
    """And a text backbone that is frozen does not."""
    model = tiny_dual_encoder().eval()
    named(model).backward(pixels(6))
    for tower in (model.text, model.image):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.projection.parameters())
    assert all(p.grad is None for p in model.text.backbone.parameters())


def test_a_text_backbone_that_learns_is_followed_by_the_anchors_rows():
    """Nothing of the text tower is asked; the value is that of the rows as they were last said."""
    model = tiny_dual_encoder().eval()
    rows = torch.randn(5, model.config.dim, generator=torch.Generator().manual_seed(1))
    model.image.anchors.set_names(rows)
    first = named(model, heads_only=False).backward(pixels(6))
    assert all(p.grad is None for p in model.text.parameters())
    model.image.anchors.set_names(torch.randn(rows.shape, generator=torch.Generator().manual_seed(2)))
    assert named(model, heads_only=False).backward(pixels(6)) != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 3])
def test_names_in_chunks_are_the_same(chunk):
    found = []
    for size in (0, chunk):
        model = tiny_dual_encoder().eval()
        torch.manual_seed(0)
        value = named(model, chunk=size).backward(pixels(40), scale=lambda value: value * 4)
        found.append((value, next(model.image.projection.parameters()).grad))
    (whole, expected), (cut, got) = found
    assert cut == pytest.approx(whole, rel=1e-4)
    assert torch.allclose(got, expected, atol=1e-5)

"""Pooling, projection heads and anchors where their values are known."""

import pytest
import torch
from torch.nn import functional

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.towers.anchors import ClassNameAnchors
from mmsearch.towers.config import AnchorsConfig, DualEncoderConfig, ImageConfig, ProjectionConfig
from mmsearch.towers.image import joined_views
from mmsearch.towers.pooling import Pooling, masked_mean
from mmsearch.towers.projection import build_projection


def test_masked_mean_is_the_mean_of_what_the_mask_keeps():
    """Tokens 2 and 4 kept, 9 masked: 3."""
    tokens = torch.tensor([[[2.0], [4.0], [9.0]]])
    assert masked_mean(tokens, torch.tensor([[1, 1, 0]])).item() == 3.0


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e38])
def test_nothing_leaks_from_a_masked_token(junk):
    """NaN, infinity and overflow under the mask stay there."""
    tokens = torch.tensor([[[2.0], [junk], [junk]]])
    assert masked_mean(tokens, torch.tensor([[1, 0, 0]])).item() == 2.0


def test_masked_mean_of_nothing_is_zero():
    """A mask of zeros gives zeros, not NaN."""
    assert masked_mean(torch.ones(1, 2, 3), torch.zeros(1, 2)).abs().sum() == 0


@pytest.mark.parametrize(("kind", "expected"), [("avg", 2.5), ("mean", 2.5), ("max", 4.0)])
def test_pooling_a_map_has_known_values(kind, expected):
    """A 2 x 2 map of 1, 2, 3, 4."""
    assert Pooling(kind)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).item() == expected


def test_gem_lies_between_mean_and_max_and_follows_its_exponent():
    """Exponent 3: the cube root of the mean cube; exponent 1: the mean; a large one: close to the largest."""
    gem, values = Pooling("gem"), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert gem(values).item() == pytest.approx(25 ** (1 / 3), rel=1e-5)
    for exponent, expected in ((1.0, 2.5), (40.0, 4 * 0.25 ** (1 / 40))):
        with torch.no_grad():
            gem.exponent.fill_(exponent)
        assert gem(values).item() == pytest.approx(expected, rel=1e-3)


def test_prefix_tokens_are_left_out_of_the_mean_and_are_what_cls_takes():
    """One class token of 9 before patches 1 and 3."""
    tokens = torch.tensor([[[9.0], [1.0], [3.0]]])
    assert Pooling("mean", prefix=1)(tokens).item() == 2.0
    assert Pooling("max", prefix=1)(tokens).item() == 3.0
    assert Pooling("cls", prefix=1)(tokens).item() == 9.0


def test_a_residual_head_of_equal_widths_starts_as_the_identity():
    """So that a language model's geometry survives the first step; and its zeros do learn."""
    head, x = build_projection(ProjectionConfig("residual"), width=6, dim=6), torch.randn(4, 6)
    assert torch.equal(head(x), x)
    head(x).square().sum().backward()
    assert head.branch[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["linear", "mlp", "residual"])
@pytest.mark.parametrize("dim", [3, 6])
def test_every_head_ends_in_the_shared_dimension(kind, dim):
    """(b, w) -> (b, d), also where they differ."""
    head = build_projection(ProjectionConfig(kind, hidden=5, dropout=0.1, norm=True), width=6, dim=dim)
    assert head(torch.randn(2, 6)).shape == (2, dim)


def anchors_with(names, **config):
    anchors = ClassNameAnchors(AnchorsConfig(classes=len(names), **config), width=4, dim=names.shape[1])
    anchors.set_names(names)
    return anchors


def test_a_certain_classifier_adds_its_class_name_and_an_undecided_one_their_mean():
    """m · softmax · A: one row of A when one logit towers, the mean of the rows when all are equal."""
    anchors = anchors_with(torch.eye(3), scale=2.0)
    with torch.no_grad():
        anchors.classifier.weight.zero_()
        anchors.classifier.bias.zero_()
        assert torch.allclose(anchors(torch.randn(1, 4)), torch.full((1, 3), 2 / 3))
        anchors.classifier.bias[1] = 50.0
        assert torch.allclose(anchors(torch.randn(1, 4)), torch.tensor([[0.0, 2.0, 0.0]]), atol=1e-6)


def test_a_peak_lets_the_name_of_what_is_seen_stand_out():
    """Verdicts of 1/3 and 2/3 with twice as sharp ones, 1/5 and 4/5, half and half: 4/15 and 11/15. With none, none."""
    for peak, expected in ((0.5, [4 / 15, 11 / 15]), (0.0, [1 / 3, 2 / 3]), (1.0, [1 / 5, 4 / 5])):
        anchors = anchors_with(torch.eye(2), peak=peak, sharpness=2.0)
        with torch.no_grad():
            anchors.classifier.weight.zero_()
            anchors.classifier.bias.copy_(torch.tensor([0.0, 2.0]).log().clamp(min=0.0))
            assert torch.allclose(anchors(torch.randn(1, 4)), torch.tensor([expected]))


def test_anchor_names_are_scaled_to_norm_one_and_are_no_parameter():
    """A is a buffer: saved with the model, never trained."""
    anchors = anchors_with(torch.tensor([[3.0, 4.0], [0.0, 7.0]]))
    assert torch.allclose(anchors.names, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert "names" in anchors.state_dict()
    assert "names" not in dict(anchors.named_parameters())


def test_anchors_without_names_add_nothing():
    """Until `set_names`, an image tower with anchors is one without."""
    anchors = ClassNameAnchors(AnchorsConfig(classes=3), width=4, dim=2)
    assert anchors(torch.randn(2, 4)).abs().sum() == 0


def test_names_of_another_shape_are_refused():
    """(classes, d) or an error that says both."""
    with pytest.raises(UsageError, match=r"\(3, 3\)"):
        anchors_with(torch.eye(3)).set_names(functional.normalize(torch.randn(2, 3)))


# Both mirror images


def mirrored(mirror: bool):
    return tiny_dual_encoder({**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "mirror": mirror}})


def test_a_mirrored_tower_gives_the_mean_of_both_images():
    """So a picture and its mirror image have one row; in training each view stands for itself."""
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, both = mirrored(False).eval(), mirrored(True).eval()
    with torch.no_grad():
        one, other = plain.encode_images(pixels), plain.encode_images(pixels.flip(2))
        rows = both.encode_images(pixels)
        assert torch.allclose(rows, functional.normalize(one + other, dim=-1), atol=1e-5)
        assert torch.allclose(rows, both.encode_images(pixels.flip(2)), atol=1e-5)
        assert not torch.allclose(one, other, atol=1e-3)
        both.image.training = True  # the tower alone: its batch norms stay as they are
        assert torch.allclose(both.encode_images(pixels), one, atol=1e-5)


def test_joined_views_of_equal_rows_are_that_row():
    """First all pictures, then all mirror images: (2 b, d)."""
    rows = torch.eye(4)[:2]
    assert torch.equal(joined_views(torch.cat([rows, rows])), rows)


def test_a_tower_without_mirror_is_written_as_before_there_was_one():
    """Its identity stays, and indexes made with it stay good."""
    config = DualEncoderConfig.from_json(TINY_CONFIG)
    assert "mirror" not in config.to_json()["image"]
    twice = DualEncoderConfig.from_json({**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "mirror": True}})
    assert DualEncoderConfig.from_json(twice.to_json()) == twice
    assert twice.image.mirror
    with pytest.raises(ModelError, match="image mirror"):
        ImageConfig(mirror="yes")  # type: ignore[arg-type]

"""Towers as a step runs them: padding and cutting change no row, and a frozen side is encoded once."""

import numpy as np
import pytest
import torch
from train_kit import CPU, passes, pixels, some_captions, tokens

from mmsearch.errors import UsageError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.train.encoding import Texts, checkpoint_activations, pick_device, pick_precision
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix


@torch.no_grad()
def test_rows_of_many_captions_are_those_of_each_alone():
    """80 captions are encoded in pieces of similar length, and come back in their own order."""
    one = passes()
    texts = some_captions(80)
    rows = one.texts(*tokens(texts))
    alone = torch.cat([one.texts(*tokens([text])) for text in texts])
    assert (rows - alone).abs().max() < 1e-5
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-5


def test_gradients_of_many_captions_are_those_of_the_model_itself():
    """Sorting and cutting are undone in the backward pass, too."""
    model = tiny_dual_encoder()
    weights = torch.linspace(-1, 1, 70 * 8).reshape(70, 8)
    ids, mask = tokens(some_captions(70))
    found = []
    for encode in (passes(model).texts, model.encode_texts):
        model.zero_grad()
        (encode(ids, mask) * weights).sum().backward()
        found.append([p.grad.clone() for p in model.text.parameters() if p.grad is not None])
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-4 * (1 + expected.norm())


@torch.no_grad()
def test_pictures_are_the_rows_of_the_model_itself():
    """Unit rows in float32, the same as `encode_images`."""
    model = tiny_dual_encoder()
    assert (passes(model).images(pixels(3)) - model.encode_images(pixels(3))).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("cut", ["prefix", "backbone"])
def test_from_kept_outputs_the_same_rows_come(cut):
    """Behind one stage, or behind the whole backbone with its pooling."""
    model = tiny_dual_encoder()
    one, plain = passes(model), passes(model).images(pixels(3))
    tower = model.image
    one.prefix = FrozenPrefix(tower.backbone, 1) if cut == "prefix" else FrozenBackbone(tower.backbone, tower.pooling)
    outputs = one.prefix_outputs(pixels(3))
    assert outputs.shape == ((3, 8, 16, 16) if cut == "prefix" else (3, 16))
    assert (one.images(outputs) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("cut", [False, True])
def test_heads_are_computed_in_float32_whatever_the_backbone_is(cut):
    """Cosines times 100 need the digits: in bfloat16 the heads' rows would be off by a thousandth."""
    model = tiny_dual_encoder()
    low = passes(model, dtype=torch.bfloat16)
    seen = []
    for side in (model.text, model.image):
        side.projection.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    if cut:
        low.prefix = FrozenBackbone(model.image.backbone, model.image.pooling)
    rows = [low.texts(*tokens(some_captions(3))), low.images(low.prefix_outputs(pixels(2)) if cut else pixels(2))]
    assert seen == [(torch.float32, torch.float32)] * 2
    assert all(row.dtype == torch.float32 for row in rows)


def test_feature_dropout_is_for_training_alone_and_leaves_the_anchors_whole():
    """In evaluation nothing is dropped; in training the names of the classes are still told from all features."""
    model = tiny_dual_encoder()
    one = passes(model, feature_dropout=0.5)
    plain = model.encode_images(pixels(2))
    assert (one.images(pixels(2)) - plain).abs().max() < 1e-6
    model.train()
    heard = []
    model.image.anchors.register_forward_hook(lambda m, inputs, out: heard.append(inputs[0].detach()))
    one.images(pixels(2))
    assert bool((heard[0] != 0).all())


@pytest.mark.parametrize("keep", [False, True])
def test_a_list_of_texts_is_its_captions_rows_in_their_order(keep):
    """Sorted by length inside; none for none."""
    model = tiny_dual_encoder()
    texts = some_captions(30)
    with torch.no_grad():
        expected = model.encode_texts(*tokens(texts)).numpy()
    assert np.abs(Texts(texts, passes(model), tokens, keep=keep).rows() - expected).max() < 1e-5
    assert Texts([], passes(model), tokens, keep=keep).rows().shape == (0, 8)


def test_kept_texts_follow_the_head_and_not_the_backbone():
    """Features are made once: a head that learns shows, a backbone that moves does not until it is told."""
    model = tiny_dual_encoder()
    texts = Texts(some_captions(4), passes(model), tokens, keep=True)
    before = texts.rows()
    with torch.no_grad():
        for parameter in model.text.backbone.parameters():
            parameter.add_(0.1)
        assert np.array_equal(texts.rows(), before)
        for parameter in model.text.projection.parameters():
            parameter.add_(0.1)
    moved = texts.rows()
    assert not np.allclose(moved, before)
    texts.forget()
    assert not np.allclose(texts.rows(), moved)


def test_devices_and_precisions_that_are_not_there_are_refused():
    """By name, as usage errors."""
    assert pick_device("cpu") == CPU
    for wrong in ("gpu", "cuda:99", ""):
        with pytest.raises(UsageError, match="device"):
            pick_device(wrong)
    with pytest.raises(UsageError, match="precision"):
        pick_precision("fp16", CPU)
    assert pick_precision("bf16", CPU) == torch.bfloat16
    assert pick_precision("auto", CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("backbone", "unable"), [("plain_cnn:8,16", ["image"]), ("timm:test_efficientnet", []), ("timm:dla46_c", ["image"])]
)
def test_activation_checkpointing_says_where_there_is_none(backbone, unable):
    """BERT and most of timm know how; a side that does not is named."""
    image = {"backbone": backbone, "projection": {"kind": "linear"}}
    assert checkpoint_activations(tiny_dual_encoder({**TINY_CONFIG, "image": image})) == unable

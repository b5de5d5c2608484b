"""Frozen stages through onnxruntime: the same outputs, for any batch, or None and torch does it."""

import pytest
import torch
from torch import nn

from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix
from mmsearch.train.prefix_graph import compiled_prefix


def pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def compiled(prefix, model):
    return compiled_prefix(prefix, normalise=model.normalise_pixels, size=32, threads=1)


@pytest.mark.parametrize(("backbone", "count"), [("plain_cnn:4,8,8", 2), ("timm:test_efficientnet", 2)])
@torch.no_grad()
def test_the_graph_gives_what_torch_gives(backbone, count):
    """Scaling of pixels included, for batches of one and of five; the model's forwards are its own afterwards."""
    model = tiny_dual_encoder({**TINY_CONFIG, "image": {"backbone": backbone}})
    prefix = FrozenPrefix(model.image.backbone, count)
    run = compiled(prefix, model)
    assert run is not None
    for number in (1, 5):
        expected = prefix.outputs(model.normalise_pixels(pixels(number)))
        got = run(pixels(number))
        assert (got.shape, got.dtype) == (expected.shape, torch.float32)
        assert (got - expected).abs().max() < 1e-3 * (1 + expected.abs().max())
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_whole_backbone_is_compiled_with_its_pooling():
    """(b, w) features come out."""
    model = tiny_dual_encoder()
    run = compiled(FrozenBackbone(model.image.backbone, model.image.pooling), model)
    assert run is not None
    expected = model.image.pooled(model.normalise_pixels(pixels(3)))
    assert (run(pixels(3)) - expected).abs().max() < 1e-3


class Undecided(nn.Module):
    """Goes where its numbers say: no exporter can follow."""

    def forward(self, rows):
        return rows * 2 if float(rows.mean()) > 0 else rows


def test_what_cannot_be_exported_is_left_to_torch():
    """None, not an error: nothing but time is lost."""
    model = tiny_dual_encoder()
    first = model.image.backbone.stages
    first.insert(1, Undecided())
    assert compiled(FrozenPrefix(model.image.backbone, 1), model) is None

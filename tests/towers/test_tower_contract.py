"""The contract every tower signs: shapes, padding and batch size, gradient. One backbone a family at tiny sizes."""

import numpy as np
import pytest
import torch

from mmsearch.errors import ModelError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.checkpoint import load_dual_encoder, save_checkpoint
from mmsearch.towers.image import TimmBackbone

BACKBONES = [
    ("plain_cnn", "gem", 32),
    ("timm:resnet18", "avg", 32),
    ("timm:resnet50", "avg", 32),
    ("timm:vgg16", "max", 32),
    ("timm:vit_base_patch32_224", "cls", 64),
    ("timm:tf_efficientnet_lite0", "avg", 32),
    ("timm:convnext_atto", "avg", 32),
    ("torchvision:resnet18", "avg", 32),
    ("torchvision:shufflenet_v2_x0_5", "max", 32),
    ("torchvision:vit_b_32", "mean", 64),
]


def with_image(backbone, pooling="avg", size=32):
    return {
        **TINY_CONFIG,
        "preprocessing": {"size": size},
        "image": {"backbone": backbone, "pooling": pooling, "anchors": {"classes": 5}},
    }


def random_pixels(count, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(("backbone", "pooling", "size"), BACKBONES)
def test_every_image_backbone_gives_unit_rows_that_batch_size_does_not_change_and_learns(backbone, pooling, size):
    """(b, s, s, 3) -> (b, d) of norm 1; one at a time equals all at once; gradient reaches the first layer."""
    model = tiny_dual_encoder(with_image(backbone, pooling, size))
    pixels = random_pixels(3, size)
    rows = model.encode_images(pixels)
    assert rows.shape == (3, 8)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert model.image.pooled(model.normalise_pixels(pixels[:1])).shape == (1, model.image.width)
    with torch.no_grad():
        single = torch.cat([model.encode_images(pixels[i : i + 1]) for i in range(3)])
    assert ((single * rows).sum(dim=1) > 0.99999).all()
    (rows * torch.arange(8.0)).sum().backward()
    first = next(model.image.backbone.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", ["plain_cnn:8", "timm:resnet18"])
def test_an_image_tower_is_the_same_after_saving_and_loading(backbone, tmp_path):
    """What is loaded answers as what was saved, to half precision."""
    model = tiny_dual_encoder(with_image(backbone))
    save_checkpoint(model, tmp_path, tokenizer_json=tiny_tokenizer_json(), name="t", card="", graphs=False)
    loaded = load_dual_encoder(tmp_path)
    with torch.no_grad():
        before, after = (m.encode_images(random_pixels(4, 32)) for m in (model, loaded))
    assert ((before * after).sum(dim=1) > 0.9999).all()


@pytest.mark.parametrize("t", [1, 20, 64])
def test_the_text_tower_takes_every_length(t):
    """(b, t) -> (b, d) of norm 1 for one token, some, and as many as the positions allow."""
    ids = torch.randint(1, 32, (2, t))
    rows = tiny_dual_encoder().encode_texts(ids, torch.ones_like(ids))
    assert rows.shape == (2, 8)
    assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)


def test_padding_and_batch_size_change_no_text():
    """Any number of padded tokens, holding anything, gives the row of the text alone."""
    model, ids = tiny_dual_encoder(), torch.randint(1, 32, (1, 7))
    with torch.no_grad():
        alone = model.encode_texts(ids, torch.ones_like(ids))
        for padding in (1, 30, 57):
            padded = torch.cat([ids, torch.randint(1, 32, (1, padding))], dim=1)
            mask = torch.cat([torch.ones_like(ids), torch.zeros(1, padding, dtype=torch.int64)], dim=1)
            batch = model.encode_texts(padded.repeat(3, 1), mask.repeat(3, 1))
            assert ((batch * alone).sum(dim=1) > 0.99999).all()


def test_gradient_reaches_the_token_table_and_only_tokens_that_were_read():
    """Rows of the table that no text names, and rows under padding, learn nothing."""
    model = tiny_dual_encoder()
    ids, mask = torch.tensor([[2, 9, 5]]), torch.tensor([[1, 1, 0]])
    (model.encode_texts(ids, mask) * torch.arange(8.0)).sum().backward()
    grad = model.text.backbone.embeddings.word_embeddings.weight.grad.abs().sum(dim=1)
    assert (grad[[2, 9]] > 0).all()
    assert grad[7] == 0
    assert grad[5] < 1e-6


def test_pixels_are_scaled_by_mean_and_deviation():
    """Known values: with mean 0.5 and deviation 0.25, 0 -> -2 and 255 -> 2, channel by channel."""
    config = {**TINY_CONFIG, "preprocessing": {"size": 32, "mean": [0.5, 0.5, 0.0], "std": [0.25, 0.25, 1.0]}}
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    pixels[..., 1:] = 255
    scaled = tiny_dual_encoder(config).normalise_pixels(pixels)
    assert scaled.shape == (1, 3, 32, 32)
    assert torch.allclose(scaled[0, :, 0, 0], torch.tensor([-2.0, 2.0, 1.0]))


def test_the_logit_scale_starts_at_clips_and_is_cut_at_100():
    """exp(log_logit_scale), 1/0.07 at the start, never above 100."""
    model = tiny_dual_encoder()
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        model.log_logit_scale.fill_(20.0)
    assert model.logit_scale.item() == 100.0


@pytest.mark.parametrize(
    "backbone",
    ["timm:no_such_model", "timm:hf-hub:someone/model", "torchvision:no_such", "torchvision:raft_large", "keras:vgg"],
)
def test_an_unknown_backbone_is_one_sentence(backbone):
    """A name nobody has, a hub behind a name, a family without a table line: ModelError."""
    with pytest.raises(ModelError):
        tiny_dual_encoder(with_image(backbone))


def test_cls_pooling_over_a_map_is_refused():
    """A convolutional map has no class token."""
    with pytest.raises(ModelError, match="class token"):
        tiny_dual_encoder(with_image("plain_cnn:8", "cls"))


def test_a_backbone_that_ends_channels_last_is_turned():
    """(b, h, w, c) maps, as Swin gives them, become (b, c, h, w)."""
    backbone = TimmBackbone("resnet18", size=32)
    backbone.model = ChannelsLast()
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 5)


class ChannelsLast(torch.nn.Module):
    def forward_features(self, images):
        return torch.zeros(images.shape[0], 4, 5, 512)

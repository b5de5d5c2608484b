"""What a re-ranker reads of both towers: words of lower layers, patches of the backbone, nothing owned twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmsearch.errors import ModelError
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.model import RerankModel, pool_to_grid
from mmsearch.testing import TINY_CONFIG, TINY_RERANK, tiny_dual_encoder

VIT = {
    **TINY_CONFIG,
    "preprocessing": {"size": 160},
    "image": {"backbone": "timm:test_vit", "projection": {"kind": "linear"}},
}
CNN = {**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "backbone": "torchvision:squeezenet1_1"}}


def model(towers=None, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RerankModel(RerankConfig(**{**TINY_RERANK, **changes}), towers or tiny_dual_encoder()).eval()


def pixels(b, *, size=32, seed=0):
    return torch.randint(0, 256, (b, size, size, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def tokens(*lengths):
    t = max(lengths)
    ids = torch.randint(4, 20, (len(lengths), t), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[int(i < length) for i in range(t)] for length in lengths])


def rows(b, *, seed=0):
    return functional.normalize(torch.randn(b, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sides(made, *lengths):
    ids, mask = tokens(*lengths)
    with torch.no_grad():
        text = TextSide(rows(len(lengths)), made.words(ids, mask), mask)
        return text, ImageSide(rows(len(lengths), seed=2), made.patches(pixels(len(lengths))))


def test_words_after_all_layers_are_the_backbones_last_hidden_state():
    """And after none its embeddings, after one the first of its hidden states."""
    towers, (ids, mask) = tiny_dual_encoder(), tokens(7, 3)
    with torch.no_grad():
        whole = towers.text.backbone(ids, mask, output_hidden_states=True)
        for layers, wanted in enumerate(whole.hidden_states):
            assert torch.allclose(model(towers, text_layer=layers).words(ids, mask), wanted, atol=1e-6)
        assert torch.equal(model(towers, text_layer=2).words(ids, mask), whole.last_hidden_state)


def test_layers_above_the_words_are_never_run():
    """They may be broken altogether."""
    made, (ids, mask) = model(text_layer=1), tokens(5, 4)
    before = made.words(ids, mask)
    with torch.no_grad():
        for parameter in made.towers.text.backbone.encoder.layer[1].parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(made.words(ids, mask), before)


def test_more_layers_than_there_are_is_a_model_error():
    """Said when the model is made."""
    with pytest.raises(ModelError, match="at most the text backbone's 2 layers, got 3"):
        model(text_layer=3)


def test_words_follow_the_towers():
    """They are read, not copied: training or filling the towers changes what is read."""
    made, (ids, mask) = model(), tokens(5)
    before = made.words(ids, mask)
    made.towers.load_state_dict(tiny_dual_encoder(seed=1).state_dict())
    assert not torch.allclose(made.words(ids, mask), before)


def test_the_towers_are_no_part_of_the_weights():
    """Neither in the state, nor among the parameters, nor among the modules."""
    made = model()
    assert {name.split(".")[0] for name in made.state_dict()} == {"patch_projection", "fusion"}
    own = {id(parameter) for parameter in made.parameters()}
    assert not own & {id(parameter) for parameter in made.towers.parameters()}
    assert not any(module is made.towers for module in made.modules())


@pytest.mark.parametrize(("size", "grid"), [(9, 9), (8, 3), (7, 3), (8, 4), (3, 5), (1, 2), (6, 1)])
def test_averaging_to_the_grid_is_adaptive_pooling(size, grid):
    """Also where the map's side is no multiple of the grid's, or smaller."""
    places = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pool_to_grid(places, grid), functional.adaptive_avg_pool2d(places, grid), atol=1e-6)


def test_patches_stand_row_by_row():
    """A map that is 1 in its top right corner alone has its largest patch at the end of the first row."""
    made = model(patch_dim=1)
    with torch.no_grad():
        made.patch_projection.weight.fill_(1.0)
        features = torch.zeros(1, 16, 6, 6)
        features[:, :, 0, 5] = 1.0
        patches = made.patches_of_map(features)
    assert patches.shape == (1, 9, 1)
    assert patches[0, :, 0].argmax() == 2


@pytest.mark.parametrize(("towers", "size"), [(TINY_CONFIG, 32), (CNN, 32), (VIT, 160)], ids=["plain", "cnn", "vit"])
def test_every_kind_of_backbone_has_patches(towers, size):
    """Maps and tokens, 3 x 3 of 8 numbers; batch size changes nothing."""
    made = model(tiny_dual_encoder(towers))
    with torch.no_grad():
        together = made.patches(pixels(3, size=size))
        alone = torch.cat([made.patches(one[None]) for one in pixels(3, size=size)])
    assert together.shape == (3, 9, 8)
    assert torch.isfinite(together).all()
    assert torch.allclose(together, alone, atol=1e-5)


def test_prefix_tokens_are_no_patches():
    """A class token changes nothing; the places behind it do."""
    made = model(tiny_dual_encoder(VIT))
    prefix = made.towers.image.backbone.prefix
    assert prefix == 1
    features = torch.randn(1, prefix + 16, made.towers.image.width, generator=torch.Generator().manual_seed(0))
    other = features.clone()
    other[:, :prefix] = 7.0
    with torch.no_grad():
        assert torch.equal(made.patches_of_map(features), made.patches_of_map(other))
        places = features[:, prefix:].transpose(1, 2).reshape(1, -1, 4, 4)
        assert torch.equal(made.patches_of_map(features), made.patches_of_map(places))


def test_a_backbone_that_has_no_patches_is_refused():
    """One vector a picture, or tokens that form no square."""
    made = model()
    with pytest.raises(ModelError, match=r"already pooled.*ViT"):
        made.patches_of_map(torch.zeros(2, 16))
    with pytest.raises(ModelError, match="form a square, got 15 of them"):
        made.patches_of_map(torch.zeros(2, 15, 16))


def test_patches_are_of_the_picture_as_it_is():
    """Towers that average both mirror images give the same patches as towers that do not."""
    mirrored = tiny_dual_encoder({**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "mirror": True}})
    plain = tiny_dual_encoder()
    one, other = model(plain), model(mirrored)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert not torch.equal(plain.encode_images(pixels(2)), mirrored.encode_images(pixels(2)))
        assert torch.equal(one.patches(pixels(2)), other.patches(pixels(2)))
        assert not torch.allclose(one.patches(pixels(2)), one.patches(pixels(2).flip(2)))


def test_a_backbone_of_its_own_is_a_copy_that_learns_apart():
    """Patches start as the tower's; changing the copy changes them and leaves the tower."""
    made = model(own_backbone=True)
    assert any(name.startswith("backbone.") for name in made.state_dict())
    features = made.towers.image.backbone(made.towers.normalise_pixels(pixels(2)))
    with torch.no_grad():
        assert torch.equal(made.patches(pixels(2)), made.patches_of_map(features))
        for parameter in made.backbone.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(made.patches(pixels(2)), made.patches_of_map(features))
        assert torch.equal(made.towers.image.backbone(made.towers.normalise_pixels(pixels(2))), features)


def test_batch_size_and_padding_change_no_logit():
    """Each pair alone and cut to its own length, all together, and with padding nobody asked for."""
    made = model()
    text, image = sides(made, 3, 7, 5)
    with torch.no_grad():
        together = made(text, image)
        for i, length in enumerate((3, 7, 5)):
            alone = TextSide(text.rows[i : i + 1], text.tokens[i : i + 1, :length], text.mask[i : i + 1, :length])
            assert torch.allclose(made(alone, image.cut(i, i + 1)), together[i], atol=1e-5)
        longer = TextSide(
            text.rows, functional.pad(text.tokens, (0, 0, 0, 4), value=9.0), functional.pad(text.mask, (0, 4))
        )
        assert torch.allclose(made(longer, image), together, atol=1e-5)
    assert together.std() > 1e-4


def test_attention_sums_to_one_over_patches():
    """(b, t, p) of a fusion that reads patches; None of one that does not."""
    made = model()
    with torch.no_grad():
        attention = made.attention(*sides(made, 4, 6))
        assert attention.shape == (2, 6, 9)
        assert torch.allclose(attention.sum(dim=-1), torch.ones(2, 6), atol=1e-5)
        rows_only = model(fusion="gated")
        assert rows_only.attention(*sides(rows_only, 4, 6)) is None


def test_a_text_tower_that_is_no_bert_is_refused():
    """There are no lower layers to read."""
    towers = tiny_dual_encoder()
    towers.text.backbone = nn.Identity()
    with pytest.raises(ModelError, match="a BERT as text tower"):
        model(towers)

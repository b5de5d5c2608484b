"""Stages: every parameter once, from input to output, for any backbone."""

from functools import cache

import pytest
import torch
from torch import nn

from mmsearch.errors import ModelError
from mmsearch.towers.base import build_backbone
from mmsearch.towers.config import ImageConfig, TextConfig
from mmsearch.towers.stages import stages
from mmsearch.towers.text import BertTower

BACKBONES = {
    # name: how many stages it has
    "timm:tf_efficientnet_lite2": 9,
    "timm:resnet18": 5,
    "timm:vit_tiny_patch16_224": 13,
    "timm:vgg11": 8,
    "timm:convnext_atto": 5,
    "timm:swin_tiny_patch4_window7_224": 5,
    "timm:regnetx_002": 5,
    "timm:densenet121": 8,
    "timm:mobilenetv3_small_050": 8,
    "torchvision:resnet18": 5,
    "torchvision:vit_b_16": 13,
    "torchvision:swin_t": 8,
    "plain_cnn:8,16": 2,
}


@cache
def backbone_of(name):
    """Shapes only: on the meta device nothing is computed or stored. Read only."""
    with torch.device("meta"):
        return build_backbone(ImageConfig(backbone=name), size=224)


def bert(layers):
    with torch.device("meta"):
        return BertTower(TextConfig(backbone={"num_hidden_layers": layers}), dim=8).backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_is_in_exactly_one_stage(name):
    """What is frozen by stages leaves nothing out and counts nothing twice."""
    backbone = backbone_of(name)
    found = [id(p) for stage in stages(backbone) for p in stage.parameters()]
    assert sorted(found) == sorted(id(p) for p in backbone.parameters())


@pytest.mark.parametrize(("name", "count"), BACKBONES.items())
def test_the_number_of_stages_is_what_papers_count(name, count):
    """EfficientNet: stem, seven, head; ResNet: stem and four; a transformer: patches and its blocks."""
    assert len(stages(backbone_of(name))) == count


@pytest.mark.parametrize("name", BACKBONES)
def test_every_stage_has_a_matrix_to_learn(name):
    """No stage of norms alone, which would make "the last stage" nothing."""
    assert all(any(p.ndim > 1 for p in stage.parameters()) for stage in stages(backbone_of(name)))


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:tf_efficientnet_lite2", "plain_cnn:8,16"])
def test_stages_run_from_input_to_output(name):
    """Stage by stage in the order in which a picture passes them."""
    backbone = build_backbone(ImageConfig(backbone=name), size=32).eval()
    seen = []
    for index, stage in enumerate(stages(backbone)):
        for module in stage.modules:
            module.register_forward_hook(lambda *_, index=index: seen.append(index))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 32, 32))
    assert seen == sorted(seen)
    assert set(seen) == set(range(len(stages(backbone))))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_bert_has_its_embeddings_and_its_layers(layers):
    """Also one of a single layer, which is not taken apart."""
    names = [stage.name for stage in stages(bert(layers))]
    assert names == ["embeddings", *(f"encoder.layer.{i}" for i in range(layers))]


def test_class_tokens_and_positions_belong_to_the_first_stage():
    """They act on the input, and are no module's."""
    first, *others = stages(backbone_of("timm:vit_tiny_patch16_224"))
    assert [tuple(p.shape) for p in first.loose] == [(1, 1, 192), (1, 197, 192)]
    assert not any(stage.loose for stage in others)


def test_a_norm_before_the_first_convolution_is_part_of_the_stem():
    """And one between two blocks of the block before it."""
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    backbone = nn.ModuleDict({"features": layers})
    assert [(s.name, len(s.modules)) for s in stages(backbone)] == [("features.0", 3), ("features.3", 1)]


def test_a_backbone_without_parameters_is_refused():
    """Nothing could ever learn."""
    with pytest.raises(ModelError, match="parameters"):
        stages(nn.Sequential(nn.ReLU()))

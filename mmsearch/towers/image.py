"""The image tower: any timm or torchvision backbone, pooling, projection head, class-name anchors.

Decisions:
- Weights are never fetched: a backbone is built empty and filled from a checkpoint (`pretrained=False`),
  and a name that would reach a hub is refused.
- Layers behind the features (classifiers, VGG's two wide layers) are cut off: they would be stored and
  never run.
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.errors import ModelError
from mmsearch.towers.anchors import ClassNameAnchors
from mmsearch.towers.base import build_backbone
from mmsearch.towers.config import ImageConfig
from mmsearch.towers.pooling import Pooling
from mmsearch.towers.projection import build_projection


class TimmBackbone(nn.Module):
    """(b, 3, s, s) -> map or tokens of any model in timm's list that has `forward_features`."""

    def __init__(self, architecture: str, *, size: int) -> None:
        super().__init__()
        if not timm.is_model(architecture):
            raise ModelError("image backbone", expected="a name from timm.list_models()", got=repr(architecture))
        published = timm.models.get_pretrained_cfg(architecture)
        sized: dict[str, Any] = {"img_size": size} if published is not None and published.fixed_input_size else {}
        model: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **sized)
        if hasattr(model, "pre_logits"):
            model.pre_logits = nn.Identity()
        self.width, self.prefix = int(model.num_features), int(getattr(model, "num_prefix_tokens", 0))
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Features before pooling; models that end channels-last are turned channels-first."""
        forward_features: Any = self.model.forward_features
        features: Tensor = forward_features(images)
        if features.ndim == 4 and features.shape[1] != self.width:
            return features.permute(0, 3, 1, 2)
        return features


class TorchvisionBackbone(nn.Module):
    """(b, 3, s, s) -> map or tokens of a torchvision classification model."""

    def __init__(self, architecture: str, *, size: int) -> None:
        super().__init__()
        if architecture not in torchvision.models.list_models(module=torchvision.models):
            raise ModelError(
                "image backbone", expected="a name from torchvision.models.list_models()", got=repr(architecture)
            )
        vit = architecture.startswith("vit_")
        model = torchvision.models.get_model(architecture, weights=None, **({"image_size": size} if vit else {}))
        self.model = _VitFeatures(model) if vit else _map_features(model, architecture)
        self.prefix = 1 if vit else 0
        self.width = model.hidden_dim if vit else _map_width(self.model, size)

    def forward(self, images: Tensor) -> Tensor:
        """Features before pooling."""
        features: Tensor = self.model(images)
        return features


class _VitFeatures(nn.Module):
    """torchvision's vision transformer up to its tokens: (b, 3, s, s) -> (b, 1 + p, w)."""

    def __init__(self, model: torchvision.models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj: nn.Module = model.conv_proj
        self.encoder, self.class_token = model.encoder, model.class_token

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # (b, p, w)
        first = self.class_token.expand(images.shape[0], -1, -1)
        tokens: Tensor = self.encoder(torch.cat([first, patches], dim=1))
        return tokens


def _map_features(model: nn.Module, architecture: str) -> nn.Module:
    """The part of a convolutional torchvision model that ends in a (b, w, h, h) map."""
    if isinstance(model, torchvision.models.SwinTransformer):
        return nn.Sequential(model.features, model.norm, model.permute)
    if hasattr(model, "features"):
        features = model.features
        assert isinstance(features, nn.Module)  # for the type checker
        return features
    for stages in (
        ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        ("stem", "trunk_output"),
        ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
        ("layers",),
    ):
        if all(hasattr(model, stage) for stage in stages):
            return nn.Sequential(*(getattr(model, stage) for stage in stages))
    raise ModelError(
        "image backbone", expected="a torchvision model that ends in a feature map", got=architecture, do="Try timm."
    )


def _map_width(features: nn.Module, size: int) -> int:
    """How many channels the map has, found on the meta device: shapes only, nothing is computed."""
    shadow = copy.deepcopy(features).to("meta").eval()
    with torch.no_grad():
        return int(shadow(torch.empty(1, 3, size, size, device="meta")).shape[1])


class ImageTower(nn.Module):
    """(b, 3, s, s) normalised pixels -> (b, d) unit rows.

    With f the pooled features: normalise(head(f)), or normalise(normalise(head(f)) + anchors(f)).
    """

    def __init__(self, config: ImageConfig, *, dim: int, size: int) -> None:
        super().__init__()
        backbone = build_backbone(config, size=size)
        self.width, self.dim = backbone.width, dim
        self.pooling = Pooling(config.pooling, prefix=backbone.prefix)
        assert isinstance(backbone, nn.Module)  # for the type checker
        self.backbone = backbone
        self.projection = build_projection(config.projection, width=self.width, dim=dim)
        self.mirror = config.mirror
        anchors = config.anchors
        self.anchors = None if anchors is None else ClassNameAnchors(anchors, width=self.width, dim=dim)

    def pooled(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) -> (b, w): the backbone's pooled features, before projection."""
        pooled: Tensor = self.pooling(self.backbone(images))
        return pooled

    def embed(self, pooled: Tensor) -> Tensor:
        """(b, w) -> (b, d) float32 unit rows."""
        rows: Tensor = self.projection(pooled)
        if self.anchors is not None:
            # Both parts at length 1 (times m): a head that grows long in training would drown the names.
            rows = functional.normalize(rows, dim=-1) + self.anchors(pooled)
        return functional.normalize(rows.to(torch.float32), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) float, normalised -> (b, d) float32 unit rows."""
        if not self.mirror or self.training:
            return self.embed(self.pooled(images))
        return joined_views(self.embed(self.pooled(torch.cat([images, images.flip(-1)]))))


def joined_views(rows: Tensor) -> Tensor:
    """(2 b, d) unit rows of b pictures, then of their mirror images in the same order -> (b, d) unit rows, the means.

    Known value: two equal rows give that row.
    """
    return functional.normalize(rows.reshape(2, -1, rows.shape[-1]).sum(dim=0), dim=-1)

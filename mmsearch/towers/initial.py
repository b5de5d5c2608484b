"""A dual encoder to begin training with: backbones filled from weights on disk, heads at random.

Decisions:
- Names are matched after cutting one common prefix ("bert.", "module.", "text.backbone."), found, not listed.
- An image backbone whose names are another library's is filled in order, if every shape fits: two ports of one
  architecture register the same tensors in the same order. Never when most names match (then one is missing), and
  only from torch files: safetensors sorts its tensors by name.
- Whatever lies behind the features is left unread, but for the classifier that the anchors need.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from mmsearch.errors import ModelError
from mmsearch.towers.config import DualEncoderConfig
from mmsearch.towers.dual_encoder import DualEncoder, build_dual_encoder
from mmsearch.towers.image import ImageTower
from mmsearch.towers.sources import keeps_order, read_weights

_COUNTER = "num_batches_tracked"
_WEIGHT, _BIAS = ".weight", ".bias"
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def initial_dual_encoder(
    config: DualEncoderConfig,
    *,
    text_weights: str | os.PathLike[str] | None = None,
    image_weights: str | os.PathLike[str] | None = None,
) -> DualEncoder:
    """A dual encoder in eval mode as `config` describes it; a side without weights stays random.

    `text_weights`: a BERT as transformers or sentence-transformers write it; `image_weights`: a classifier of the same
    architecture as the config's backbone. Both as in `sources.read_weights`. With anchors in the config the image
    weights must hold a classifier of as many classes. Heads are random: seed torch before.
    `ModelError` names the first tensor that is missing or of another shape.
    """
    model = build_dual_encoder(config)
    if text_weights is not None:
        backbone = model.text.get_submodule("backbone")
        given = {_modern(name): tensor for name, tensor in read_weights(text_weights).items()}
        _by_name(backbone, given, where=os.fspath(text_weights))
    if image_weights is not None:
        ordered = keeps_order(image_weights)
        _fill_image(model.image, read_weights(image_weights), where=os.fspath(image_weights), ordered=ordered)
    return model.eval()


def fill_backbone(backbone: nn.Module, weights: str | os.PathLike[str]) -> None:
    """Fill an image backbone from `weights` (see `sources.read_weights`); `ModelError` when they do not fit."""
    _fill_module(backbone, read_weights(weights), where=os.fspath(weights), ordered=keeps_order(weights))


def _fill_module(backbone: nn.Module, given: Mapping[str, Tensor], *, where: str, ordered: bool) -> set[str]:
    """Fill it; the names in `given` that were used."""
    inner = getattr(backbone, "model", None)
    module = inner if isinstance(inner, nn.Module) else backbone  # as its own library names it
    wanted = module.state_dict()
    mostly_named = 2 * _prefix(wanted, given)[1] > len(wanted)
    fill = _in_order if ordered and not mostly_named else _by_name
    return fill(module, given, where=where)


def _fill_image(tower: ImageTower, given: Mapping[str, Tensor], *, where: str, ordered: bool) -> None:
    used = _fill_module(tower.backbone, given, where=where, ordered=ordered)
    if tower.anchors is not None:
        rest = {name: tensor for name, tensor in given.items() if name not in used}
        _fill_classifier(tower.anchors.classifier, rest, where=where)


def _by_name(module: nn.Module, given: Mapping[str, Tensor], *, where: str) -> set[str]:
    """Fill `module`; returns the names in `given` that were used."""
    wanted = module.state_dict()
    prefix, _ = _prefix(wanted, given)
    state = {}
    for name, tensor in wanted.items():
        found = given.get(prefix + name)
        if found is None and name.endswith(_COUNTER):
            found = tensor  # weights from before torch counted batches
        if found is None:
            raise ModelError(where, expected=f"a tensor {prefix}{name}", got=f"none among {len(given)}")
        _check_shape(name, tensor, found, where=where)
        state[name] = found
    module.load_state_dict(state)
    return {prefix + name for name in wanted}


def _in_order(module: nn.Module, given: Mapping[str, Tensor], *, where: str) -> set[str]:
    """Fill `module` with the first tensors of `given`; returns their names."""
    # Counters of batches are left out: some files have none, and they change nothing here.
    wanted, offered = _without_counters(module.state_dict()), _without_counters(given)
    if len(offered) < len(wanted):
        missing = list(wanted)[len(offered)]
        raise ModelError(where, expected=f"{len(wanted)} tensors ({missing})", got=str(len(offered)))
    for (name, tensor), found in zip(wanted.items(), offered.values(), strict=False):
        _check_shape(name, tensor, found, where=where)
    used = list(offered)[: len(wanted)]
    state = dict(zip(wanted, (offered[name] for name in used), strict=True))
    module.load_state_dict(state, strict=False)
    return set(used)


def _fill_classifier(classifier: nn.Linear, rest: Mapping[str, Tensor], *, where: str) -> None:
    """Take the last X.weight (classes, w) or (classes, w, 1, 1) that an X.bias (classes,) goes with."""
    for name in reversed(list(rest)):
        bias = rest.get(name.removesuffix(_WEIGHT) + _BIAS)
        if not name.endswith(_WEIGHT) or rest[name].ndim not in (2, 4) or bias is None:
            continue
        flat = rest[name].flatten(1)
        if flat.shape == classifier.weight.shape and bias.shape == classifier.bias.shape:
            classifier.load_state_dict({"weight": flat, "bias": bias})
            return
    raise ModelError(
        where,
        expected=f"a classifier of {classifier.out_features} classes from {classifier.in_features} for the anchors",
        got="none behind the backbone",
        do="Leave the anchors out, or set their classes.",
    )


def _prefix(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, int]:
    """What stands before the wanted names in `given`, and how many of them are found with it."""
    first = next(iter(wanted))
    candidates = {""} | {name.removesuffix(first) for name in given if name.endswith("." + first)}
    hits = {prefix: sum(prefix + name in given for name in wanted) for prefix in candidates}
    best = max(hits, key=lambda prefix: (hits[prefix], -len(prefix)))
    return best, hits[best]


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if tensor.ndim or tensor.is_floating_point()}


def _check_shape(name: str, wanted: Tensor, found: Tensor, *, where: str) -> None:
    if wanted.shape != found.shape:
        raise ModelError(
            f"{where}, {name}",
            expected=str(tuple(wanted.shape)),
            got=str(tuple(found.shape)),
            do="The weights are of another architecture than the config's.",
        )


def _modern(name: str) -> str:
    """BERT's first release called a norm's scale gamma and its shift beta."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name

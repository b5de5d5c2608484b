"""Low-rank adapters on a tower's backbone: a few numbers learn in the place of all, and are merged in the end.

W + (alpha / rank) · B·A with A (rank, in) random and B (out, rank) zero, so that training starts from the tower as it
was (Hu et al. 2021, LoRA, arXiv:2106.09685). The package `peft` does the arithmetic.

Decisions:
- Every linear layer and every dense convolution of the chosen stages gets one, not attention alone: more ranks in more
  places beat fewer in a few (ibid., table 5), and a convolutional tower has no attention.
- Left alone: depthwise convolutions (already of low rank), layers whose weight is rewritten on every pass
  (standardised convolutions) or read past the layer (inside torch's own MultiheadAttention): there a merged tower
  would not equal the adapted one.
- Checkpoints are of plain towers: `plain_state` gives their weights at any time without touching the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from mmsearch.errors import MissingExtraError, ModelError, UsageError
from mmsearch.towers.stages import stages
from mmsearch.train.parameters import ADAPTER

if TYPE_CHECKING:
    from mmsearch.towers.dual_encoder import DualEncoder

_BASE = ".base_layer"
_SIDES = ("text", "image")


def add_lora(
    model: DualEncoder,
    *,
    side: str,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    last: int | None = None,
) -> int:
    """Put adapters on the backbone of `side` ("text" or "image"), in place; returns how many layers have one.

    `alpha`: strength, twice the rank if None. `dropout` in [0, 1) on what goes into the adapter. `last`: only the last
    so many stages (`Tuning.train`), all if None. The model's output does not change. Random numbers come from torch's
    global generator. Afterwards call `parameter_groups` with `Tuning(lora=rank)`, which decides what learns.
    """
    if side not in _SIDES:
        raise UsageError("side", expected="text or image", got=repr(side))
    if rank < 1 or not 0.0 <= dropout < 1.0 or (last is not None and last < 1):
        raise UsageError(
            "lora", expected="rank and last from 1, dropout in [0, 1)", got=f"rank {rank}, last {last}, {dropout}"
        )
    backbone = getattr(model, side).get_submodule("backbone")
    if any(ADAPTER in name for name, _ in backbone.named_parameters()):
        raise UsageError("lora", expected="a plain tower", got="one with adapters", do="Call merge_lora first.")
    names = _targets(backbone, last=last)
    if not names:
        raise ModelError(f"{side} backbone", expected="linear layers or dense convolutions for LoRA", got="none")
    _inject(backbone, names, rank=rank, alpha=2.0 * rank if alpha is None else alpha, dropout=dropout)
    return len(names)


def has_lora(model: nn.Module) -> bool:
    """True when some layer has an adapter."""
    return any(ADAPTER in name for name, _ in model.named_parameters())


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as that of the plain model it was made from, adapters added into the weights.

    Without adapters it is the state itself. Tensors without an adapter are the model's own, not copies.
    """
    deltas = {f"{name}{_BASE}.weight": layer.get_delta_weight("default") for name, layer in _layers(model)}
    with torch.no_grad():
        return {
            name.replace(_BASE, "") if deltas else name: value + deltas[name].detach() if name in deltas else value
            for name, value in model.state_dict().items()
            if ADAPTER not in name
        }


def merge_lora(model: DualEncoder) -> None:
    """Add the adapters into the weights and take them off, in place; nothing happens without adapters.

    Known value: the output stays what it was in evaluation mode, to rounding. All parameters need a gradient again.
    """
    state = plain_state(model)
    for name, layer in list(_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for tower in (model.text, model.image):
        backbone = tower.get_submodule("backbone")
        if hasattr(backbone, "peft_config"):
            del backbone.peft_config
            model.requires_grad_(True)
    model.load_state_dict(state)


def _targets(backbone: nn.Module, *, last: int | None) -> list[str]:
    """Dotted names of the layers that get an adapter."""
    parts = stages(backbone)
    if last is not None and last > len(parts):
        raise UsageError("lora", expected=f"at most {len(parts)} stages", got=str(last))
    chosen = {
        id(module) for stage in parts[-(last or len(parts)) :] for top in stage.modules for module in top.modules()
    }
    return [name for name, module in backbone.named_modules() if id(module) in chosen and _takes_adapter(module)]


def _takes_adapter(module: nn.Module) -> bool:
    # Exact types: a subclass may do anything with its weight.
    if type(module) is nn.Linear:
        return True
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    # TensorFlow's padding depends on the kernel; only for 1 x 1 is it none, as the adapter would have it.
    return type(module) is Conv2dSame and module.groups == 1 and module.kernel_size == (1, 1)


def _inject(backbone: nn.Module, names: list[str], *, rank: int, alpha: float, dropout: float) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise MissingExtraError("LoRA", package="peft", extra="train") from error
    # One pattern of whole names: peft takes a list for endings and shortens it, and would find other layers too.
    pattern = "|".join(re.escape(name) for name in names)
    training = backbone.training
    settings: Any = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, backbone)
    backbone.train(training)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(dotted name, peft's layer) of every layer with an adapter."""
    if not has_lora(model):
        return
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))

"""Which parameters learn, at what rate, and which parts run in training mode.

Decisions:
- One rule, `_factors`, answers for gradients, rates and modes alike, so that they cannot disagree.
- The rate of the backbone is a factor on the base rate, the base rate belongs to the heads: a backbone that was
  trained before wants a tenth or a hundredth of it (Faghri et al. 2018, VSE++, arXiv:1707.05612).
- No weight decay on anything that is not a matrix (norms, biases, scales, the temperature) nor on class tokens and
  positions: pulling those to zero regularises nothing.
- Batch norm keeps its statistics unless asked: those of a small batch of one data set are worse than ImageNet's.
- The anchors' classifier never learns here: it is what the photo classifier knew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsearch.errors import ModelError, UsageError
from mmsearch.towers.stages import Stage, stages

if TYPE_CHECKING:
    from mmsearch.towers.dual_encoder import DualEncoder

ADAPTER = "lora_"
"""What the names of adapter parameters hold."""
_WHOLE = ("all", "head", "none")
_TOKEN_TABLE = "word_embeddings.weight"
_CLASSIFIER = "anchors.classifier."


@dataclass(frozen=True, slots=True)
class Tuning:
    """How one tower learns.

    `train`: "all"; "head" (backbone frozen, on the image side LiT: Zhai et al. 2022, arXiv:2111.07991); "none"
    (projection too); or N, the last N stages of the backbone and the head. `rate`: factor on the base rate for the
    backbone, > 0. `layer_decay`: further factor for each stage from the top down, in (0, 1] (Clark et al. 2020,
    ELECTRA, arXiv:2003.10555). `embeddings=False` keeps the token table as it is. `batch_norm=True` updates
    batch-norm statistics. `lora`: rank of the adapters that learn in the backbone's place, 0 for none.
    """

    train: str | int = "all"
    rate: float = 1.0
    layer_decay: float = 1.0
    embeddings: bool = True
    batch_norm: bool = False
    lora: int = 0

    def __post_init__(self) -> None:
        counted = isinstance(self.train, int) and not isinstance(self.train, bool) and self.train > 0
        if not counted and self.train not in _WHOLE:
            raise UsageError("train", expected="all, head, none or a number of stages from 1", got=repr(self.train))
        if not 0.0 < self.rate <= 1000.0:
            raise UsageError("rate", expected="a factor above 0", got=str(self.rate), do="To freeze, train 'head'.")
        if not 0.0 < self.layer_decay <= 1.0:
            raise UsageError("layer_decay", expected="a factor in (0, 1]", got=str(self.layer_decay))
        if self.lora < 0:
            raise UsageError("lora", expected="a rank from 0", got=str(self.lora))
        if self.lora and self.train in ("head", "none"):
            raise UsageError(
                "lora", expected="a backbone that learns", got=f"train {self.train!r}", do="Set train to 'all'."
            )


def parameter_groups(
    model: DualEncoder,
    *,
    text: Tuning,
    image: Tuning,
    rate: float,
    weight_decay: float,
    extra: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Groups for an optimiser, and `requires_grad` of every parameter of `model` set to fit.

    Each group has `params`; `rate` (the base `rate` times its factor: multiply it by the schedule's factor) and `lr`,
    equal to it at the start; `weight_decay`; `name` ("text.encoder.layer.5", "image.head", "shared", "extra", with
    "/plain" where nothing decays); `part` ("backbone" or "head"). `extra`: an objective's own parameters.
    Every parameter that learns is in exactly one group. `UsageError` when nothing learns.
    """
    model.requires_grad_(False)
    groups: dict[str, dict[str, Any]] = {}
    for slot in _slots(model, text=text, image=image, extra=extra):
        if slot.factor <= 0.0:
            continue
        slot.parameter.requires_grad_(True)
        name = slot.name if slot.decays else f"{slot.name}/plain"
        group = groups.setdefault(
            name,
            {
                "params": [],
                "lr": rate * slot.factor,
                "rate": rate * slot.factor,
                "weight_decay": weight_decay if slot.decays else 0.0,
                "name": name,
                "part": slot.part,
            },
        )
        group["params"].append(slot.parameter)
    if not any(group["part"] == "backbone" or ".head" in group["name"] for group in groups.values()):
        raise UsageError("train", expected="a tower that learns", got="'none' on both sides")
    return list(groups.values())


def set_mode(model: DualEncoder, *, text: Tuning, image: Tuning) -> None:
    """Training mode for what learns, evaluation mode (no dropout, fixed statistics) for what does not."""
    model.train()
    for tower, tuning in ((model.text, text), (model.image, image)):
        if tuning.train == "none":
            tower.eval()
            continue
        backbone = _backbone(tower)
        parts = stages(backbone)
        learning = _learning(tower, tuning, parts=parts)
        backbone.train(all(learning))
        for stage, learns in zip(parts, learning, strict=True):
            for module in stage.modules if learns is not backbone.training else ():
                module.train(learns)
        for module in backbone.modules():
            if isinstance(module, _BatchNorm) and not tuning.batch_norm:
                module.eval()


def first_trained_stage(tower: nn.Module, tuning: Tuning) -> int:
    """Index in `stages(tower.backbone)` of the first that learns; their number when none does.

    What lies before it gives the same output at every step: it can be computed once, or without a graph.
    """
    learning = _learning(tower, tuning, parts=stages(_backbone(tower)))
    return learning.index(True) if True in learning else len(learning)


@dataclass(frozen=True, slots=True)
class _Slot:
    """One parameter's place: the group's name, its part, the factor on the base rate (0: frozen), and decay."""

    parameter: nn.Parameter
    name: str
    part: str
    factor: float
    decays: bool


def _slots(model: DualEncoder, *, text: Tuning, image: Tuning, extra: Iterable[nn.Parameter]) -> Iterator[_Slot]:
    taken: set[int] = set()
    for side, tower, tuning in (("text", model.text, text), ("image", model.image, image)):
        parts = stages(_backbone(tower))
        factors = _factors(tower, tuning, parts=parts)
        for stage in parts:
            loose = {id(parameter) for parameter in stage.loose}
            for parameter in stage.parameters():
                if id(parameter) not in taken:
                    taken.add(id(parameter))
                    decays = parameter.ndim > 1 and id(parameter) not in loose
                    yield _Slot(parameter, f"{side}.{stage.name}", "backbone", factors[id(parameter)], decays)
        for parameter in tower.parameters():
            if id(parameter) not in taken:
                taken.add(id(parameter))
                yield _Slot(parameter, f"{side}.head", "head", factors[id(parameter)], parameter.ndim > 1)
    for name, others in (("shared", model.parameters()), ("extra", extra)):
        for parameter in others:
            if id(parameter) not in taken:
                taken.add(id(parameter))
                yield _Slot(parameter, name, "head", 1.0, parameter.ndim > 1)


def _learning(tower: nn.Module, tuning: Tuning, *, parts: list[Stage]) -> list[bool]:
    """Whether any parameter of each stage learns."""
    factors = _factors(tower, tuning, parts=parts)
    return [any(factors[id(parameter)] for parameter in stage.parameters()) for stage in parts]


def _factors(tower: nn.Module, tuning: Tuning, *, parts: list[Stage]) -> dict[int, float]:
    """Factor on the base rate of every parameter of a tower, by id; 0 for those that stay as they are."""
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    factors = {
        key: 0.0 if tuning.train == "none" or name.startswith(_CLASSIFIER) else 1.0 for key, name in names.items()
    }
    first = _first(parts, tuning)
    for index, stage in enumerate(parts):
        height = len(parts) - 1 - index
        factor = tuning.rate * tuning.layer_decay**height if index >= first else 0.0
        for parameter in stage.parameters():
            factors[id(parameter)] = factor if _learns(names[id(parameter)], tuning) else 0.0
    if tuning.lora and not any(ADAPTER in name for name in names.values()):
        raise UsageError("lora", expected="a tower with adapters", got="none", do="Call add_lora first.")
    return factors


def _first(parts: list[Stage], tuning: Tuning) -> int:
    if tuning.train in ("head", "none"):
        return len(parts)
    if tuning.train == "all":
        return 0
    if int(tuning.train) > len(parts):
        last = ", ".join(stage.name for stage in parts[-3:])
        raise UsageError("train", expected=f"at most {len(parts)} stages (the last: {last})", got=str(tuning.train))
    return len(parts) - int(tuning.train)


def _learns(name: str, tuning: Tuning) -> bool:
    if tuning.lora:
        return ADAPTER in name
    return tuning.embeddings or not name.endswith(_TOKEN_TABLE)


def _backbone(tower: nn.Module) -> nn.Module:
    found = getattr(tower, "backbone", None)
    if not isinstance(found, nn.Module):
        raise ModelError(type(tower).__name__, expected="a tower with a backbone", got="none")
    return found

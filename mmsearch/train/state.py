"""A run's state on disk: everything that the next step depends on, in one file.

Decisions:
- One safetensors file with the small facts in its header, written beside and renamed: there is no moment without a
  whole one, and none with halves of two.
- Random numbers are not stored: each step seeds its own from the run's seed and its number.
- The optimiser's moments are stored by parameter name, so that a file of another setup is noticed, not misread.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmsearch.errors import InputError, ResourceError

STATE = "state.safetensors"
_FORMAT = 1


@dataclass(slots=True)
class Progress:
    """Where a run stands. `step`: optimiser steps done; `batch`: batches of `epoch` done; `history`: scores so far."""

    digest: str = ""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_score: float = -1.0
    history: list[float] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    done: bool = False


def save_state(
    path: Path, progress: Progress, *, model: Mapping[str, Tensor], named: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer, average: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Write the state of a run; `ResourceError` when the disk does not take it (the last one stays).

    `model`: the tensors that the run changes, by name (`moving`); `named`: the parameters that learn, by name;
    `average`: as `Average.state` gives it.
    """
    tensors = {f"model.{name}": value for name, value in model.items()}
    for name, slots in _moments(named, optimiser).items():
        tensors |= {f"moment.{slot}.{name}": value for slot, value in slots.items()}
    facts: dict[str, Any] = {"format": _FORMAT, **{name: getattr(progress, name) for name in Progress.__slots__}}
    if average is not None:
        facts["average_updates"] = average["updates"]
        tensors |= {f"average.{name}": value for name, value in average["rows"].items()}
    save_tensors(path, tensors, metadata={"state": json.dumps(facts)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file in one rename; `ResourceError` when the disk does not take it (the last one stays)."""
    draft = path.with_suffix(".draft")
    try:
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(plain, str(draft), metadata=dict(metadata) if metadata else None)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ResourceError(str(path), got=str(error)[:160], do="Free space, then run the same command.") from error


def read_progress(path: Path) -> Progress | None:
    """Where the run of this file stands; None when there is no file."""
    if not path.exists():
        return None
    facts = _facts(path)
    return Progress(**{name: facts[name] for name in Progress.__slots__ if name in facts})


def load_state(
    path: Path, *, model: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any] | None]:
    """Put a state into the model's tensors and the optimiser; -> progress, and the average's state if it has one."""
    facts = _facts(path)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    own = _part(tensors, "model.")
    odd = sorted(own.keys() ^ model.keys()) + [n for n in own.keys() & model.keys() if own[n].shape != model[n].shape]
    if odd:
        raise InputError(str(path), expected="the state of this model", got=f"a difference in {odd[0]}")
    with torch.no_grad():
        for name, value in own.items():
            model[name].copy_(value)
    _put_moments(_part(tensors, "moment."), named=named, optimiser=optimiser)
    progress = Progress(**{name: facts[name] for name in Progress.__slots__ if name in facts})
    rows = _part(tensors, "average.")
    return progress, {"updates": facts["average_updates"], "rows": rows} if "average_updates" in facts else None


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What a run can change: parameters that require a gradient now, and all float buffers that are stored.

    The tensors are the model's own; ask before a part is put to wait (`Schedule.backbone_start`).
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {
        name: value for name, value in model.state_dict().items() if name not in frozen and value.is_floating_point()
    }


def _moments(named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {slot: torch.as_tensor(value) for slot, value in optimiser.state[parameter].items()}
        for name, parameter in named.items()
        if parameter in optimiser.state
    }


def _put_moments(
    tensors: Mapping[str, Tensor], *, named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        if name not in named:
            raise InputError("state of the optimiser", expected="parameters that learn in this run", got=name)
        parameter = named[name]
        if value.shape == parameter.shape:
            # Laid out as the parameter is: a fused optimiser walks both by address, and channels-last kernels would
            # meet the moments of other weights.
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimiser.state[parameter][slot] = value.to(parameter.device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["state"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            str(path), expected="the state of a run", got=str(error)[:120] or "another file",
            do="Remove it to start this run anew.",
        ) from error  # fmt: skip
    if facts.get("format") != _FORMAT:
        raise InputError(str(path), expected=f"format {_FORMAT}", got=str(facts.get("format")))
    return facts  # type: ignore[no-any-return]

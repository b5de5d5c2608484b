"""Averages of weights: over the steps of a run (EMA), between before and after (WiSE-FT), of several runs (soups).

Decisions:
- Averages are held in float32 whatever the model computes in, beside the model, in place of nothing.
- Only what moves is averaged: parameters that learn and float buffers (batch-norm statistics, anchor names).
- Equal scores go to the smaller share: what the model knew before is kept unless moving away pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmsearch.errors import InputError, UsageError

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Average:
    """Exponential moving average of a model: average = d · average + (1 - d) · now, from the weights at the start.

    d rises with the updates t (0, 1, ...) so that a short run is not all start: min(decay, (1 + t) / (10 + t)),
    as in TensorFlow's moving averages. Known value: after the first update 0.1 · start + 0.9 · now.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        """Takes in every parameter of `model` that requires a gradient now, and its float buffers."""
        if not 0.0 <= decay < 1.0:
            raise UsageError("ema decay", expected="a number in [0, 1)", got=str(decay))
        self.decay, self.updates = decay, 0
        self._rows = {name: value.detach().float().clone() for name, value in _moving(model)}

    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = model.state_dict()
        with torch.no_grad():
            for name, row in self._rows.items():
                row.lerp_(now[name].to(row), 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` holds the averages; after it, whatever happened, its own weights."""
        now = model.state_dict()
        own = {name: now[name].detach().clone() for name in self._rows}
        try:
            _fill(model, self._rows)
            yield
        finally:
            _fill(model, own)

    def state(self) -> dict[str, Any]:
        """What `load` needs: {"updates": int, "rows": {name: tensor}}; the tensors are the average's own."""
        return {"updates": self.updates, "rows": dict(self._rows)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()` of an average over the same model; `InputError` when it is of another."""
        rows: Mapping[str, Tensor] = state["rows"]
        _same_names("average", self._rows, rows)
        for name, row in self._rows.items():
            row.copy_(rows[name])
        self.updates = int(state["updates"])


def interpolate(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights on the line between two states: (1 - share) · before + share · after, floats only.

    Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903, eq. 1). Share 0 gives `before` and 1 gives `after`, bit for bit;
    whole numbers (counters) are `after`'s. `InputError` when the states are not of the same model.
    Rows made from weights (the anchors' names) should be made anew from the result.
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError("share", expected="a number in [0, 1]", got=str(share))
    _same_names("interpolation", before, after)
    return {name: _between(before[name], value, share) for name, value in after.items()}


def mean_of(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the weights of runs that began at the same ones: floats only, counters are the first's.

    A uniform model soup (Wortsman et al. 2022, arXiv:2203.05482). `InputError` when the states are not of the same
    model. Rows made from weights (the anchors' names) should be made anew from the result.
    """
    if not states:
        raise UsageError("states", expected="at least one", got="none")
    for state in states[1:]:
        _same_names("mean", states[0], state)
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value.clone()
        for name, value in states[0].items()
    }


def choose_share(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    evaluate: Callable[[], float],
    shares: Sequence[float] = SHARES,
    refresh: Callable[[], None] | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """Try each share on `model` and leave it at the best: (share, [(share, score), ...] in rising order of share).

    `evaluate` scores the model as it stands, on validation data; higher is better, NaN never wins. `refresh` is called
    each time weights were put in: it makes anew what follows from them (the anchors' names).
    """
    if not shares:
        raise UsageError("shares", expected="at least one", got="none")

    def put_in(share: float) -> None:
        model.load_state_dict(interpolate(before, after, share))
        if refresh is not None:
            refresh()

    scores: list[tuple[float, float]] = []
    for share in sorted(set(shares)):
        put_in(share)
        scores.append((share, evaluate()))
    usable = [entry for entry in scores if not math.isnan(entry[1])] or scores[-1:]
    best = max(usable, key=lambda entry: entry[1])[0]  # of equal scores the first, which is the smallest share
    put_in(best)
    return best, scores


def _moving(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, value in model.state_dict().items():
        if name in learning or (name not in frozen and value.is_floating_point()):
            yield name, value


def _fill(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    now = model.state_dict()
    with torch.no_grad():
        for name, row in rows.items():
            now[name].copy_(row)


def _between(before: Tensor, after: Tensor, share: float) -> Tensor:
    if not after.is_floating_point() or share == 1.0:
        return after.detach().clone()
    if share == 0.0:
        return before.detach().to(after).clone()
    return torch.lerp(before.detach().to(after), after.detach(), share)


def _same_names(where: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    odd = sorted(one.keys() ^ other.keys())
    odd += sorted(name for name in one.keys() & other.keys() if one[name].shape != other[name].shape)
    if odd:
        raise InputError(where, expected="weights of the same model", got=f"a difference in {odd[0]}")

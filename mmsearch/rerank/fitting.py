"""Newton's method for a handful of weights, some of which must not be negative.

Decisions:
- Few weights, many rows: each step solves the quadratic model exactly, with the best of all choices which of the
  bounded weights are 0 (at most 2^3 small systems), and is halved until the objective falls (Armijo 1966). No library
  of optimisers is needed, and the answer is the same on every machine.
- A curvature that bounds the true one from above is enough: the steps get shorter, the end is the same.
- A small pull towards 0 (`RIDGE`) keeps the weights finite where the data can be told apart completely.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Objective = Callable[[Floats], tuple[float, Floats, Floats]]
"""Weights (d,) -> value, gradient (d,), curvature (d, d) positive semi-definite."""

RIDGE = 1e-4
_STEPS = 100
_HALVINGS = 40
_ENOUGH = 1e-12


def minimise(objective: Objective, start: Floats, *, lowest: Floats) -> Floats:
    """Weights (d,) that minimise a convex `objective`, each at least its `lowest` (-inf: free).

    `start` (d,) is moved up to `lowest` first. Known value: (w - 2)² bounded below by 3 gives 3.
    """
    at = np.maximum(np.asarray(start, np.float64), lowest)
    value, slope, curvature = objective(at)
    for _ in range(_STEPS):
        step = _best_step(slope, curvature, lowest - at)
        promised = float(slope @ step)
        if promised > -_ENOUGH:
            break
        for halving in range(_HALVINGS):
            part = 0.5**halving
            there = np.maximum(at + part * step, lowest)
            found = objective(there)
            if found[0] <= value + 1e-4 * part * promised:
                break
        else:
            break  # as low as the rounding of the objective allows
        at, (value, slope, curvature) = there, found
    return at


def _best_step(slope: Floats, curvature: Floats, room: Floats) -> Floats:
    """(d,) step that minimises slope · step + step' curvature step / 2, with step >= `room` (0 or below, or -inf)."""
    size = len(slope)
    curvature = curvature + 1e-10 * (1.0 + np.trace(curvature)) * np.eye(size)
    bounded = np.isfinite(room)
    best, least = np.zeros(size), 0.0
    for choice in product((False, True), repeat=int(bounded.sum())):
        held = np.zeros(size, bool)
        held[bounded] = choice
        step = np.where(held, room, 0.0)
        rest = ~held
        if rest.any():
            step[rest] = np.linalg.solve(curvature[np.ix_(rest, rest)], -(slope + curvature @ step)[rest])
        value = float(slope @ step + step @ curvature @ step / 2)
        if (step >= room).all() and value < least:
            best, least = step, value
    return best


def logistic(features: Floats, targets: Floats, row_weights: Floats, *, ridge: float = 0.0) -> Objective:
    """Cross-entropy of sigmoid(features · w) with `targets` (n,) in [0, 1]: its mean over rows, weighted.

    `features` (n, d), `row_weights` (n,) summing to 1. Its curvature is exact.
    """

    def at(w: Floats) -> tuple[float, Floats, Floats]:
        z = features @ w
        p = sigmoid(z)
        value = float(row_weights @ (np.logaddexp(0.0, z) - targets * z)) + ridge / 2 * float(w @ w)
        slope = features.T @ (row_weights * (p - targets)) + ridge * w
        curvature = (features * (row_weights * p * (1 - p))[:, None]).T @ features + ridge * np.eye(len(w))
        return value, slope, curvature

    return at


def sigmoid(z: Floats) -> Floats:
    """1 / (1 + exp(-z)) without overflow, elementwise."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)

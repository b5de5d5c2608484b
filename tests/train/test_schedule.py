"""The learning rate where its value is known."""

import math

import pytest
import torch
from torch import nn

from mmsearch.errors import UsageError
from mmsearch.train.schedule import KINDS, Schedule, rate_at


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 1.0), ("cosine", 50, 0.5), ("cosine", 25, 0.5 + math.sqrt(0.125)), ("cosine", 100, 0.0),
        ("linear", 0, 1.0), ("linear", 50, 0.5), ("linear", 25, 0.75), ("linear", 100, 0.0),
        ("constant", 0, 1.0), ("constant", 100, 1.0),
    ],
)  # fmt: skip
def test_each_curve_has_known_values(kind, step, expected):
    """A run of 100 steps without warm-up."""
    assert rate_at(step, total=100, kind=kind) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_to_the_peak(kind):
    """Four steps: a quarter, a half, three quarters, all; never zero, a step of rate zero is a wasted one."""
    assert [rate_at(s, total=20, warmup=4, kind=kind) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rate_never_rises_after_the_warm_up_and_ends_at_the_floor(kind):
    """From 1 down to the floor, which also holds beyond the end."""
    rates = [rate_at(s, total=50, warmup=5, kind=kind, floor=0.1) for s in range(4, 60)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert set(rates[-10:]) == {0.1}


def test_a_warm_up_longer_than_the_run_only_rises():
    """A trial of three steps with the usual warm-up."""
    assert [rate_at(s, total=3, warmup=10) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert rate_at(12, total=3, warmup=10) == 1.0


@pytest.mark.parametrize(
    "settings",
    [{"kind": "sinus"}, {"total": 0}, {"warmup": -1}, {"floor": 1.5}, {"step": -1}],
)
def test_impossible_schedules_are_refused(settings):
    """At once, with the value in the message."""
    with pytest.raises(UsageError, match="schedule"):
        rate_at(settings.pop("step", 0), **{"total": 10, **settings})
    with pytest.raises(UsageError, match="backbone_start"):
        Schedule(10, backbone_start=-1)


def test_a_late_backbone_waits_then_warms_up_by_itself():
    """Heads follow the common curve; the backbone is at 0 for three steps, then rises in two."""
    schedule = Schedule(100, warmup=2, kind="constant", backbone_start=3)
    assert [schedule.factor(s) for s in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert [schedule.factor(s, part="backbone") for s in range(6)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]


def test_apply_sets_rates_and_lets_a_waiting_backbone_need_no_gradient():
    """Before its start neither rate nor gradient; from it on both. The head always learns."""
    head, backbone = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [
        {"params": [head], "lr": 0.0, "rate": 0.5, "part": "head"},
        {"params": [backbone], "lr": 0.0, "rate": 0.25, "part": "backbone"},
    ]
    schedule = Schedule(100, kind="constant", backbone_start=2)
    schedule.apply(groups, step=1)
    assert [g["lr"] for g in groups] == [0.5, 0.0]
    assert (head.requires_grad, backbone.requires_grad) == (True, False)
    schedule.apply(groups, step=2)
    assert [g["lr"] for g in groups] == [0.5, 0.25]
    assert (head.requires_grad, backbone.requires_grad) == (True, True)

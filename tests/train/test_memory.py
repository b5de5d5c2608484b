"""Rivals from earlier batches: what they add to the loss, who they are, and that they survive an interruption."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from train_kit import Stop, Watch, losses, settings, table

from mmsearch.errors import UsageError
from mmsearch.train.losses import InfoNce, build_objective
from mmsearch.train.memory import Remembering
from mmsearch.train.run import train

ONE = torch.ones(())


def rows(count: int, *, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def alike(count: int) -> torch.Tensor:
    return torch.eye(8)[:1].expand(count, 8)


def value(objective, texts, images, groups, *, scale=ONE):
    return objective(texts, images, scale, text_groups=groups, image_groups=groups)


def groups(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)


def test_rows_that_are_all_alike_have_the_known_value():
    """log(n) / 2 + log(n + k) / 2 nats."""
    objective = Remembering(InfoNce(), 16, 8)
    objective.remember(alike(6), alike(6), groups(10, 6))
    assert float(value(objective, alike(4), alike(4), groups(0, 4))) == pytest.approx(math.log(4) / 2 + math.log(10) / 2)


def test_without_anything_remembered_it_is_the_inner_loss():
    """So the first step of a run is the same with and without."""
    texts, images = rows(5, seed=0), rows(5, seed=1)
    expected = value(InfoNce(), texts, images, groups(0, 5))
    assert torch.allclose(value(Remembering(InfoNce(), 16, 8), texts, images, groups(0, 5)), expected)


@pytest.mark.parametrize("side", ["texts", "images"])
def test_both_sides_meet_remembered_rivals(side):
    """A remembered image lies on a text, or a remembered text on an image: either costs."""
    texts, images = rows(3, seed=0), rows(3, seed=1)
    far = -normalize(texts.sum(0) + images.sum(0), dim=0).expand(1, 8)
    near = {"texts": (images[:1], far), "images": (far, texts[:1])}[side]
    calm, hard = Remembering(InfoNce(), 4, 8), Remembering(InfoNce(), 4, 8)
    calm.remember(far, far, groups(9, 1))
    hard.remember(*near, groups(9, 1))
    ten = torch.tensor(10.0)
    assert value(hard, texts, images, groups(0, 3), scale=ten) > value(calm, texts, images, groups(0, 3), scale=ten) + 0.1


def test_the_own_group_is_no_rival():
    """A caption of the same picture, met a few batches ago, does not repel it."""
    texts, images = rows(4, seed=0), rows(4, seed=1)
    objective = Remembering(InfoNce(), 16, 8)
    objective.remember(rows(1, seed=2), rows(1, seed=3), groups(0, 1))
    expected = value(InfoNce(), texts[:1], images[:1], groups(0, 1))
    assert torch.allclose(value(objective, texts[:1], images[:1], groups(0, 1)), expected)
    assert not torch.allclose(value(objective, texts, images, groups(0, 4)), value(InfoNce(), texts, images, groups(0, 4)))


def test_the_oldest_are_forgotten_first():
    """The places are a ring, and a batch larger than all of it leaves its end."""
    objective = Remembering(InfoNce(), 4, 8)
    for start in (0, 3, 6):
        objective.remember(rows(3, seed=start), rows(3, seed=start), groups(start, 3))
    assert sorted(objective.groups.tolist()) == [5, 6, 7, 8]
    objective.remember(rows(9, seed=9), rows(9, seed=9), groups(10, 9))
    assert sorted(objective.groups.tolist()) == [15, 16, 17, 18]


def test_gradients_go_to_the_batch_alone():
    """What is remembered is a copy, without a history."""
    texts, images = rows(3, seed=0).requires_grad_(), rows(3, seed=1).requires_grad_()
    objective = Remembering(build_objective("info_nce+max_hinge"), 8, 8)
    objective.remember(texts * 1, images * 1, groups(5, 3))
    assert not objective.texts.requires_grad
    value(objective, texts, images, groups(0, 3)).backward()
    assert float(texts.grad.abs().sum()) > 0
    assert float(images.grad.abs().sum()) > 0


def test_a_memory_of_nothing_is_refused():
    """It would only look present."""
    with pytest.raises(UsageError, match=r"objective\.memory"):
        Remembering(InfoNce(), 0, 8)


def test_an_interrupted_run_remembers_what_it_had_met(plain_checkpoint, tmp_path):
    """The same losses as undisturbed, and others than without a memory."""
    pairs = table(tmp_path / "d", 12, captions=2, val=0)
    start = {"model": str(plain_checkpoint.directory)}
    data = {"val_share": 0}
    run = {"epochs": 2, "batch_size": 4, "save_seconds": 0.0}

    def chosen(memory):
        return settings(pairs, start=start, data=data, run=run, objective={"memory": memory})

    train(chosen(8), tmp_path / "calm")
    with pytest.raises(Stop):
        train(chosen(8), tmp_path / "killed", watcher=Watch(stop=2))
    train(chosen(8), tmp_path / "killed")
    train(chosen(0), tmp_path / "without")
    calm, killed, without = (losses(tmp_path / name) for name in ("calm", "killed", "without"))
    assert killed == calm
    assert without[0] == calm[0]
    assert without[1:] != calm[1:]

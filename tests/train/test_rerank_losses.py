"""Losses of the second stage where their values are known, and rivals that are never of the own group."""

import math

import pytest
import torch

from mmsearch.train.rerank_losses import (
    draw_hard,
    drawn_pairs,
    imitation_loss,
    list_loss,
    match_loss,
    matrix_loss,
    rivals,
)

ALONE = torch.arange(6)
SHARED = torch.tensor([0, 1, 1, 2, 2, 2])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64, so that finite differences say something."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(cosines, groups, *, count=3, hardness=20.0, seed=0):
    torch.manual_seed(seed)
    return draw_hard(cosines, groups, count=count, hardness=hardness)


# Known values


@pytest.mark.parametrize("size", [2, 6, 40])
def test_a_matrix_that_tells_nothing_apart_costs_log_b(size):
    """Whatever the common logit is."""
    for logit in (0.0, -7.0):
        found = matrix_loss(torch.full((size, size), logit), torch.arange(size))
        assert float(found) == pytest.approx(math.log(size), abs=1e-5)


def test_a_list_that_tells_nothing_apart_costs_log_of_its_length():
    """1 + k entries; those that are not there do not count."""
    assert float(list_loss(torch.zeros(5, 4))) == pytest.approx(math.log(4))
    short = torch.zeros(5, 4)
    short[:, 2:] = -torch.inf
    assert float(list_loss(short)) == pytest.approx(math.log(2))
    assert float(list_loss(torch.tensor([[1.0, -torch.inf]]))) == 0.0


def test_what_is_told_apart_costs_nothing():
    """True pairs far above all rivals, in each of the losses."""
    eye = 60.0 * torch.eye(6)
    assert float(matrix_loss(eye, ALONE)) < 1e-6
    assert float(list_loss(eye[:1])) < 1e-6
    assert float(match_loss(torch.full((3,), 60.0), torch.full((4,), -60.0))) < 1e-6


def test_even_logits_cost_log_2_however_many_rivals_there_are():
    """Yes and no count alike; without rivals the true pairs stand alone."""
    for rivals_there in (1, 7, 100):
        assert float(match_loss(torch.zeros(3), torch.zeros(rivals_there))) == pytest.approx(math.log(2))
    assert float(match_loss(torch.zeros(3), torch.zeros(0))) == pytest.approx(math.log(2))
    sure = match_loss(torch.zeros(2), torch.full((9,), -60.0))
    assert float(sure) == pytest.approx(math.log(2) / 2)


def test_an_imitation_that_is_perfect_costs_nothing():
    """Also shifted by a constant a list, and with places that are not there; else it is the KL of the shares."""
    teacher = noise(5, 4)
    teacher[1, 2:] = -torch.inf
    assert float(imitation_loss(teacher.clone(), teacher)) == pytest.approx(0.0, abs=1e-12)
    assert float(imitation_loss(teacher + 3.0, teacher)) == pytest.approx(0.0, abs=1e-12)
    one = imitation_loss(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]))
    assert float(one) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_an_imitation_has_a_finite_gradient_where_places_are_missing():
    """-inf on both sides says nothing, and pulls nothing."""
    student, teacher = noise(3, 4), noise(3, 4, seed=1)
    teacher[:, 3] = student[:, 3] = -torch.inf
    student.requires_grad_()
    imitation_loss(student, teacher).backward()
    assert bool(student.grad.isfinite().all())
    assert not student.grad[:, 3].any()


# Symmetry


def test_texts_and_pictures_count_alike():
    """A transposed matrix costs the same."""
    logits = noise(6, 6)
    assert float(matrix_loss(logits, SHARED)) == pytest.approx(float(matrix_loss(logits.T, SHARED)))


def test_the_order_of_a_batch_changes_nothing():
    """Pairs, lists and rivals in another order: the same loss."""
    logits, order = noise(6, 6), torch.randperm(6, generator=torch.Generator().manual_seed(3))
    moved = matrix_loss(logits[order][:, order], SHARED[order])
    assert float(moved) == pytest.approx(float(matrix_loss(logits, SHARED)))
    rows = noise(6, 4)
    others = torch.cat([rows[:, :1], rows[:, [3, 1, 2]]], dim=1)
    assert float(list_loss(rows[order])) == pytest.approx(float(list_loss(rows)))
    assert float(list_loss(others)) == pytest.approx(float(list_loss(rows)))


def test_gradients_are_those_of_the_values():
    """Finite differences agree, groups and missing places included."""
    logits = noise(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: matrix_loss(one, SHARED[:3]), (logits,))
    rows = noise(2, 4).requires_grad_()
    there = torch.tensor([[True, True, True, False]]).expand(2, 4)
    assert torch.autograd.gradcheck(lambda one: list_loss(torch.where(there, one, -torch.inf)), (rows,))
    assert torch.autograd.gradcheck(lambda one: imitation_loss(one, noise(2, 4, seed=2)), (rows,))
    assert torch.autograd.gradcheck(match_loss, (noise(2).requires_grad_(), noise(3).requires_grad_()))


# Groups


def test_pairs_of_one_group_do_not_repel():
    """Their logits change nothing and get no gradient; the own pair's do."""
    logits = noise(6, 6).requires_grad_()
    loss = matrix_loss(logits, SHARED)
    loss.backward()
    own = torch.eye(6, dtype=torch.bool)
    inside = ~rivals(SHARED) & ~own
    assert not logits.grad[inside].any()
    assert bool((logits.grad[~inside] != 0).all())
    moved = torch.where(inside, 50.0, logits.detach())
    assert float(matrix_loss(moved, SHARED)) == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_the_own_group_is_drawn(seed):
    """However near it is; each rival once."""
    cosines = torch.where(rivals(SHARED), 0.0, 1.0)
    for found in drawn(cosines, SHARED, count=5, seed=seed):
        assert found.shape == (6, 5)
        for row, places in enumerate(found.tolist()):
            taken = [place for place in places if place >= 0]
            assert len(taken) == len(set(taken)) == int(rivals(SHARED)[row].sum())
            assert all(SHARED[place] != SHARED[row] for place in taken)


def test_where_no_rival_is_left_there_is_minus_one():
    """At the end of a row; a batch of one group has none at all."""
    of_texts, of_images = drawn(torch.zeros(6, 6), SHARED, count=4)
    assert [int((row < 0).sum()) for row in of_texts] == [0, 0, 0, 1, 1, 1]
    assert bool((of_texts[3:, :3] >= 0).all()) and bool((of_images[3:, 3] == -1).all())
    for found in drawn(torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)):
        assert found.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize(("hardness", "share"), [(0.0, 1 / 3), (20.0, math.exp(2) / (math.exp(2) + 2)), (1e3, 1.0)])
def test_near_rivals_are_drawn_more_often(hardness, share):
    """The first of a draw is as softmax(hardness · cosine) says; at hardness 0 all are alike; both ways."""
    near = torch.arange(900) % 3 == 0
    cosines = 0.1 * near.float().expand(900, 900)
    of_texts, _ = drawn(cosines, torch.arange(900), count=1, hardness=hardness)
    _, of_images = drawn(cosines.T, torch.arange(900), count=1, hardness=hardness)
    for found in (of_texts, of_images):
        assert float(near[found[:, 0]].float().mean()) == pytest.approx(share, abs=0.06)


# Pairs


def test_drawn_pairs_are_the_true_ones_and_each_rival_once():
    """A list's places lead to pairs of its own text, or of its own picture; -1 stays -1."""
    of_texts, of_images = drawn(torch.zeros(6, 6), SHARED, count=4)
    found = drawn_pairs(of_texts, of_images)
    assert found.texts[:6].tolist() == found.images[:6].tolist() == list(range(6))
    assert len(found.texts) == len(found.images) == 6 + int((of_texts >= 0).sum()) + int((of_images >= 0).sum())
    assert bool((SHARED[found.texts[6:]] != SHARED[found.images[6:]]).all())
    assert found.lists.shape == (12, 5)
    assert found.lists[:, 0].tolist() == [*range(6), *range(6)]
    for row, (places, wanted) in enumerate(zip(found.lists[:, 1:], torch.cat([of_texts, of_images]), strict=True)):
        assert bool(((places < 0) == (wanted < 0)).all())
        there = places[places >= 0]
        own, other = (found.texts, found.images) if row < 6 else (found.images, found.texts)
        assert own[there].tolist() == [row % 6] * len(there)
        assert other[there].tolist() == wanted[wanted >= 0].tolist()
    used = found.lists[found.lists >= 6]
    assert sorted(used.tolist()) == list(range(6, len(found.texts)))


def test_lists_over_drawn_pairs_are_the_matrix_when_all_rivals_are_drawn():
    """The clever way and the plain one: k = b - 1 rivals, the same InfoNCE."""
    logits = noise(6, 6)
    found = drawn_pairs(*drawn(torch.zeros(6, 6), SHARED, count=9))
    flat = logits[found.texts, found.images]
    lists = torch.where(found.lists >= 0, flat[found.lists.clamp(min=0)], -torch.inf)
    assert float(list_loss(lists)) == pytest.approx(float(matrix_loss(logits, SHARED)))


def test_a_picture_in_several_columns_is_drawn_once_for_a_text():
    """Only where `first` says so; texts are drawn for all columns."""
    groups = torch.arange(6).repeat_interleave(3)
    first = torch.tensor([True, False, False] * 6)
    torch.manual_seed(0)
    pictures, texts = draw_hard(torch.rand(18, 18), groups, count=5, hardness=5.0, first=first)
    assert first[pictures].all() and all(len(set(row.tolist())) == 5 for row in pictures)
    assert not first[texts].all()

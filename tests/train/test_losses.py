"""Objectives where their values are known: closed forms, symmetries, masks, and loops that cannot be wrong."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mmsearch.errors import UsageError
from mmsearch.train.losses import (
    Blend,
    Distillation,
    Hinge,
    InfoNce,
    Matryoshka,
    SigmoidLoss,
    build_objective,
    soften,
)

NAMES = ["info_nce", "sigmoid", "hinge", "max_hinge", "info_nce+max_hinge"]


def rows(n, d=6, *, seed=0, dtype=torch.float32):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def loss_of(objective, texts, images, *, scale=10.0, groups=None, image_groups=None):
    """The value with every row in a group of its own, unless groups are given."""
    image_groups = torch.arange(len(images)) if image_groups is None else torch.tensor(image_groups)
    groups = image_groups[: len(texts)] if groups is None else torch.tensor(groups)
    scale = torch.tensor(scale, dtype=texts.dtype)
    return objective(texts, images, scale, text_groups=groups, image_groups=image_groups)


def all_alike(n):
    return rows(1).repeat(n, 1)


def cosine_table(table):
    """Rows whose cosines are this table: identity texts against its columns (not unit: only products count)."""
    table = torch.tensor(table)
    return torch.eye(len(table)), table.T.contiguous()


# InfoNCE


@pytest.mark.parametrize("n", [2, 7, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_info_nce_is_log_n_when_nothing_is_distinguishable(n, smoothing):
    """Every partner is equally likely, whatever the temperature and the smoothing."""
    same = all_alike(n)
    assert loss_of(InfoNce(smoothing), same, same).item() == pytest.approx(math.log(n), abs=1e-4)


def test_info_nce_is_zero_when_pairs_are_separable():
    """Own cosine 1, rivals 0, multiplier 100."""
    assert loss_of(InfoNce(), torch.eye(5), torch.eye(5), scale=100.0).item() == 0.0


def test_info_nce_is_the_mean_cross_entropy_of_both_directions():
    """Against torch's own cross_entropy, with its own label smoothing."""
    texts, images, own = rows(5), rows(5, seed=1), torch.arange(5)
    logits = 10 * texts @ images.T
    for smoothing in (0.0, 0.1):
        ways = [cross_entropy(way, own, label_smoothing=smoothing) for way in (logits, logits.T)]
        assert loss_of(InfoNce(smoothing), texts, images).item() == pytest.approx(sum(ways).item() / 2, rel=1e-5)


def test_smoothing_by_hand():
    """Cosines 1 and 0, multiplier 1, s = 0.2: own partner's share is e / (e + 1), the target 0.9 and 0.1."""
    share = math.e / (math.e + 1)
    expected = -0.9 * math.log(share) - 0.1 * math.log(1 - share)
    assert loss_of(InfoNce(0.2), torch.eye(2), torch.eye(2), scale=1.0).item() == pytest.approx(expected, rel=1e-5)


def test_smoothing_is_shared_by_candidates_only():
    """Where a row is masked, the even part is spread over those that are left, in a loop over lines."""
    texts, images = rows(3), rows(3, seed=1)
    texts[2], images[2] = texts[0], images[0]
    masked = loss_of(InfoNce(0.4), texts, images, image_groups=[0, 1, 0])
    logits = 10 * texts @ images.T
    keep = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    expected = []
    for way, kept in ((logits, keep), (logits.T, keep.T)):
        for i in range(3):
            candidates = way[i][kept[i]]
            own = way[i][i] - candidates.logsumexp(0)
            expected.append(-0.6 * own - 0.4 * candidates.log_softmax(0).mean())
    assert masked.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert masked.item() != pytest.approx(loss_of(InfoNce(0.4), texts, images).item(), rel=1e-3)


def test_the_temperature_learns_from_info_nce():
    """A batch that is told apart wants a larger multiplier: the gradient is negative."""
    scale = torch.tensor(2.0, requires_grad=True)
    groups = torch.arange(4)
    InfoNce()(torch.eye(4), torch.eye(4), scale, text_groups=groups, image_groups=groups).backward()
    assert scale.grad < 0


# Sigmoid


def test_sigmoid_has_its_closed_forms():
    """All cosines 0: m · log 2 without bias; softplus(10) + (n - 1) · softplus(-10) with the starting bias."""
    texts, images = torch.eye(6)[:3], torch.eye(6)[3:]
    assert loss_of(SigmoidLoss(bias=0.0), texts, images).item() == pytest.approx(3 * math.log(2), rel=1e-5)
    softplus = math.log1p(math.exp(-10))
    assert loss_of(SigmoidLoss(), texts, images).item() == pytest.approx(10 + softplus + 2 * softplus, rel=1e-5)


def test_sigmoid_is_the_double_loop_of_the_paper():
    """-1/n Σ_i Σ_j log sigmoid(z_ij (t · x_i · y_j + b))."""
    texts, images, total = rows(4), rows(4, seed=1), 0.0
    for i in range(4):
        for j in range(4):
            logit = 10 * float(texts[i] @ images[j]) - 3
            total += math.log1p(math.exp(-logit if i == j else logit))
    assert loss_of(SigmoidLoss(bias=-3.0), texts, images).item() == pytest.approx(total / 4, rel=1e-5)


def test_the_sigmoid_bias_learns_and_is_saved():
    """It is a parameter, in the state, and moves down while most answers are wrongly yes."""
    loss = SigmoidLoss(bias=0.0)
    loss_of(loss, all_alike(4), all_alike(4)).backward()
    assert list(loss.state_dict()) == ["logit_bias"]
    assert loss.logit_bias.grad > 0


# Hinges


def dumb_hinge(texts, images, *, margin, hardest, groups, image_groups):
    """Loops over every query and every rival."""
    ways = []
    for queries, answers, own_groups, groups_there in (
        (texts, images, groups, image_groups),
        (images[: len(texts)], texts, image_groups[: len(texts)], groups),
    ):
        values = []
        for i, query in enumerate(queries):
            own = float(query @ answers[i])
            costs = [
                max(0.0, margin - own + float(query @ answer))
                for answer, group in zip(answers, groups_there, strict=True)
                if group != own_groups[i]
            ]
            values.append((max(costs) if hardest else sum(costs) / len(costs)) if costs else 0.0)
        ways.append(sum(values) / len(values))
    return sum(ways) / 2


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("image_groups", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 3], [0, 0, 0, 0, 0, 0]])
def test_hinges_agree_with_the_loops(hardest, image_groups):
    """Four texts, six images, groups of one, of several, and one only."""
    texts, images, groups = rows(4), rows(6, seed=1), image_groups[:4]
    value = loss_of(Hinge(0.4, hardest=hardest), texts, images, image_groups=image_groups).item()
    settings = {"margin": 0.4, "hardest": hardest, "groups": groups, "image_groups": image_groups}
    assert value == pytest.approx(dumb_hinge(texts, images, **settings), abs=1e-6)


def test_max_hinge_by_hand():
    """Only the worst rival of each line and each column counts."""
    texts, images = cosine_table([[0.9, 0.8, 0.1], [0.0, 0.5, 0.6], [0.2, 0.3, 0.7]])
    lines, columns = [0.1, 0.3, 0.0], [0.0, 0.5, 0.1]
    assert loss_of(Hinge(0.2), texts, images).item() == pytest.approx((sum(lines) + sum(columns)) / 6, abs=1e-6)


def test_mean_hinge_by_hand():
    """Every violation counts, divided by the two rivals."""
    texts, images = cosine_table([[0.9, 0.8, 0.9], [0.0, 0.5, 0.6], [0.2, 0.3, 0.7]])
    lines, columns = [0.1 + 0.2, 0.3, 0.0], [0.0, 0.5, 0.4 + 0.1]
    expected = (sum(lines) + sum(columns)) / 2 / 6
    assert loss_of(Hinge(0.2, hardest=False), texts, images).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hardest", [True, False])
def test_a_hinge_is_its_margin_when_all_is_alike_and_zero_when_separable(hardest):
    """Between the two known ends."""
    hinge = Hinge(0.3, hardest=hardest)
    assert loss_of(hinge, all_alike(5), all_alike(5)).item() == pytest.approx(0.3, abs=1e-6)
    assert loss_of(hinge, torch.eye(5), torch.eye(5)).item() == 0.0


def test_a_softened_max_hinge_is_the_mean_hinge_until_it_is_hardened():
    """Also inside a blend; a mean hinge stays what it is."""
    texts, images = rows(6), rows(6, seed=1)
    mean, hard = loss_of(Hinge(hardest=False), texts, images), loss_of(Hinge(), texts, images)
    blend = Matryoshka(Blend([(1.0, Hinge()), (1.0, Hinge(hardest=False))]), (6,))
    soften(blend, True)
    assert loss_of(blend, texts, images).item() == pytest.approx(2 * mean.item(), rel=1e-5)
    soften(blend, False)
    assert loss_of(blend, texts, images).item() == pytest.approx((mean + hard).item(), rel=1e-5)


# What all objectives promise


@pytest.mark.parametrize("name", NAMES)
def test_texts_and_images_may_change_places(name):
    """Both directions weigh the same."""
    texts, images, objective = rows(5), rows(5, seed=1), build_objective(name)
    assert loss_of(objective, texts, images).item() == pytest.approx(loss_of(objective, images, texts).item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_pairs_does_not_matter(name):
    """Nor the numbers that groups go by."""
    texts, images, order = rows(5), rows(5, seed=1), torch.tensor([3, 1, 4, 0, 2])
    objective, groups = build_objective(name), torch.tensor([0, 1, 0, 2, 3])
    there = loss_of(objective, texts, images, image_groups=groups.tolist())
    back = loss_of(objective, texts[order], images[order], image_groups=(70 - groups[order]).tolist())
    assert there.item() == pytest.approx(back.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_captions_of_one_image_do_not_repel_each_other(name):
    """Pairs 0 and 1 are of one group, pair 2 of another that is far off: wherever the image of pair 1 stands, text 0
    feels nothing of it."""
    texts, images, objective = rows(3), rows(3, seed=1), build_objective(name)
    texts.requires_grad_(True)
    slopes = []
    for other in (images[1], -images[1], texts[0].detach()):
        images[1] = other
        (slope,) = torch.autograd.grad(loss_of(objective, texts, images, image_groups=[4, 4, 9]), texts)
        slopes.append(slope[0])
    assert torch.allclose(slopes[0], slopes[1], atol=1e-7)
    assert torch.allclose(slopes[0], slopes[2], atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_a_masked_image_but_a_broken_pair_stays_visible(name):
    """Masks select: NaN under the mask stays there. In a pair of its own it makes the value NaN, for the trainer."""
    texts, images, broken = rows(2), rows(2, seed=1), torch.full((1, 6), torch.nan)
    assert loss_of(build_objective(name), texts, torch.cat([images, broken]), image_groups=[4, 4, 4]).isfinite()
    assert loss_of(build_objective(name), texts, torch.cat([images[:1], broken])).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_extra_images_are_negatives_of_texts_only(name):
    """An extra image that no text is near changes little, one that is a text's twin raises the value."""
    texts, images, objective = rows(4), rows(4, seed=1), build_objective(name)
    far = loss_of(objective, texts, torch.cat([images, -texts.mean(0, keepdim=True)]))
    twin = loss_of(objective, texts, torch.cat([images, texts[:1]]))
    assert twin > far
    same_group = loss_of(objective, texts, torch.cat([images, texts[:1]]), image_groups=[0, 1, 2, 3, 0])
    assert same_group < twin


@pytest.mark.parametrize("name", [*NAMES, "hinge+0.5*sigmoid"])
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_gradients_are_right_in_float64(name, groups):
    """gradcheck over texts, images and the multiplier, with masked pairs and an extra image."""
    objective = build_objective(name, margin=0.37).double()
    image_groups = torch.tensor(groups)

    def value(texts, images, scale):
        return objective(texts, images, scale, text_groups=image_groups[:4], image_groups=image_groups)

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = (rows(4, dtype=torch.float64), rows(5, seed=1, dtype=torch.float64))
    assert torch.autograd.gradcheck(value, (*(row.requires_grad_(True) for row in inputs), scale))


def test_smoothing_and_shortening_have_right_gradients():
    """gradcheck where smoothing, masks and renormalised prefixes meet."""
    objective, groups = build_objective("info_nce", smoothing=0.2, matryoshka_dims=(2, 6)), torch.tensor([0, 1, 0])
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = [rows(3, seed=seed, dtype=torch.float64).requires_grad_(True) for seed in (0, 1)]
    assert torch.autograd.gradcheck(
        lambda texts, images: objective(texts, images, scale, text_groups=groups, image_groups=groups), inputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_rivals_is_finite_and_trains_without_nan(name):
    """One pair alone, or one group only: InfoNCE and hinges have nothing to say."""
    texts = rows(2).requires_grad_(True)
    value = loss_of(build_objective(name), texts, rows(2, seed=1), image_groups=[5, 5])
    value.backward()
    assert texts.grad.isfinite().all()
    assert name == "sigmoid" or value.item() == pytest.approx(0.0, abs=1e-6)
    assert loss_of(build_objective(name), rows(1), rows(1)).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_half_precision_rows_do_not_blur_the_cosines(name):
    """bfloat16 would round cosines to two digits; a multiplier of 100 makes whole nats of that."""
    texts, images, objective = rows(8), rows(8, seed=1), build_objective(name)
    plain = loss_of(objective, texts, images, scale=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss_of(objective, texts, images, scale=100.0)
    assert under.dtype == torch.float32
    assert under.item() == pytest.approx(plain.item(), rel=1e-5)
    assert loss_of(objective, texts.half(), images.half()).dtype == torch.float32


# Matryoshka, blends, distillation


@pytest.mark.parametrize("name", NAMES)
def test_matryoshka_is_the_weighted_sum_over_renormalised_prefixes(name):
    """By hand: cut, normalise, take the inner objective, weigh, add."""
    texts, images, inner = rows(5), rows(5, seed=1), build_objective(name)
    expected = sum(
        weight * loss_of(inner, normalize(texts[:, :dim], dim=-1), normalize(images[:, :dim], dim=-1)).item()
        for dim, weight in ((2, 0.5), (4, 1.0), (6, 2.0))
    )
    value = loss_of(Matryoshka(inner, (2, 4, 6), (0.5, 1.0, 2.0)), texts, images)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_a_matryoshka_without_the_whole_dimension_is_refused():
    """Whole rows are what an index keeps; an objective that never sees them would be a trap."""
    for dims in ((2, 4), (2, 4, 7)):
        with pytest.raises(UsageError, match=r"expected 6 as the largest"):
            loss_of(Matryoshka(InfoNce(), dims), rows(3), rows(3))


@pytest.mark.parametrize("dims", [(), (0, 6), (3, 3, 6)])
def test_dimensions_that_cannot_be_are_refused(dims):
    """None, nothing, twice."""
    with pytest.raises(UsageError, match="distinct"):
        Matryoshka(InfoNce(), dims)


def test_every_dimension_has_its_weight():
    """Two dimensions, one weight."""
    with pytest.raises(UsageError, match="2 of them"):
        Matryoshka(InfoNce(), (3, 6), (1.0,))


def test_a_blend_is_the_weighted_sum_and_owns_the_parameters_of_its_parts():
    """Also nested; the sigmoid's bias is trained and saved with it."""
    texts, images = rows(5), rows(5, seed=1)
    parts = [(0.5, InfoNce()), (2.0, SigmoidLoss()), (3.0, Hinge())]
    expected = sum(weight * loss_of(objective, texts, images).item() for weight, objective in parts)
    blend = Blend([(1.0, Blend(parts))])
    assert loss_of(blend, texts, images).item() == pytest.approx(expected, rel=1e-5)
    assert len(list(blend.parameters())) == 1


def distilled(student, teacher, *, weight=1.0, scale=10.0, teacher_scale=10.0, groups=(0, 1, 2, 3)):
    groups = torch.tensor(groups)
    return Distillation(weight, teacher_scale)(
        *student, torch.tensor(scale), text_groups=groups, image_groups=groups,
        teacher_texts=teacher[0], teacher_images=teacher[1],
    )  # fmt: skip


def test_distillation_is_zero_when_student_and_teacher_agree_and_positive_otherwise():
    """KL is 0 for equal distributions only; a rotated space is the same space."""
    student, other = (rows(4), rows(4, seed=1)), (rows(4, seed=2), rows(4, seed=3))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5))).Q
    assert distilled(student, student).item() == pytest.approx(0.0, abs=1e-6)
    assert distilled(student, [part @ turn for part in student]).item() == pytest.approx(0.0, abs=1e-5)
    assert distilled(student, other).item() > 0.1
    assert distilled(student, student, teacher_scale=30.0).item() > 0.01


def test_distillation_by_hand_with_a_masked_pair():
    """Σ p (log p - log q) over the candidates that are left, mean over lines, both directions, weighted."""
    student, teacher = (rows(3), rows(3, seed=1)), (rows(3, d=9, seed=2), rows(3, d=9, seed=3))
    guess, target = 10 * student[0] @ student[1].T, 20 * teacher[0] @ teacher[1].T
    kept = [[0, 1], [0, 1, 2], [1, 2]]  # pairs 0 and 2 are of one group
    lines = [
        sum(p * (math.log(p) - q) for p, q in zip(t[k].softmax(0).tolist(), g[k].log_softmax(0).tolist(), strict=True))
        for way_guess, way_target in ((guess, target), (guess.T, target.T))
        for g, t, k in zip(way_guess, way_target, kept, strict=True)
    ]
    value = distilled(student, teacher, weight=0.7, teacher_scale=20.0, groups=(4, 5, 4))
    assert value.item() == pytest.approx(0.7 * sum(lines) / 6, rel=1e-4)


def test_the_teacher_learns_nothing():
    """Gradients reach the student and its temperature only, and are finite beside masked pairs."""
    student = [rows(4).requires_grad_(True), rows(4, seed=1).requires_grad_(True)]
    teacher = [rows(4, seed=2).requires_grad_(True), rows(4, seed=3).requires_grad_(True)]
    distilled(student, teacher, groups=(0, 1, 0, 2)).backward()
    assert all(part.grad.isfinite().all() and part.grad.abs().sum() > 0 for part in student)
    assert all(part.grad is None for part in teacher)


# Names and refusals


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_an_objective(name):
    """The table and the blend of the contract."""
    assert loss_of(build_objective(name), rows(3), rows(3, seed=1)).ndim == 0


def test_a_name_carries_its_weights_and_settings():
    """ "info_nce+10*max_hinge" is one InfoNCE plus ten max-hinges, with smoothing and margin passed on."""
    texts, images = rows(5), rows(5, seed=1)
    value = loss_of(build_objective("info_nce + 10*max_hinge", smoothing=0.1, margin=0.5), texts, images).item()
    expected = loss_of(InfoNce(0.1), texts, images).item() + 10 * loss_of(Hinge(0.5), texts, images).item()
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["clip", "", "info_nce+", "two*hinge", "0*hinge", "-1*hinge", "nan*hinge", "inf*hinge"]
)
def test_an_unknown_loss_is_refused_with_the_names_there_are(name):
    """A typing mistake is said before any training."""
    with pytest.raises(UsageError, match="info_nce, max_hinge"):
        build_objective(name)


def test_smoothing_that_nothing_would_use_is_refused():
    """A hinge knows no labels to smooth."""
    with pytest.raises(UsageError, match="info_nce"):
        build_objective("max_hinge", smoothing=0.1)


def test_only_the_sigmoid_asks_for_another_start_of_the_temperature():
    """Also through a blend or a Matryoshka around it."""
    assert build_objective("sigmoid").start_logit_scale == 10.0
    assert build_objective("hinge+sigmoid", matryoshka_dims=(3, 6)).start_logit_scale == 10.0
    assert build_objective("info_nce+max_hinge").start_logit_scale is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: InfoNce(1.0), lambda: InfoNce(-0.1), lambda: Hinge(0.0), lambda: Hinge(3.0), lambda: Blend([]),
        lambda: Distillation(-1.0, 10.0), lambda: Distillation(1.0, 0.0), lambda: Distillation(math.nan, 1.0),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(make):
    """Before the first batch."""
    with pytest.raises(UsageError):
        make()


def test_pairs_that_slipped_are_refused():
    """Text i beside an image of another group: the mistake that trains happily on wrong pairs."""
    with pytest.raises(UsageError, match="pair 1 of the batch"):
        loss_of(InfoNce(), rows(3), rows(3), groups=[0, 2, 1], image_groups=[0, 1, 2])


@pytest.mark.parametrize(
    ("texts", "images", "groups", "image_groups"),
    [
        (rows(3), rows(2), [0, 1, 2], [0, 1]),
        (rows(2, 4), rows(2, 5), [0, 1], [0, 1]),
        (rows(2)[:0], rows(2), [], [0, 1]),
        (rows(2), rows(2), [0], [0, 1]),
        (rows(2), rows(3), [0, 1], [0, 1]),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(texts, images, groups, image_groups):
    """Fewer images than texts, another dimension, nothing, too few groups."""
    with pytest.raises(UsageError, match="batch"):
        loss_of(InfoNce(), texts, images, groups=groups, image_groups=image_groups)

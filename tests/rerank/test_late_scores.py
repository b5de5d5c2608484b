"""Words and patches looking for each other: known values, and the gradient against torch's own."""

import pytest
import torch

from mmsearch.rerank.late_scores import late_scores

NEVER = -1e4


def inputs(b=3, t=4, n=2, p=5, *, dtype=torch.float64):
    """(similarity, word shares, bias, patch shares, sharpness); the first text has two words, the others all."""
    draw = torch.Generator().manual_seed(0)
    bias = torch.zeros(b, t, dtype=dtype)
    bias[0, 2:] = NEVER
    shares = (torch.randn(b, t, generator=draw, dtype=dtype) + bias).softmax(dim=1)
    of_patches = torch.randn(n, p, generator=draw, dtype=dtype).softmax(dim=1)
    similarity = torch.randn(b, t, n, p, generator=draw, dtype=dtype)
    return similarity, shares, bias, of_patches, torch.tensor([3.0, 2.0], dtype=dtype)


def plainly(similarity, shares, bias, of_patches, sharpness):
    """The module's formulas, pair by pair, left to torch."""
    by_words, by_patches = [], []
    for text, share, start in zip(similarity, shares, bias, strict=True):
        for picture, own in zip(text.transpose(0, 1), of_patches, strict=True):  # (t, p)
            by_words.append(share @ ((sharpness[0] * picture).softmax(1) * picture).sum(1))
            by_patches.append(own @ ((sharpness[1] * picture + start[:, None]).softmax(0) * picture).sum(0))
    shape = (len(similarity), len(of_patches))
    return torch.stack(by_words).reshape(shape), torch.stack(by_patches).reshape(shape)


def test_they_are_what_the_formulas_say():
    for found, expected in zip(late_scores(*inputs()), plainly(*inputs()), strict=True):
        assert torch.allclose(found, expected)


def test_one_similarity_everywhere_is_the_score():
    similarity, *others = inputs()
    for found in late_scores(torch.full_like(similarity, 0.25), *others):
        assert torch.allclose(found, torch.full_like(found, 0.25))


def test_very_sharp_eyes_see_the_best_alone():
    similarity, shares, bias, of_patches, sharpness = inputs()
    by_words, by_patches = late_scores(similarity, shares, bias, of_patches, sharpness * 1000)
    assert torch.allclose(by_words, torch.einsum("bt,btn->bn", shares, similarity.amax(dim=3)), atol=1e-4)
    best = torch.where((bias < 0)[:, :, None, None], torch.full_like(similarity, NEVER), similarity).amax(dim=1)
    assert torch.allclose(by_patches, torch.einsum("np,bnp->bn", of_patches, best), atol=1e-4)


@pytest.mark.parametrize("asked", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_the_gradient_is_torchs_own(asked):
    """Of all that learns, for a loss of either score and of both, unlike for every pair."""
    gradients = []
    for scores in (late_scores, plainly):
        similarity, shares, bias, of_patches, sharpness = inputs()
        learning = [part.requires_grad_() for part in (similarity, shares, of_patches, sharpness)]
        by_words, by_patches = scores(similarity, shares, bias, of_patches, sharpness)
        unlike = torch.arange(1.0, 1.0 + by_words.numel(), dtype=by_words.dtype).reshape(by_words.shape)
        ((asked[0] * by_words + asked[1] * by_patches) * unlike).sum().backward()
        gradients.append([part.grad for part in learning])
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-10)


def test_what_is_no_word_has_no_gradient():
    similarity, *others = inputs()
    sum(part.sum() for part in late_scores(similarity.requires_grad_(), *others)).backward()
    assert not similarity.grad[0, 2:].any() and similarity.grad[1].abs().min() > 0


def test_half_precision_around_it_changes_nothing():
    """Similarities times a sharpness need their digits, on the way back too, even when that is under autocast."""
    found = []
    for enabled in (False, True):
        similarity, shares, bias, of_patches, sharpness = inputs(dtype=torch.float32)
        learning = [part.requires_grad_() for part in (similarity, shares, of_patches, sharpness)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            scores = late_scores(similarity, shares, bias, of_patches, sharpness)
            sum(part.square().sum() for part in scores).backward()
        found.append([*scores, *(part.grad for part in learning)])
    for plain, half in zip(*found, strict=True):
        assert half.dtype == torch.float32 and torch.equal(plain, half)


def test_a_second_derivative_is_refused():
    similarity, *others = inputs()
    by_words, _ = late_scores(similarity.requires_grad_(), *others)
    (gradient,) = torch.autograd.grad(by_words.sum(), similarity, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|does not require grad"):
        gradient.sum().backward()

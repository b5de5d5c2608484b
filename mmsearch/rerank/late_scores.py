"""Words looking for patches and patches for words, from their similarities, with a gradient of its own.

For similarities s of one text and one picture, λ and μ the sharpness of either way, q and r shares that sum to 1:

    by words    Σ_t q_t w_t,  w_t = Σ_p a_tp s_tp,  a_t = softmax over p of λ s_t
    by patches  Σ_p r_p v_p,  v_p = Σ_t l_tp s_tp,  l_p = softmax over t of μ s_p + bias

    ∂w_t/∂s_tp = a_tp (1 + λ (s_tp - w_t)),  ∂w_t/∂λ = Σ_p a_tp (s_tp - w_t) s_tp,  and the same for v.

Decisions:
- What torch would keep of each step for the backward pass is four times the similarities and most of a training step's
  time. Here the similarities alone are kept, and both softmaxes are made again.
- Differentiable once: nothing asks for more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def late_scores(
    similarity: Tensor, word_shares: Tensor, word_bias: Tensor, patch_shares: Tensor, sharpness: Tensor
) -> tuple[Tensor, Tensor]:
    """(b, t, n, p) float32 similarities of b texts and n pictures -> (b, n) by words and (b, n) by patches.

    `word_shares` (b, t), `patch_shares` (n, p) summing to 1; `word_bias` (b, t): 0, or very low where there is no word;
    `sharpness` (2,): λ and μ, above 0.
    """
    with torch.autocast(similarity.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _LateScores.apply(similarity, word_shares, word_bias, patch_shares, sharpness)
    return found


def _attention(similarity: Tensor, sharpness: Tensor) -> Tensor:
    """(b, t, n, p) -> where each word looks: summing to 1 over p."""
    return (similarity * sharpness[0]).softmax(dim=-1)


def _looking(similarity: Tensor, bias: Tensor, sharpness: Tensor) -> Tensor:
    """(b, t, n, p) -> where each patch looks: summing to 1 over t."""
    return torch.addcmul(bias[:, :, None, None], similarity, sharpness[1]).softmax(dim=1)


class _LateScores(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's own context
        similarity, word_shares, bias, patch_shares, sharpness = given
        words = _attention(similarity, sharpness).mul_(similarity).sum(dim=-1)  # (b, t, n)
        patches = _looking(similarity, bias, sharpness).mul_(similarity).sum(dim=1)  # (b, n, p)
        ctx.save_for_backward(similarity, word_shares, bias, patch_shares, sharpness, words, patches)
        return torch.einsum("btn,bt->bn", words, word_shares), torch.einsum("bnp,np->bn", patches, patch_shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:  # noqa: ANN401 - as above
        similarity, word_shares, bias, patch_shares, sharpness, words, patches = ctx.saved_tensors
        with torch.autocast(similarity.device.type, enabled=False):
            return _gradients(similarity, word_shares, bias, patch_shares, sharpness, words, patches, *gradients)


def _gradients(
    similarity: Tensor, word_shares: Tensor, bias: Tensor, patch_shares: Tensor, sharpness: Tensor, words: Tensor,
    patches: Tensor, of_words: Tensor, of_patches: Tensor,
) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:  # fmt: skip
    """From what `forward` was given and found, and the gradients (b, n) of both scores: those of what it was given."""
    pulls = of_words[:, None, :] * word_shares[:, :, None]  # (b, t, n)
    weights = _attention(similarity, sharpness).mul_(pulls.unsqueeze(-1))
    whole, first = _pulled(weights, similarity, words.unsqueeze(-1), sharpness[0])
    pulls = of_patches[:, :, None] * patch_shares  # (b, n, p)
    weights = _looking(similarity, bias, sharpness).mul_(pulls.unsqueeze(1))
    more, second = _pulled(weights, similarity, patches.unsqueeze(1), sharpness[1])
    return (
        whole.add_(more),
        torch.einsum("bn,btn->bt", of_words, words),
        None,
        torch.einsum("bn,bnp->np", of_patches, patches),
        torch.stack([first, second]),
    )


def _pulled(weights: Tensor, similarity: Tensor, mean: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ weights · s / Σ over its softmax axis, by s (b, t, n, p) and by the sharpness ()."""
    above = (similarity - mean).mul_(weights)
    by_sharpness = torch.dot(above.flatten(), similarity.flatten())
    return weights.add_(above.mul_(sharpness)), by_sharpness

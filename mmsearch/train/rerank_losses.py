"""What is asked of a batch of texts and pictures in the second stage.

The list loss is the symmetric InfoNCE over logits of pairs; the yes/no loss is image-text matching (ITM) with hard
negatives drawn by the first stage's similarity (Li et al. 2021, ALBEF, arXiv:2107.07651, section 3.2: for every text
one picture and for every picture one text, by softmax of similarity, the own group's left out).

Decisions:
- A caption of the same group is never a rival: its pairs are taken out of lists and are never drawn.
- Yes and no count alike in the yes/no loss, however many rivals were drawn: an even logit is an even balanced pair.
- Of the pairs of a batch only those that are needed are read together, where reading them costs (`negatives` > 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pairs of a batch of b texts and b pictures, pair i belonging together: `texts`, `images` (m,) int64.

    The first b are the true ones. `lists` (2 b, 1 + k) int64: places in the pairs, of each text's list and then of each
    picture's, the true one first, -1 where there was no rival left.
    """

    texts: Tensor
    images: Tensor
    lists: Tensor


def rivals(groups: Tensor) -> Tensor:
    """(b,) -> (b, b) bool: True where text i and picture j are of different groups."""
    return groups.unsqueeze(1) != groups.unsqueeze(0)


def draw_hard(
    cosines: Tensor, groups: Tensor, *, count: int, hardness: float, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rivals by softmax(hardness · cosine) without replacement: (b, k) pictures of texts, (b, k) texts of pictures.

    `cosines` (b, b) of texts and pictures in the first stage. k = min(count, b - 1); -1 where a row has too few rivals.
    `first` (b,) bool: a picture that stands in several columns is drawn for a text only where this is True.
    Uses torch's global random numbers.
    """
    apart = rivals(groups)
    k = min(count, len(groups) - 1)
    found = []
    for scores, allowed in ((cosines, apart if first is None else apart & first), (cosines.T, apart.T)):
        noise = -torch.empty_like(scores).exponential_().log()  # Gumbel: the k best of noisy scores are such a draw
        noisy = torch.where(allowed, hardness * scores + noise, torch.full_like(scores, -torch.inf))
        best = noisy.topk(k, dim=1)
        found.append(torch.where(best.values.isinf(), torch.full_like(best.indices, -1), best.indices))
    return found[0], found[1]


def drawn_pairs(of_texts: Tensor, of_images: Tensor) -> Drawn:
    """The true pairs and those of `draw_hard`, as one list of pairs, and the lists over it."""
    b = len(of_texts)
    own = torch.arange(b, device=of_texts.device)
    texts, images, lists = [own], [own], []
    start = b
    for rival, text_first in ((of_texts, True), (of_images, False)):
        there = rival >= 0
        mine = own.unsqueeze(1).expand_as(rival)[there]
        texts.append(mine if text_first else rival[there])
        images.append(rival[there] if text_first else mine)
        places = torch.full_like(rival, -1)
        places[there] = torch.arange(start, start + int(there.sum()), device=rival.device)
        start += int(there.sum())
        lists.append(torch.cat([own.unsqueeze(1), places], dim=1))
    return Drawn(torch.cat(texts), torch.cat(images), torch.cat(lists))


def list_loss(lists: Tensor) -> Tensor:
    """(n, 1 + k) logits, the true pair first, -inf where there is none -> mean cross-entropy.

    Known value: log(1 + k) when nothing is told apart.
    """
    return functional.cross_entropy(lists, torch.zeros(len(lists), dtype=torch.int64, device=lists.device))


def matrix_loss(logits: Tensor, groups: Tensor) -> Tensor:
    """(b, b) logits of all texts with all pictures -> symmetric InfoNCE; pairs of one group but the own left out.

    Known value: log(b) when nothing is told apart and all groups differ.
    """
    own = torch.eye(len(groups), dtype=torch.bool, device=logits.device)
    kept = torch.where(rivals(groups) | own, logits, torch.full_like(logits, -torch.inf))
    target = torch.arange(len(groups), device=logits.device)
    return (functional.cross_entropy(kept, target) + functional.cross_entropy(kept.T, target)) / 2


def match_loss(true: Tensor, false: Tensor) -> Tensor:
    """(m,) logits of pairs that match and (n,) of pairs that do not -> mean of both sides' binary cross-entropies.

    Known value: log 2 for logits of 0. Without false pairs: the true side's alone.
    """
    yes = functional.softplus(-true).mean()
    return (yes + functional.softplus(false).mean()) / 2 if len(false) else yes


def imitation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, 1 + k) logits of lists each, -inf where there is none -> KL of the teacher's shares from the student's.

    Hinton et al. 2015, arXiv:1503.02531, at temperature 1. Known value: 0 for equal logits.
    """
    there = torch.isfinite(teacher)
    shares = teacher.softmax(dim=1)
    gap = torch.where(there, teacher.log_softmax(dim=1) - student.log_softmax(dim=1), torch.zeros_like(teacher))
    return (shares * gap).sum(dim=1).mean()

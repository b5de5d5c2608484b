"""Feature level, read apart and compared late: every word with every patch, by similarity alone.

The soft maximum over patches is that of SCAN (Lee et al. 2018, arXiv:1803.08024); a hard one is FILIP (Yao et al. 2021,
arXiv:2111.07783) and ColBERT (Khattab & Zaharia 2020, arXiv:2004.12832), which this becomes as `log_sharpness` grows.

Decisions:
- Words get context from `config.layers` layers of text alone (the text backbone's upper ones, `start_from`), at the
  words' own width; only then are they projected to `config.width`. 0 layers: they are taken as they come.
- Nothing is computed a pair but the similarities: `pairwise` makes all of them by one product a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.errors import ModelError
from mmsearch.rerank.base import Fusion, ImageSide, TextSide
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.late_scores import late_scores
from mmsearch.rerank.layers import Layer, Logit, PatchInput, blank_masked, copy_layers, cosine, mask_bias

if TYPE_CHECKING:
    from transformers import BertModel

_START_SHARPNESS = 10.0
_START_SCALE = 10.0
_ALIKE = 4
"""Words by which texts of one chunk may differ, or a quarter."""


class _Words(NamedTuple):
    """Projected words (b, t, w) of unit length, their shares (b, t) summing to 1, `bias` (b, t), pooled unit (b, w)."""

    vectors: Tensor
    shares: Tensor
    bias: Tensor
    pooled: Tensor

    def cut(self, start: int, stop: int) -> _Words:
        return _Words(*(part[start:stop] for part in self))

    def short(self, length: int) -> _Words:
        """Only the first `length` places; what is behind must be masked."""
        return _Words(self.vectors[:, :length], self.shares[:, :length], self.bias[:, :length], self.pooled)


class _Patches(NamedTuple):
    """Projected patches (n, p, w) of unit length, their shares (n, p) summing to 1, pooled unit (n, w)."""

    vectors: Tensor
    shares: Tensor
    pooled: Tensor

    def cut(self, start: int, stop: int) -> _Patches:
        return _Patches(*(part[start:stop] for part in self))


class LateInteraction(Fusion):
    """scale · (a · words→patches + b · patches→words + c · pooled) + e · cosine of the rows + bias; a + b + c = 1.

    words→patches: for each word the soft maximum over patches of their cosine, softmax(λ s)·s; words weighted by
    learned shares. patches→words: the same the other way round. pooled: cosine of both sides' weighted means. λ, the
    shares, a, b, c are learned; `e` starts at 0. Attention: softmax over patches of λ s.
    """

    floats_at_once = 1 << 25
    """How many similarities `pairwise` holds in one piece (128 MiB of float32), at least those of one pair."""

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        if config.layers and text_width % config.heads:
            raise ModelError("re-ranker heads", expected=f"a divisor of {text_width}", got=str(config.heads))
        dropout = config.dropout
        self.layers = nn.ModuleList(
            Layer(text_width, heads=config.heads, dropout=dropout) for _ in range(config.layers)
        )
        self.patch_input = PatchInput(config.patch_dim, patches=config.patches, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.word_projection = nn.Linear(text_width, config.width)
        self.patch_projection = nn.Linear(config.patch_dim, config.width)
        self.word_share, self.patch_share = Logit(text_width, zero=True), Logit(config.patch_dim, zero=True)
        self.log_sharpness = nn.Parameter(torch.full((2,), _START_SHARPNESS).log())
        self.mixture = nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.tensor(_START_SCALE))
        self.bias, self.cosine_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor]:
        """See the class."""
        words, patches = self._words(text), self._patches(image)
        similarity = (words.vectors @ patches.vectors.transpose(1, 2)).float()  # (b, t, p)
        to_patches, to_words = self.log_sharpness.exp()
        attention = torch.softmax(to_patches * similarity, dim=-1)
        by_words = ((attention * similarity).sum(dim=-1) * words.shares).sum(dim=-1)
        looking = torch.softmax(to_words * similarity + words.bias.unsqueeze(-1), dim=-2)
        by_patches = ((looking * similarity).sum(dim=-2) * patches.shares).sum(dim=-1)
        logits = self._mixed(by_words, by_patches, cosine(words.pooled, patches.pooled))
        return logits + self.cosine_scale * cosine(text.rows, image.rows), attention

    def pairwise(self, text: TextSide, image: ImageSide) -> Tensor:
        """As the base says, in chunks of at most `floats_at_once` similarities; each side is read once.

        Texts of like length share a chunk, cut to its longest: most of what pads a batch is never computed.
        """
        self.check(text, image)
        b, n = len(text.rows), len(image.rows)
        if not b or not n:
            return text.rows.new_zeros((b, n), dtype=torch.float32)
        words, patches = self._words(text), self._patches(image)
        order, lengths = _by_length(text.mask)
        words, p = _Words(*(part[order] for part in words)), patches.vectors.shape[1]
        pieces = []
        for start, stop in _chunks(lengths, most=self.floats_at_once // (n * p)):
            some = words.cut(start, stop).short(lengths[stop - 1])
            pictures = max(1, self.floats_at_once // (p * lengths[stop - 1] * (stop - start)))
            parts = [self._all_pairs(some, patches.cut(i, i + pictures)) for i in range(0, n, pictures)]
            pieces.append(torch.cat(parts, dim=1))
        late = torch.cat(pieces)[order.argsort()]
        return late + self.cosine_scale * _products(text.rows, image.rows)

    def start_from(self, backbone: BertModel) -> None:
        """The context layers become the backbone's above `config.text_layer`."""
        copy_layers(self.layers, backbone, start=self.config.text_layer)

    def _words(self, text: TextSide) -> _Words:
        bias, tokens = mask_bias(text.mask), self.dropout(blank_masked(text.tokens, text.mask))
        for layer in self.layers:
            tokens, _ = layer(tokens, bias)
        shares = torch.softmax(self.word_share(tokens) + bias, dim=-1)
        vectors = self.word_projection(tokens)
        return _Words(_unit(vectors), shares, bias, _pooled(vectors, shares))

    def _patches(self, image: ImageSide) -> _Patches:
        tokens = self.patch_input(image.patches)
        shares = torch.softmax(self.patch_share(tokens), dim=-1)
        vectors = self.patch_projection(tokens)
        return _Patches(_unit(vectors), shares, _pooled(vectors, shares))

    def _all_pairs(self, words: _Words, patches: _Patches) -> Tensor:
        """b words, n patches -> (b, n) logits without the rows' cosine."""
        (b, t, _), (n, p, _) = words.vectors.shape, patches.vectors.shape
        flat = words.vectors.flatten(0, 1) @ patches.vectors.flatten(0, 1).T  # (b t, n p)
        by_words, by_patches = late_scores(
            flat.float().reshape(b, t, n, p), words.shares.float(), words.bias, patches.shares.float(),
            self.log_sharpness.exp(),
        )  # fmt: skip
        return self._mixed(by_words, by_patches, _products(words.pooled, patches.pooled))

    def _mixed(self, by_words: Tensor, by_patches: Tensor, pooled: Tensor) -> Tensor:
        shares = torch.softmax(self.mixture, dim=0)
        mixed = shares[0] * by_words + shares[1] * by_patches + shares[2] * pooled
        return self.scale * mixed + self.bias


def _by_length(mask: Tensor) -> tuple[Tensor, list[int]]:
    """(b, t) of 0/1 -> (b,) rows from short to long, and up to where each of them has words.

    A text without a word has shares at every place: it counts as the longest.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends = (mask.bool() * places).amax(dim=1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.int64)
    ends = torch.where(ends > 0, ends, max(1, mask.shape[1]))
    order = ends.argsort(stable=True)
    return order, ends[order].tolist()


def _chunks(lengths: Sequence[int], *, most: int) -> Iterator[tuple[int, int]]:
    """Rising lengths -> from and to of each chunk: at most `most` places with what pads them, of like length.

    A text alone may have more.
    """
    start = 0
    while start < len(lengths):
        stop, longest = start + 1, max(lengths[start] + _ALIKE, lengths[start] * 5 // 4)
        while stop < len(lengths) and lengths[stop] <= longest and (stop + 1 - start) * lengths[stop] <= most:
            stop += 1
        yield start, stop
        start = stop


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(b, w), (n, w) -> (b, n) float32, also under autocast: half precision would tie neighbours."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float().T


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors.float(), dim=-1)


def _pooled(vectors: Tensor, shares: Tensor) -> Tensor:
    """(b, t, w), (b, t) -> (b, w) float32 unit rows of the weighted mean."""
    return _unit((vectors.float() * shares.unsqueeze(-1)).sum(dim=1))

"""What the fusions that read words and patches are put together from.

Decisions:
- Layers are those of BERT (Devlin et al. 2018, arXiv:1810.04805: norm after the sum, GELU, an inner width of four times
  the outer), so that a text backbone's own can be copied into them: `copy_layer`.
- Attention is written out, not torch's fused kernel: a few dozen words are no burden, the weights are wanted for
  explanations, softmax stays in single precision under autocast, and the exported graph is plain.
- Masked words are replaced by zeros before anything is computed and get a bias that softmax turns into an exact 0:
  NaN there reaches neither value nor gradient. A text with no word at all gives some finite number.
- Every module lets one row meet many: a side of batch 1 is read once and broadcast where both meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import BertModel

_LOWEST = torch.finfo(torch.float32).min
_INNER = 4
_EPSILON = 1e-12  # of BERT's norms


def blank_masked(tokens: Tensor, mask: Tensor) -> Tensor:
    """(b, t, w), (b, t) of 0/1 -> (b, t, w) with zeros at every masked token, whatever stood there."""
    return torch.where(
        mask.to(torch.bool).unsqueeze(-1), tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device)
    )


def mask_bias(mask: Tensor) -> Tensor:
    """(b, t) of 0/1 -> (b, t) float32 to add before softmax: 0 where kept, the lowest number where masked."""
    zero = torch.zeros((), device=mask.device)
    return torch.where(mask.to(torch.bool), zero, zero + _LOWEST)


def cosine(text: Tensor, image: Tensor) -> Tensor:
    """(b, d) and (b, d) unit rows -> (b,) float32; never in half precision, which would tie neighbours."""
    return (text.float() * image.float()).sum(dim=-1)


class Logit(nn.Module):
    """(..., w) -> (...) float32: a weighted sum and a bias, in single precision under autocast too."""

    def __init__(self, width: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero else torch.randn(width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return (features.float() * self.weight).sum(dim=-1) + self.bias


def build_head(width: int, *, hidden: int, dropout: float, zero: bool = False) -> nn.Sequential:
    """(b, `width`) -> (b,) float32 logits through one hidden layer; `zero`: it starts by saying 0 to everything."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), Logit(hidden, zero=zero))


class PatchInput(nn.Module):
    """(b, p, c) stored patch tokens -> (b, p, c): a learned place added, then a norm, whatever their scale was."""

    def __init__(self, width: int, *, patches: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.position = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, patches: Tensor) -> Tensor:
        """See the class."""
        normed: Tensor = self.norm(patches)
        placed: Tensor = self.dropout(normed + self.position)
        return placed


class SelfAttention(nn.Module):
    """Every token looks at every token: (b, t, w) -> LayerNorm(x + attention(x)), and the weights (b, heads, s, t)."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, bias: Tensor, *, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """`bias` (b, t): of `mask_bias`. `first_only`: s = 1, only the first token is renewed (else s = t)."""
        asking = tokens[:, :1] if first_only else tokens  # (b, s, w)
        query, key, value = self.query(asking), self.key(tokens), self.value(tokens)
        query, key, value = (_split_heads(made, self.heads) for made in (query, key, value))
        weights = _weigh(query @ key.transpose(2, 3), query.shape[-1], bias[:, None, None, :])  # (b, heads, s, t)
        read = self.dropout(weights).to(value.dtype) @ value  # (b, heads, s, w / heads)
        read = self.out(read.transpose(1, 2).flatten(2))
        renewed: Tensor = self.norm(asking + self.dropout(read))
        return renewed, weights


class FeedForward(nn.Module):
    """(b, t, w) -> LayerNorm(x + MLP(x)), each token for itself."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, _INNER * width), nn.Linear(_INNER * width, width)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        made = self.outer(functional.gelu(self.inner(tokens)))
        renewed: Tensor = self.norm(tokens + self.dropout(made))
        return renewed


class Layer(nn.Module):
    """One layer of BERT: self-attention, then the MLP. Gives the tokens and the attention's weights."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads=heads, dropout=dropout)
        self.feed = FeedForward(width, dropout=dropout)

    def forward(self, tokens: Tensor, bias: Tensor, *, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """See `SelfAttention.forward`."""
        tokens, weights = self.attention(tokens, bias, first_only=first_only)
        return self.feed(tokens), weights


class PatchAttention(nn.Module):
    """Words look at patches: words (b, t, w), patches (b, p, c) -> what they read (b, t, w), weights (b, heads, t, p).

    With `few` words the same is computed in another order: instead of a key and a value for each of p patches, the
    key's matrix is applied to the query, (K x)·q = x·(Kᵀ q), and the value's to what was read, Σ a V x = V (Σ a x).
    Measured, 64 pictures of 81 patches, w = c = 384, one core: 1 word 4.5 ms instead of 43; from 10 words on it is
    slower. A bias of the keys would cancel in softmax; there is none.
    """

    def __init__(self, width: int, *, patch_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(patch_width, width, bias=False), nn.Linear(patch_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, patches: Tensor, *, few: bool = False) -> tuple[Tensor, Tensor]:
        """See the class; either side may have batch 1."""
        read, weights = self._read_folded(words, patches) if few else self._read(words, patches)
        return self.dropout(self.out(read)), weights

    def _read(self, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.query(words), self.key(patches), self.value(patches)
        query, key, value = (_split_heads(made, self.heads) for made in (query, key, value))
        weights = _weigh(query @ key.transpose(2, 3), query.shape[-1])
        read = self.dropout(weights).to(value.dtype) @ value
        return read.transpose(1, 2).flatten(2), weights

    def _read_folded(self, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        (b, t, width), (_, _, c), heads = words.shape, patches.shape, self.heads
        each = width // heads
        key, value = (linear.weight.view(heads, each, c) for linear in (self.key, self.value))
        query = self.query(words).view(b, t, heads, each)
        asked = query.permute(2, 0, 1, 3).reshape(heads, b * t, each) @ key  # (heads, b t, c): one product a head
        asked = asked.view(heads, b, t, c).transpose(0, 1).reshape(b, heads * t, c)
        weights = _weigh(asked @ patches.transpose(1, 2), each)  # (b, heads t, p)
        seen = self.dropout(weights).to(patches.dtype) @ patches  # (b, heads t, c)
        b, p = weights.shape[0], weights.shape[2]  # b: that of the side with more
        read = seen.view(b, heads, t, c).transpose(0, 1).reshape(heads, b * t, c) @ value.transpose(1, 2)
        read = read.view(heads, b, t, each).permute(1, 2, 0, 3).reshape(b, t, width)
        return read + self.value.bias, weights.view(b, heads, t, p)


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, t, w) -> (b, heads, t, w / heads)."""
    b, t, width = tokens.shape
    return tokens.view(b, t, heads, width // heads).transpose(1, 2)


def _weigh(products: Tensor, each: int, bias: Tensor | None = None) -> Tensor:
    """Products of queries and keys of `each` numbers -> softmax of them, scaled and biased, float32."""
    scores = products.float() * each**-0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


def copy_layers(layers: nn.ModuleList, backbone: BertModel, *, start: int) -> int:
    """Copy the backbone's layers `start`, `start` + 1, ... into `layers`, as far as both go; how many were touched.

    Each layer has `attention` (`SelfAttention`) and `feed` (`FeedForward`). Attention is copied where width and heads
    are the backbone's, the MLP where its inner width and activation are too; what does not fit is left as it is.
    """
    sources: list[Any] = list(backbone.encoder.layer)[start:]
    settings: Any = backbone.config
    touched = 0
    for target, source in zip(layers, sources, strict=False):
        attention: Any = target.attention
        feed: Any = target.feed
        if attention.query.in_features != settings.hidden_size or attention.heads != settings.num_attention_heads:
            continue
        touched += 1
        own = source.attention.self
        _copy(attention, query=own.query, key=own.key, value=own.value)
        _copy(attention, out=source.attention.output.dense, norm=source.attention.output.LayerNorm)
        if feed.inner.out_features == settings.intermediate_size and settings.hidden_act == "gelu":
            _copy(feed, inner=source.intermediate.dense, outer=source.output.dense, norm=source.output.LayerNorm)
    return touched


def _copy(target: nn.Module, **parts: nn.Module) -> None:
    for name, part in parts.items():
        target.get_submodule(name).load_state_dict(part.state_dict())

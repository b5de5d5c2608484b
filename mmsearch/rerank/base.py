"""The seam of fusions: what one is, and the table that names them.

To add one: write a file with the class, add one line to `_FUSIONS` (and its name to `config.FUSIONS`), run the contract
test over it (tests/rerank/test_fusions.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmsearch.errors import UsageError
from mmsearch.rerank.config import RerankConfig

if TYPE_CHECKING:
    from transformers import BertModel

_ROW_PAIRS_AT_ONCE, _TOKEN_PAIRS_AT_ONCE = 16_384, 256


class TextSide(NamedTuple):
    """Texts as a fusion reads them: `rows` (b, d) unit rows, `tokens` (b, t, w_text), `mask` (b, t) of 0 and 1."""

    rows: Tensor
    tokens: Tensor
    mask: Tensor

    def take(self, places: Tensor) -> TextSide:
        """Those at `places` (m,), in that order."""
        return TextSide(self.rows[places], self.tokens[places], self.mask[places])

    def cut(self, start: int, stop: int) -> TextSide:
        """Those from `start` to before `stop`, nothing copied."""
        return TextSide(self.rows[start:stop], self.tokens[start:stop], self.mask[start:stop])


class ImageSide(NamedTuple):
    """Pictures as a fusion reads them: `rows` (b, d) unit rows, `patches` (b, p, c)."""

    rows: Tensor
    patches: Tensor

    def take(self, places: Tensor) -> ImageSide:
        """Those at `places` (m,), in that order."""
        return ImageSide(self.rows[places], self.patches[places])

    def cut(self, start: int, stop: int) -> ImageSide:
        """Those from `start` to before `stop`, nothing copied."""
        return ImageSide(self.rows[start:stop], self.patches[start:stop])


class Fusion(nn.Module):
    """Base of all fusions: called with b texts and b pictures it gives (b,) float32 logits of "they match".

    One text may meet many pictures and one picture many texts: a side of batch 1 goes with every row of the other, and
    is read once. What a masked token holds changes nothing, and neither do padding and batch size.
    `dim`: d of the unit rows; `text_width`: w_text of the tokens. Raises `UsageError` for widths that do not fit.
    """

    reads_tokens: ClassVar[bool] = True
    """False: it reads the rows only, and words and patches may be empty tensors of any shape."""

    cheap_pairs: ClassVar[bool] = True
    """Whether all pairs of a batch cost about what its texts and pictures cost: no layers run a pair."""

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__()
        self.config, self.dim, self.text_width = config, dim, text_width

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor | None]:
        """What a fusion writes: (b,) float32 logits and its `attention`."""
        raise NotImplementedError(type(self).__name__)

    def read(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor | None]:
        """Logits and attention of aligned pairs at once."""
        self.check(text, image)
        return self.match(text, image)

    def forward(self, text: TextSide, image: ImageSide) -> Tensor:
        """Aligned pairs -> (b,) float32 logits."""
        return self.read(text, image)[0]

    def attention(self, text: TextSide, image: ImageSide) -> Tensor | None:
        """(b, t, p) float32: how much each word looks at each patch, summing to 1 over patches; None: it reads none.

        The row of a masked word says nothing.
        """
        return self.read(text, image)[1]

    def pairwise(self, text: TextSide, image: ImageSide) -> Tensor:
        """Every text with every picture: b texts, n pictures -> (b, n) logits, those that `forward` gives."""
        b, n = len(text.rows), len(image.rows)
        if not b or not n:
            return text.rows.new_zeros((b, n), dtype=torch.float32)
        many = _TOKEN_PAIRS_AT_ONCE if self.reads_tokens else _ROW_PAIRS_AT_ONCE
        if b <= n:
            pictures = [image.cut(start, start + many) for start in range(0, n, many)]
            return torch.stack([torch.cat([self(text.cut(i, i + 1), some) for some in pictures]) for i in range(b)])
        texts = [text.cut(start, start + many) for start in range(0, b, many)]
        return torch.stack([torch.cat([self(some, image.cut(i, i + 1)) for some in texts]) for i in range(n)], dim=1)

    def start_from(self, backbone: BertModel) -> None:
        """Take over what fits of the text backbone's layers above `config.text_layer`; most have no use for it."""

    def check(self, text: TextSide, image: ImageSide) -> None:
        """Widths only: sizes of the batch and of a text are left open, for export too."""
        expected: list[tuple[int, ...]] = [(self.dim,), (self.dim,)]
        got: list[tuple[int, ...]] = [tuple(text.rows.shape[1:]), tuple(image.rows.shape[1:])]
        if self.reads_tokens:
            expected += [(self.text_width,), (self.config.patches, self.config.patch_dim)]
            got += [tuple(text.tokens.shape[2:]), tuple(image.patches.shape[1:])]
        for name, wanted, found in zip(("text rows", "image rows", "words", "patches"), expected, got, strict=False):
            if wanted != found:
                raise UsageError(f"{name} of a fusion", expected=f"the last axes {wanted}", got=str(found))


_FUSIONS: dict[str, tuple[str, str]] = {
    # name: (module, class)
    "concat": ("mmsearch.rerank.vector_fusions", "ConcatFusion"),
    "weighted": ("mmsearch.rerank.vector_fusions", "WeightedFusion"),
    "gated": ("mmsearch.rerank.vector_fusions", "GatedFusion"),
    "bilinear": ("mmsearch.rerank.vector_fusions", "BilinearFusion"),
    "late-interaction": ("mmsearch.rerank.late_interaction", "LateInteraction"),
    "cross-attention": ("mmsearch.rerank.cross_attention", "CrossAttention"),
    "single-stream": ("mmsearch.rerank.single_stream", "SingleStream"),
}


def build_fusion(config: RerankConfig, *, dim: int, text_width: int) -> Fusion:
    """The fusion that `config` names, with random weights."""
    module, name = _FUSIONS[config.fusion]
    made: Fusion = getattr(import_module(module), name)(config, dim=dim, text_width=text_width)
    return made

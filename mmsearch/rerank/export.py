"""A re-ranker's ONNX graphs, pointing into model.safetensors and rerank.safetensors; see `towers.export`.

    words.onnx       ids (b, t) int64, mask (b, t) int64 -> tokens (b, t, w) float32
    patches.onnx     pixels (b, s, s, 3) uint8 -> patches (b, p, c) float32
    match.onnx       text_rows (b, d), tokens (b, t, w), mask (b, t), image_rows (b, d), patches (b, p, c) -> logits (b)
                     and, where the fusion has it, attention (b, t, p)
    match_one.onnx   the same with a batch of 1 on the text side: one text, many pictures

Decisions:
- Pairs are aligned in match.onnx: a graph cannot leave open whether a side has one row or b. The second graph is for
  what a search does, so that what a fusion computes of the text alone is computed once. Graphs hold no weights.
- A fusion of unit rows alone has the two rows as its graphs' only inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mmsearch.errors import ModelError
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.checkpoint import RERANK_WEIGHTS
from mmsearch.rerank.model import RerankModel
from mmsearch.towers.checkpoint import WEIGHTS
from mmsearch.towers.export import IDS, MASK, PIXELS, export_graph

_PAIRS, _WORDS = 2, 5
_Axes: TypeAlias = dict[int, str]
_TEXT_AXES: _Axes = {0: "b", 1: "t"}
_ROW_AXES: _Axes = {0: "b"}


class _WordsGraph(nn.Module):
    """(ids, mask) -> tokens; the backbone stands under the name it has in the stored weights."""

    def __init__(self, model: RerankModel) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"backbone": model.lower})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens: Tensor = self.text["backbone"](input_ids=ids, attention_mask=mask).last_hidden_state
        return tokens


class _PatchesGraph(nn.Module):
    """pixels -> patches, scaling included; both parts under the names they have in the stored weights."""

    def __init__(self, model: RerankModel) -> None:
        super().__init__()
        if model.backbone is None:
            self.image = nn.ModuleDict({"backbone": model.towers.image.backbone})
        else:
            self.backbone = model.backbone
        self.patch_projection = model.patch_projection
        self._patches = model.patches

    def forward(self, pixels: Tensor) -> Tensor:
        return self._patches(pixels)


class _MatchGraph(nn.Module):
    """Both sides of b pairs -> logits and perhaps attention."""

    def __init__(self, model: RerankModel) -> None:
        super().__init__()
        self.fusion = model.fusion

    def forward(
        self, text_rows: Tensor, tokens: Tensor, mask: Tensor, image_rows: Tensor, patches: Tensor
    ) -> tuple[Tensor, ...]:
        logits, attention = self.fusion.read(TextSide(text_rows, tokens, mask), ImageSide(image_rows, patches))
        return (logits,) if attention is None else (logits, attention)


class _MatchRowsGraph(nn.Module):
    """The same of a fusion that reads rows only."""

    def __init__(self, model: RerankModel) -> None:
        super().__init__()
        self.fusion = model.fusion

    def forward(self, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        nothing = text_rows[:, :0]
        logits: Tensor = self.fusion(TextSide(text_rows, nothing, nothing), ImageSide(image_rows, nothing))
        return logits


def words_graph(model: RerankModel, folder: Path) -> bytes | None:
    """The text backbone's lower layers as ONNX, to lie in `folder`; None: it cannot be exported."""
    ids = torch.ones(_PAIRS, _WORDS, dtype=torch.int64)
    axes = {IDS: _TEXT_AXES, MASK: _TEXT_AXES}
    return _export(_WordsGraph(model), (ids, torch.ones_like(ids)), axes=axes, outputs=["tokens"], folder=folder)


def patches_graph(model: RerankModel, folder: Path) -> bytes | None:
    """Pixels to patch tokens as ONNX, to lie in `folder`; None: it cannot be exported."""
    size = model.towers.config.preprocessing.size
    pixels = torch.zeros(_PAIRS, size, size, 3, dtype=torch.uint8)
    return _export(_PatchesGraph(model), (pixels,), axes={PIXELS: _ROW_AXES}, outputs=["patches"], folder=folder)


def match_graph(model: RerankModel, folder: Path, *, one_text: bool = False) -> bytes | None:
    """The fusion as ONNX, to lie in `folder`; None: it cannot be exported. `one_text`: see match_one.onnx above."""
    fusion, config = model.fusion, model.config
    texts = 1 if one_text else _PAIRS
    rows = torch.full((_PAIRS, fusion.dim), fusion.dim**-0.5)
    row_axes: _Axes = {} if one_text else _ROW_AXES
    if not fusion.reads_tokens:
        axes = {"text_rows": row_axes, "image_rows": _ROW_AXES}
        sides = (rows[:texts].clone(), rows)
        return _export(_MatchRowsGraph(model), sides, axes=axes, outputs=["logits"], folder=folder)
    tokens, mask = torch.ones(texts, _WORDS, fusion.text_width), torch.ones(texts, _WORDS, dtype=torch.int64)
    patches = torch.ones(_PAIRS, config.patches, config.patch_dim)
    example = (rows[:texts].clone(), tokens, mask, rows, patches)
    text_axes: _Axes = {1: "t"} if one_text else _TEXT_AXES
    axes = {"text_rows": row_axes, "tokens": text_axes, "mask": text_axes}
    axes |= {"image_rows": _ROW_AXES, "patches": _ROW_AXES}
    looks = fusion.attention(TextSide(*example[:3]), ImageSide(*example[3:])) is not None
    outputs = ["logits", "attention"] if looks else ["logits"]
    return _export(_MatchGraph(model), example, axes=axes, outputs=outputs, folder=folder)


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    *,
    axes: dict[str, _Axes],
    outputs: Sequence[str],
    folder: Path,
) -> bytes | None:
    weights = [folder / WEIGHTS, folder / RERANK_WEIGHTS]
    try:
        return export_graph(module, example, axes=axes, outputs=outputs, weights=weights)
    except (torch.onnx.errors.OnnxExporterError, ModelError):
        return None

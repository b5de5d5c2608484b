"""The re-ranker that a run begins with: built as the settings say, or gone on with from another model.

Decisions:
- Unless another is named, that of the towers which are trained over is gone on with, if they have one and the
  settings ask for no other shape: a few hundred pairs teach a new one nothing that could be measured.
- What is gone on with brings its shape along; the settings of the shape are then not read. Its banks are filled anew
  from the run's own rows, and from its own where those are too few and of the same towers; its scores are fitted anew.
- It may come from over other towers: those of a fine-tuned model are near enough to start from, and the words, the
  patches and the rows that it reads are those of this run from the first step on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mmsearch.errors import ModelError, UsageError
from mmsearch.rerank.checkpoint import RerankCheckpoint, load_weights
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.present import has_reranker
from mmsearch.towers.initial import fill_backbone
from mmsearch.towers.locate import locate
from mmsearch.train.settings import Rerank
from mmsearch.types import Embeddings, ModelIdentity

AUTO = "auto"
_SHAPE = (
    "patch_dim", "grid", "text_layer", "layers", "width", "hidden", "image_train", "image_weights",
)  # fmt: skip
"""Settings that only a re-ranker that is built anew can follow."""


def with_start(wanted: Rerank, *, towers: str) -> Rerank:
    """The settings with "auto" as the start made definite: `towers`, the model that is trained over, or none.

    None where it has no re-ranker, where another fusion or another shape is asked for, or a teacher to imitate.
    """
    if wanted.start != AUTO:
        return wanted
    plain, directory = Rerank(), locate(towers)[0]
    usual = all(getattr(wanted, name) == getattr(plain, name) for name in _SHAPE) and not wanted.teacher
    fits = usual and has_reranker(directory)
    if fits:  # its checksums are compared when it is gone on with
        fits = RerankCheckpoint.open(directory, verify=False).config.fusion == wanted.fusion
    return dataclasses.replace(wanted, start=towers if fits else "")


def build_reranker(wanted: Rerank, towers: Any, *, captions: int) -> RerankModel:  # noqa: ANN401 - a DualEncoder
    """A model over `towers` as the settings say, made definite by `with_start`.

    `captions`: how many there are for the banks, which bounds them.

    Raises `UsageError` for an own backbone that nothing reads or that `rerank.start` does not have, `ModelError` when
    `rerank.start` does not fit the towers.
    """
    bank = min(wanted.bank, captions)
    if wanted.start:
        return _gone_on_with(wanted, towers, bank=bank)
    model = RerankModel(_config(wanted, towers, bank=bank), towers)
    if model.config.own_backbone and not model.fusion.reads_tokens:
        raise UsageError(
            "rerank.image_train", expected=f"0 with {wanted.fusion}, which reads no patches",
            got=str(wanted.image_train), do="Choose late-interaction, cross-attention or single-stream.",
        )  # fmt: skip
    model.fusion.start_from(towers.text.backbone)
    if model.backbone is not None and wanted.image_weights:
        fill_backbone(model.backbone, wanted.image_weights)
    return model


def _config(wanted: Rerank, towers: Any, *, bank: int) -> RerankConfig:  # noqa: ANN401 - a DualEncoder
    text = towers.text.backbone.config
    layer = wanted.text_layer if wanted.text_layer >= 0 else int(text.num_hidden_layers) // 2
    above = max(int(text.num_hidden_layers) - layer, 0)
    return RerankConfig(
        fusion=wanted.fusion, patch_dim=wanted.patch_dim, grid=wanted.grid, text_layer=layer,
        layers=wanted.layers if wanted.layers >= 0 else max(above, 1), width=wanted.width or int(text.hidden_size),
        heads=int(text.num_attention_heads), hidden=wanted.hidden, dropout=wanted.dropout,
        own_backbone=wanted.image_train > 0, bank=bank,
    )  # fmt: skip


def start_identity(wanted: Rerank) -> str:
    """What tells the re-ranker of `rerank.start` from others; "" without one. `ModelError` for a model without any."""
    return _opened(wanted.start).identity if wanted.start else ""


def earlier_banks(wanted: Rerank, towers: ModelIdentity) -> tuple[Embeddings, Embeddings]:
    """Rows of captions and of pictures that `rerank.start` has in its banks, (m, d) each.

    None (m = 0) where it has none, nothing is gone on with, or they are of other towers and so of another space.
    """
    if wanted.start:
        opened = _opened(wanted.start)
        if opened.towers.identity.same_space(towers):
            return opened.bank("caption"), opened.bank("picture")
    nothing = np.zeros((0, towers.dim), np.float32)
    return nothing, nothing


def _opened(start: str) -> RerankCheckpoint:
    directory = locate(start)[0]
    if not has_reranker(directory):
        raise ModelError(f"rerank.start, {directory}", expected="a model with a re-ranker", got="one without")
    return RerankCheckpoint.open(directory)


def _gone_on_with(wanted: Rerank, towers: Any, *, bank: int) -> RerankModel:  # noqa: ANN401 - a DualEncoder
    opened = _opened(wanted.start)
    if wanted.image_train and not opened.config.own_backbone:
        raise UsageError(
            "rerank.image_train", expected="0: rerank.start has no image backbone of its own",
            got=str(wanted.image_train), do="Leave it out, or start without rerank.start.",
        )  # fmt: skip
    config = dataclasses.replace(opened.config, dropout=wanted.dropout, bank=bank)
    return load_weights(config, towers, opened)

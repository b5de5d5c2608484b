"""Pictures as the second stage learns from them: what is kept of each, and what is read from that at every step.

Decisions:
- With the towers' own backbone nothing under the patch projection learns: the grid's features and the first stage's row
  of every view are kept (`rerank_maps`). With a backbone of its own that learns, the outputs of its frozen stages are.
- Where nothing can be kept (a GPU, no room, run.views = 0) pixels go through everything at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsearch.rerank.model import RerankModel
from mmsearch.towers.stages import Stage, stages
from mmsearch.train.encoding import TowerPass
from mmsearch.train.prefix import FrozenPrefix
from mmsearch.train.prefix_graph import compiled_prefix
from mmsearch.train.rerank_maps import TowerMaps, split_maps
from mmsearch.train.workshop import example_pixels


class PictureReader:
    """(b, s, s, 3) uint8 or what is kept of them -> the grid's features, and the first stage's rows where known.

    `learning`: last stages of the re-ranker's own backbone that learn, 0 for none. `passes`: how the towers run; its
    prefix is set here when `keep` is wanted.
    """

    def __init__(self, model: RerankModel, passes: TowerPass, *, learning: int, keep: bool) -> None:
        self._model, self.passes, self._learning = model, passes, learning
        parts = stages(model.image_backbone)
        self.count = max(0, len(parts) - learning) if learning else len(parts)
        self._own = model.backbone is not None
        self.keeps = keep and self.count > 0 and self._cut()

    def learning_stages(self) -> list[Stage]:
        """The stages of the own backbone that learn."""
        return stages(self._model.image_backbone)[self.count :] if self._own and self._learning else []

    def _cut(self) -> bool:
        """Let the passes stop where nothing learns; False when this backbone cannot be taken apart there."""
        model, size = self._model, self._model.towers.config.preprocessing.size
        prefix: FrozenPrefix = FrozenPrefix(model.image_backbone, self.count) if self._own else TowerMaps(model)
        pixels = example_pixels(size)
        if not prefix.fits(self.passes.normalised(pixels).float()):
            return False
        self.passes.prefix = prefix
        if self.passes.device.type == "cpu":
            self.passes.compiled = compiled_prefix(
                prefix, normalise=model.towers.normalise_pixels, size=size, threads=torch.get_num_threads()
            )
        return True

    def kept(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, ...) what `read` takes, on the CPU."""
        return self.passes.prefix_outputs(pixels).to(torch.float16) if self.keeps else pixels

    def read(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, ...) from `kept` -> (b, p, W) features of the grid, (b, d) unit rows of the towers or None."""
        model = self._model
        if self.keeps and not self._own:
            return split_maps(kept.to(self.passes.device), patches=model.config.patches, dim=model.towers.config.dim)
        with self.passes.autocast():
            if self.keeps:
                assert self.passes.prefix is not None  # for the type checker
                return model.grid_of_map(self.passes.prefix.rest(self.passes.placed(kept))).float(), None
            images = self.passes.normalised(kept)
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._learning)):
                maps = model.grid_of_map(model.image_backbone(images)).float()
            if self._own:
                return maps, None
            with torch.no_grad():
                return maps, model.towers.image(images).float()

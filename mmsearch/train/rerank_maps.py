"""What a frozen image tower says of every training picture, kept on disk: its grid of features and its unit row.

Decisions:
- The towers do not learn in the second stage, so each random view of a picture is encoded once and read many times;
  the views lie in the same files, with the same resumption, as those of `prefix.KeptViews`.
- Kept before the patch projection, which learns, and after averaging to the grid: a tenth of the bytes of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmsearch.rerank.model import RerankModel, as_map, pool_to_grid
from mmsearch.towers.stages import stages
from mmsearch.train.prefix import FrozenPrefix


class TowerMaps(FrozenPrefix):
    """A `FrozenPrefix` of the whole image tower: (b, 3, s, s) -> (b, p · W + d), the grid's features, then the row."""

    pools = True

    def __init__(self, model: RerankModel) -> None:
        self._tower, self._grid = model.towers.image, model.config.grid
        super().__init__(self._tower, len(stages(self._tower.backbone)))

    def outputs(self, images: Tensor) -> Tensor:
        """As the class says; `split_maps` takes it apart."""
        features = self._tower.backbone(images)
        places = pool_to_grid(as_map(features, prefix=self._tower.backbone.prefix), self._grid)  # (b, W, g, g)
        rows = self._tower.embed(self._tower.pooling(features))
        return torch.cat([places.flatten(2).transpose(1, 2).flatten(1), rows.to(places.dtype)], dim=1)

    @torch.no_grad()
    def fits(self, images: Tensor) -> bool:
        """Always: nothing is cut."""
        return True

    def digest(self) -> str:
        """Changes with any weight of the tower and with the grid."""
        return f"{digest_of_module(self._tower)} grid {self._grid}"


def split_maps(kept: Tensor, *, patches: int, dim: int) -> tuple[Tensor, Tensor]:
    """(b, p · W + d) as `TowerMaps` gives it -> (b, p, W) float32 features of the grid, (b, d) float32 unit rows."""
    flat = kept.to(torch.float32)
    maps, rows = flat[:, :-dim], flat[:, -dim:]
    return maps.reshape(len(flat), patches, -1), nn.functional.normalize(rows, dim=-1)


def digest_of_module(module: nn.Module) -> str:
    """Hex digits that change with any tensor of the module's state."""
    import xxhash

    found = xxhash.xxh3_128()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

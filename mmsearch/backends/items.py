"""The item head on arrays: torch, on the CPU, in float32, whatever runs the towers.

Decisions:
- The head has no graph of its own: only builds and `encode_items` need it, never a query, and it is a matrix product
  or two beside a tower's millions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mmsearch.towers.item import ItemFusion
    from mmsearch.types import Embeddings


class ItemBackend:
    """Runs `fusion`, which is in eval mode on the CPU. Thread-safe: nothing changes in a call."""

    def __init__(self, fusion: ItemFusion) -> None:
        self._fusion = fusion

    def join(
        self, images: Embeddings, texts: Embeddings, *, has_image: NDArray[np.bool_], has_text: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """(n, d), (n, d) unit rows, (n,) and (n,) which are there -> (n, d), as the head made them."""
        sides, masks = (images, texts), {"has_image": has_image, "has_text": has_text}
        with torch.inference_mode():
            rows = self._fusion(
                *(torch.from_numpy(np.ascontiguousarray(side, np.float32)) for side in sides),
                **{name: torch.from_numpy(np.ascontiguousarray(mask)) for name, mask in masks.items()},
            )
        found: NDArray[np.float32] = rows.numpy()
        return found

"""How well the model does on the pairs that were held out, measured from rows that the run itself encodes.

Decisions:
- The score that chooses epochs and shares is the mean of hit@1, hit@5 and hit@10 in both directions: one figure that
  moves smoothly, where hit@1 alone jumps.
- Pictures are decoded once and kept as pixels (or as outputs of the frozen stages) while they fit in a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mmsearch.errors import InputError, ModelError
from mmsearch.evaluate.report import Evaluation
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.towers.image import joined_views
from mmsearch.train.batches import numbered
from mmsearch.train.encoding import Texts, TowerPass
from mmsearch.train.feed import plain_pixels
from mmsearch.train.item_validation import ItemHits, item_forms, item_hits, item_texts
from mmsearch.types import Pair, Preprocessing, Skipped

_BATCH, _OFF = 64, 1e-3
_BUDGET = 2 << 30


class Validation:
    """Held-out pairs, ready to be encoded again and again. `passes`: how to encode; its prefix must not change.

    `keep_texts`: the text backbone does not learn (`encoding.Texts`). `budget`: bytes of pictures that are kept.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, passes: TowerPass, tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        preprocessing: Preprocessing, workers: int | None, on_skip: Callable[[Skipped], None], keep_texts: bool = False,
        budget: int = _BUDGET,
    ) -> None:  # fmt: skip
        captions = [caption for pair in pairs for caption in pair.captions]
        self._captions = Texts(captions, passes, tokens, keep=keep_texts)
        self._pairs, self._passes = pairs, passes
        self._preprocessing, self._workers, self._on_skip = preprocessing, workers, on_skip
        self._kept: list[tuple[np.ndarray, Tensor]] | None = None
        self._told, self._budget = False, budget

    def __len__(self) -> int:
        return len(self._pairs)

    def forget(self) -> None:
        """Encode with nothing kept the next time: also what does not learn has changed."""
        self._kept = None
        self._captions.forget()

    @torch.no_grad()
    def evaluate(self, *, name: str) -> Evaluation:
        """Encode everything as the model stands (in evaluation mode) and rank both ways."""
        with _evaluation_mode(self._passes.model):
            found, images, texts = self._rows()
        owners = np.repeat(np.arange(len(self._pairs)), [len(pair.captions) for pair in self._pairs])
        there = np.isin(owners, found)  # the captions of pictures that could be read
        numbers = numbered(pair.group for pair in self._pairs)
        return evaluate_rows(
            texts[there], images, text_groups=numbers[owners[there]], image_groups=numbers[found], model=name
        )

    @torch.no_grad()
    def evaluate_items(self) -> ItemHits | None:
        """Encode everything as the model stands (in evaluation mode): how texts find what its head makes of the pairs.

        None without a head, or with fewer than two pairs that have a text beside their query (`item_validation`).
        """
        model = self._passes.model
        if model.item is None or len(texts_of := item_texts(self._pairs)) < 2:
            return None
        with _evaluation_mode(model):
            found, images, captions = self._rows()
            places = [place for place, pair in enumerate(found) if pair in texts_of]
            if len(places) < 2:  # of those that can be read
                return None
            kept = np.array(found)[places]
            queries = np.cumsum([0, *(len(pair.captions) for pair in self._pairs)])[kept]
            texts = queries + [texts_of[pair] for pair in kept]
            sides = (torch.from_numpy(rows).to(self._passes.device) for rows in (images[places], captions[texts]))
            forms = {form: rows.cpu().numpy() for form, rows in item_forms(model.item_rows, *sides).items()}
        for rows in forms.values():
            _check_rows(rows, "items")
        return item_hits(captions[queries], forms, groups=numbered(pair.group for pair in self._pairs)[kept])

    def _rows(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Positions of the pictures that can be read, their rows, and the rows of all captions."""
        found, images = self._images()
        texts = self._captions.rows()
        _check_rows(images, "pictures")
        _check_rows(texts, "captions")
        return found, images, texts

    def _images(self) -> tuple[list[int], np.ndarray]:
        positions: list[int] = []
        rows: list[np.ndarray] = []
        for where, inputs in self._inputs():
            positions += where.tolist()
            encoded = self._passes.images(inputs).float()
            rows.append((joined_views(encoded) if self._passes.model.image.mirror else encoded).cpu().numpy())
        if not rows:
            raise InputError("validation pictures", expected="at least one that can be read", got="none")
        return positions, np.concatenate(rows)

    def _inputs(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """What was kept, or decoded anew; kept from the first time on if all of it fits the budget."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, used = [], 0
        for where, inputs in self._decoded():
            used += inputs.nbytes
            if used <= self._budget:
                kept.append((where, inputs))
            else:
                kept.clear()
            yield where, inputs
        self._kept = kept if used <= self._budget else None

    def _decoded(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        for where, pixels in plain_pixels(
            [pair.image for pair in self._pairs], preprocessing=self._preprocessing, batch_size=_BATCH,
            workers=self._workers, on_skip=self._skip,
        ):  # fmt: skip
            inputs = torch.from_numpy(pixels)
            if self._passes.model.image.mirror:
                inputs = torch.cat([inputs, inputs.flip(2)])
            if self._passes.prefix is not None:
                inputs = self._passes.prefix_outputs(inputs).to(torch.float16)
            yield where, inputs
        self._told = True

    def _skip(self, skipped: Skipped) -> None:
        if not self._told:
            self._on_skip(skipped)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and then as it was."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _check_rows(rows: np.ndarray, what: str) -> None:
    """`ModelError` when weights have become so large, or no numbers, that rows have no direction."""
    if not bool((np.abs(np.linalg.norm(rows, axis=1) - 1.0) < _OFF).all()):
        raise ModelError(
            f"training, rows of the held-out {what}", expected="finite rows of length 1", got="others",
            do="Lower run.lr, or try --precision fp32; the best checkpoint so far is kept.",
        )  # fmt: skip


def score_of(found: Evaluation) -> float:
    """Mean of hit@1, hit@5 and hit@10 over both directions, in [0, 1]."""
    ways = (found.text_to_image.values, found.image_to_text.values)
    return float(np.mean([way[f"hit@{k}"] for way in ways for k in (1, 5, 10)]))

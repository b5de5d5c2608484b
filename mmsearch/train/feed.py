"""Planned batches as tensors: pictures decoded and augmented by worker processes, captions tokenised here.

Decisions:
- Pictures go through the decode workers of `data.loading`, not torch's loader: they are no forks of a process that
  holds a GPU and threads, they start in 0.2 s without torch, and a picture that crashes or hangs costs itself only.
- What a batch holds depends on its draws alone, never on the number of workers or on what was fed before.
- A draw whose picture cannot be used is left out of its batch; no other takes its place. A batch may come out smaller,
  or empty, and there is one for each that was planned, so that steps can be counted by the plan.
- A picture found unfit is not read again from the next plan on, unless the reason may pass (a mount that was away).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from mmsearch.data.images import open_image, prepare
from mmsearch.data.loading import Failed, Loader, Request
from mmsearch.data.packed import read_picture
from mmsearch.data.worker import Opener
from mmsearch.errors import ImageError
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.augment import Augmentation, drop_words, names_a_side
from mmsearch.train.batches import Draw, Ints, numbered
from mmsearch.train.prefetch import prefetched
from mmsearch.train.views import open_view, view_of
from mmsearch.types import Pair, Pixels, Preprocessing, Skipped, SkipReason

_WORKER = "mmsearch.train.views"
_AHEAD = 1  # with the one in use and the one in the making, three batches are held at a time
_MAY_PASS = frozenset({SkipReason.VANISHED, SkipReason.UNREADABLE, SkipReason.CHANGING, SkipReason.OUT_OF_MEMORY})


@dataclass(slots=True)
class Batch:
    """What one step trains on; picture i belongs to `draws[i]`, text j to picture `owners[j]`.

    `images`: (b, s, s, 3) uint8. `groups`: (b,) int64, equal for pictures of one group. n texts, n >= b, those of a
    picture side by side and the drawn one first: `ids`, `mask` (n, t) int64, padded to the longest, mask 1 for tokens;
    `captions` (n) as they were tokenised; `owners` (n,) int64.
    """

    draws: list[Draw]
    images: Tensor
    ids: Tensor
    mask: Tensor
    groups: Tensor
    captions: list[str]
    owners: Tensor


class PixelFeed:
    """Makes batches of `pairs`. A context manager; for one thread at a time.

    `augmentation`: how far views and captions vary, None for the plain ones. `captions`: of a picture in a step, at
    most, where it has as many. `workers`: decoding processes, started when first needed; 0 decodes in the caller's
    thread, None takes one a core. `on_skip` hears of each picture that cannot be used, once, when its batch is handed
    out. `timeout_s`: the longest one picture may take in a worker.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        preprocessing: Preprocessing,
        tokeniser: Tokeniser,
        augmentation: Augmentation | None,
        workers: int | None,
        on_skip: Callable[[Skipped], None],
        captions: int = 1,
        timeout_s: float = 20.0,
    ) -> None:
        self._pairs, self._preprocessing, self._tokeniser = pairs, preprocessing, tokeniser
        self._augmentation, self._on_skip, self._count = augmentation, on_skip, captions
        self._groups = numbered(pair.group for pair in pairs)
        self._unfit: set[int] = set()
        self._told: set[int] = set()
        self._loader = (
            None
            if workers == 0
            else Loader(preprocessing=preprocessing, workers=workers, timeout_s=timeout_s, worker=_WORKER)
        )

    def __enter__(self) -> PixelFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. May be called twice."""
        if self._loader is not None:
            self._loader.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are running."""
        return self._loader.worker_pids if self._loader else ()

    def batches(self, plan: Sequence[Sequence[Draw]]) -> Iterator[Batch]:
        """One batch for each of `plan`, in order; the next ones are made while one is trained on.

        Raises `ResourceError` when workers cannot be started. Finish or close one before you start another.
        """
        wanted = [[draw for draw in draws if draw.row not in self._unfit] for draws in plan]
        made = self._made(wanted) if self._loader is None else prefetched(lambda: self._made(wanted), depth=_AHEAD)
        with closing(made):
            for batch, failed in made:
                for draw, skipped in failed:
                    self._report(draw, skipped)
                yield batch

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(b) texts -> ids, mask: (b, t) int64; (0, 1) for no texts."""
        if not captions:
            return torch.zeros((0, 1), dtype=torch.int64), torch.zeros((0, 1), dtype=torch.int64)
        tokens = self._tokeniser(captions)
        return torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)

    def _made(self, plan: list[list[Draw]]) -> Generator[tuple[Batch, list[tuple[Draw, Skipped]]], None, None]:
        size = self._preprocessing.size
        requests = (self._request(draw) for draws in plan for draw in draws)
        with closing(_decoded(requests, self._loader, self._preprocessing)) as results:
            for draws in plan:
                images = np.empty((len(draws), size, size, 3), np.uint8)
                kept: list[Draw] = []
                failed: list[tuple[Draw, Skipped]] = []
                for draw, result in zip(draws, itertools.islice(results, len(draws)), strict=True):
                    if isinstance(result, Skipped):
                        failed.append((draw, result))
                    else:
                        images[len(kept)] = result
                        kept.append(draw)
                yield self._batch(kept, images[: len(kept)]), failed

    def _request(self, draw: Draw) -> Request:
        pair = self._pairs[draw.row]
        view = view_of(self._augmentation, seed=draw.seed, may_flip=self.may_be_mirrored(draw))
        return draw.row, pair.image, view

    def _batch(self, draws: list[Draw], images: Pixels) -> Batch:
        return self.batch_of(draws, torch.from_numpy(images))

    def batch_of(self, draws: list[Draw], images: Tensor) -> Batch:
        """The batch of these draws, whose pictures are `images` (b, ...)."""
        owners, captions = self.said(draws)
        ids, mask = self.tokens(captions)
        return Batch(draws, images, ids, mask, self.groups_of(draws), captions, owners)

    def groups_of(self, draws: Sequence[Draw]) -> Tensor:
        """(b,) int64: the group of each draw's picture."""
        return torch.from_numpy(self._groups[[draw.row for draw in draws]])

    def captions_of(self, draw: Draw) -> list[int]:
        """Which captions of its pair are said in this draw (`captions_of`)."""
        return captions_of(self._pairs[draw.row], draw, count=self._count)

    def may_be_mirrored(self, draw: Draw) -> bool:
        """Whether none of the captions of this draw would become false (`names_a_side`)."""
        pair = self._pairs[draw.row]
        return not names_a_side([pair.captions[number] for number in self.captions_of(draw)])

    def said(self, draws: Sequence[Draw]) -> tuple[Tensor, list[str]]:
        """The texts of the pictures that were drawn, words dropped: owners (n,) int64, captions (n)."""
        drop = self._augmentation.word_drop if self._augmentation else 0.0
        owners: list[int] = []
        captions: list[str] = []
        for place, draw in enumerate(draws):
            pair = self._pairs[draw.row]
            for turn, number in enumerate(self.captions_of(draw)):
                caption = pair.captions[number]
                captions.append(drop_words(caption, drop, seed=draw.seed + turn) if drop else caption)
                owners.append(place)
        return torch.tensor(owners, dtype=torch.int64), captions

    def _report(self, draw: Draw, skipped: Skipped) -> None:
        if skipped.reason not in _MAY_PASS:
            self._unfit.add(draw.row)
        if draw.row not in self._told:
            self._told.add(draw.row)
            self._on_skip(skipped)


def captions_of(pair: Pair, draw: Draw, *, count: int) -> list[int]:
    """Which captions of a pair are said in this draw: the drawn one and those after it, `count` at most."""
    there = len(pair.captions)
    return [(draw.caption + turn) % there for turn in range(min(count, there))]


def plain_pixels(
    images: Sequence[str],
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None,
    on_skip: Callable[[Skipped], None],
) -> Iterator[tuple[Ints, Pixels]]:
    """Pictures as they are encoded, for validation: batches of (positions (b,) int64, (b, s, s, 3) uint8).

    A picture that cannot be read is reported and left out; `workers` as in `PixelFeed`.
    """
    loader = None if workers == 0 else Loader(preprocessing=preprocessing, workers=workers)
    try:
        results = _decoded(enumerate(images), loader, preprocessing, opener=open_image)
        with closing(results):
            usable = _usable(results, on_skip)
            while part := list(itertools.islice(usable, batch_size)):
                yield np.array([i for i, _ in part], np.int64), np.stack([pixels for _, pixels in part])
    finally:
        if loader is not None:
            loader.close()


def _usable(results: Iterable[Pixels | Skipped], on_skip: Callable[[Skipped], None]) -> Iterator[tuple[int, Pixels]]:
    for position, result in enumerate(results):
        if isinstance(result, Skipped):
            on_skip(result)
        else:
            yield position, result


def _decoded(
    requests: Iterable[Request], loader: Loader | None, preprocessing: Preprocessing, *, opener: Opener = open_view
) -> Generator[Pixels | Skipped, None, None]:
    """A result for each request, in order; without a loader they are decoded here, by `opener`."""
    if loader is not None:
        for loaded in loader.load(requests):
            yield loaded.skipped if isinstance(loaded, Failed) else loaded.pixels
        return
    for request in requests:
        path, view = request[1], request[2] if len(request) > 2 else {}
        try:
            data, _ = read_picture(path)
            image, _ = opener(data, target=preprocessing.size, where=path, **view)
            yield prepare(image, preprocessing)
        except ImageError as error:
            yield Skipped(path, SkipReason(error.reason), error.detail)

"""The frozen first stages of an image backbone: run once, their outputs kept, the rest run many times.

While the first stages of a backbone do not learn, what they make of a picture's view never changes. On a CPU they are
most of the work. So the views are drawn once, the output of the last frozen stage is kept on disk in half precision,
and a step trains from there.

Decisions:
- Cut by passing things through, not by a table of architectures: with the later stages handing on what they get,
  nothing is computed behind the frozen part; with the earlier ones doing so, the backbone takes up from there. Where
  that does not give the same features (a backbone whose stages are not a plain row), `FrozenPrefix.fits` says so and
  nothing is kept.
- A view's place on disk depends on the picture, the view and everything that made it; another augmentation, weights
  or precision is another folder. A fill that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from mmsearch.data.packed import packed
from mmsearch.errors import ResourceError
from mmsearch.towers.pooling import Pooling
from mmsearch.towers.stages import Stage, stages
from mmsearch.train.augment import Augmentation, names_a_side
from mmsearch.train.batches import Draw
from mmsearch.types import Pair, Preprocessing

_AGREE = 1e-3


class FrozenPrefix:
    """The first `count` stages of `backbone`: what they make of pictures, and the rest from there.

    `pools`: outputs are pooled features already, because nothing before the projection head learns.
    """

    pools = False

    def __init__(self, backbone: nn.Module, count: int) -> None:
        self.backbone, self._count = backbone, count

    @property
    def stages(self) -> list[Stage]:
        """The frozen stages, as the backbone is built now: adapters that came or went replaced modules."""
        return stages(self.backbone)[: self._count]

    def outputs(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) normalised pixels -> (b, ...) the output of the last of these stages."""
        parts = stages(self.backbone)
        found: list[Tensor] = []
        last = parts[self._count - 1].modules[-1]
        own = last.forward

        def kept(*inputs: Any, **settings: Any) -> Tensor:  # noqa: ANN401 - whatever a stage is given
            found.append(own(*inputs, **settings))
            return found[-1]

        with _replaced({module: _hand_on for stage in parts[self._count :] for module in stage.modules} | {last: kept}):
            self.backbone(images)  # what comes out at its end may have been turned around
        return found[-1]

    def rest(self, outputs: Tensor) -> Tensor:
        """(b, ...) as from `outputs` -> the backbone's features."""
        frozen = self.stages
        passing = {module: _hand_on for stage in frozen for module in stage.modules}
        passing[frozen[-1].modules[-1]] = lambda *inputs, **settings: outputs
        with _replaced(passing):
            features: Tensor = self.backbone(outputs)
        return features

    @torch.no_grad()
    def fits(self, images: Tensor) -> bool:
        """True when both halves together give what the backbone gives for these (b, 3, s, s) pictures."""
        if not self.stages:
            return False
        whole = self.backbone(images)
        try:
            halves = self.rest(self.outputs(images))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # a backbone of another build
            return False
        return halves.shape == whole.shape and bool(torch.allclose(halves, whole, rtol=_AGREE, atol=_AGREE))

    def digest(self) -> str:
        """Changes with any weight of these stages."""
        found = xxhash.xxh3_128()
        for stage in self.stages:
            for tensor in _tensors(stage):
                found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class FrozenBackbone(FrozenPrefix):
    """A whole backbone with its pooling: (b, w) pooled features are kept, a hundredth of a feature map."""

    pools = True

    def __init__(self, backbone: nn.Module, pooling: Pooling) -> None:
        super().__init__(backbone, len(stages(backbone)))
        self._pooling = pooling

    def outputs(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) normalised pixels -> (b, w)."""
        pooled: Tensor = self._pooling(self.backbone(images))
        return pooled

    @torch.no_grad()
    def fits(self, images: Tensor) -> bool:
        """Always: nothing is cut."""
        return True

    def digest(self) -> str:
        """Changes with any weight, and with the kind of pooling."""
        return f"{super().digest()} {self._pooling.kind}"


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block these modules run these functions."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own


def _hand_on(value: Any, *others: Any, **settings: Any) -> Any:  # noqa: ANN401 - whatever a stage is given
    return value


def _tensors(stage: Stage) -> Iterator[Tensor]:
    yield from stage.loose
    for module in stage.modules:
        yield from module.state_dict().values()


def view_seed(pair: Pair, view: int) -> int:
    """Of a kept view: by the picture's file name and the view's number, so that it stays when others come or go."""
    name = Path(pair.image).name.encode("utf-8", "surrogateescape")
    return int(xxhash.xxh3_64_intdigest(name, seed=view)) % 2**31


class KeptViews:
    """(views, n, ...) float16 stage outputs of `pairs` on disk, filled once.

    `folder`: where the files are; a subfolder by what made them. `unfit`: rows whose picture cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Sequence[Pair],
        *,
        views: int,
        made_by: tuple[str, Preprocessing, Augmentation | None],
    ) -> None:
        weights, preprocessing, augmentation = made_by
        seen = asdict(replace(augmentation, word_drop=0.0)) if augmentation else None  # a view has no words
        facts: list[Any] = [weights, asdict(preprocessing), seen]
        facts.append([[pair.image, *_stamp_of(pair.image), names_a_side(pair.captions)] for pair in pairs])
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()
        self.folder, self._pairs, self.views = folder / digest[:16], pairs, views
        self._maps: list[NDArray[np.float16]] = []
        self.unfit: set[int] = set()

    def fill(
        self, feed: Callable[[list[list[Draw]]], Iterator[Any]], *, shape: tuple[int, ...], batch_size: int,
        encode: Callable[[Tensor], Tensor], advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Make what is missing. `feed`: plan -> batches with `draws` and `images`; `advance` hears of each batch.

        Raises `ResourceError` when the disk has too little space. Two runs that share a folder fill it in turn.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / ".lock"):
            self._check_space(shape)
            for view in range(self.views):
                path = self.folder / f"view-{view}.npy"
                if not path.exists():
                    self._fill_view(
                        path, view, feed=feed, shape=shape, batch_size=batch_size, encode=encode, advance=advance
                    )
                else:
                    advance(len(self._pairs))
                self._maps.append(np.load(path, mmap_mode="r"))
        # A picture that a slow disk kept from one view alone would be NaN in some steps and not in others.
        missing = [np.isnan(one.reshape(len(one), -1)[:, 0]) for one in self._maps]
        self.unfit = set(np.flatnonzero(np.any(missing, axis=0)).tolist())

    def read(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """(b,) rows and views -> (b, ...) float16."""
        found = [self._maps[view % self.views][row] for row, view in zip(rows, views, strict=True)]
        return torch.from_numpy(np.stack(found))

    def _fill_view(
        self, path: Path, view: int, *, feed: Callable[[list[list[Draw]]], Iterator[Any]], shape: tuple[int, ...],
        batch_size: int, encode: Callable[[Tensor], Tensor], advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        draft, progress = path.with_suffix(".draft"), path.with_suffix(".done")
        whole = (len(self._pairs), *shape)
        done = _count_in(progress) if draft.exists() else 0
        kept = np.lib.format.open_memmap(draft, mode="r+" if done else "w+", dtype=np.float16, shape=whole)
        _reserve(draft)
        advance(done)
        draws = [Draw(row, 0, view_seed(pair, view)) for row, pair in enumerate(self._pairs)]
        plan = [draws[start : start + batch_size] for start in range(done, len(draws), batch_size)]
        batches = feed(plan)
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for number, (wanted, batch) in enumerate(zip(plan, batches, strict=True), start=1):
                kept[[draw.row for draw in wanted]] = np.float16(np.nan)
                if batch.draws:
                    kept[[draw.row for draw in batch.draws]] = encode(batch.images).to(torch.float16).numpy()
                done += len(wanted)
                advance(len(wanted))
                if number % 16 == 0:
                    kept.flush()
                    progress.write_text(str(done))
        kept.flush()
        del kept
        draft.replace(path)
        progress.unlink(missing_ok=True)

    def _check_space(self, shape: tuple[int, ...]) -> None:
        missing = sum(not (self.folder / f"view-{view}.npy").exists() for view in range(self.views))
        needed = 2 * missing * len(self._pairs) * int(np.prod(shape))
        free = shutil.disk_usage(self.folder).free
        if needed > 0.9 * free:
            raise ResourceError(
                str(self.folder), expected=f"{needed >> 20} MB for {self.views} views", got=f"{free >> 20} MB free",
                do="Ask for fewer views (run.views), or name another folder (run.views_folder).",
            )  # fmt: skip


def _reserve(path: Path) -> None:
    """Take the room on the disk now: a mapped file that finds none later ends the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _count_in(path: Path) -> int:
    """How many pictures are done; 0 when nobody wrote it, or a kill left it empty."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _stamp_of(path: str) -> tuple[int, int]:
    """Size and time of the picture, or of the file that it is packed in; (-1, -1) where there is none."""
    found = packed(path)
    try:
        facts = os.stat(path if found is None else found.file)
    except (OSError, ValueError):
        return -1, -1
    return facts.st_size, facts.st_mtime_ns

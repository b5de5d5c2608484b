"""Words, patches and logits of pairs, numpy in and numpy out: the second stage as a search sees it.

    reranker = Reranker.load("checkpoints/mine")
    words = reranker.read_texts(["two dogs and a ball"])
    patches = reranker.read_pixels(pixels)
    logits = reranker.logits(words, text_rows, patches, image_rows, pairs=[(0, i) for i in range(len(pixels))])

Decisions:
- Patches are handed out quantised, whether they go into the cache or not: a cached and an uncached picture get the
  same logit.
- onnxruntime wherever there are graphs and nobody asked otherwise; a query imports no torch. On a machine with a GPU
  pictures go to torch; pairs do so too when torch is running already or there are `_WORTH_TORCH` of them at once:
  re-ranking one list is done before torch has started.
- Thousands of pairs that fill a good part of a table of texts and pictures, as an evaluation has them, are taken from
  the whole table where the fusion makes it at once (`Fusion.cheap_pairs`): each side is then read once.
- A batch that does not fit into memory is halved, down to one. What a batch was cut into changes no logit.
- A picture that is marked (its patches are not finite) gets the logit NaN, which `scores.Evidence` reads as missing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmsearch.backends.choice import Choice, gpu_works
from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.rerank.checkpoint import (
    GRAPHS,
    MATCH_GRAPH,
    MATCH_ONE_GRAPH,
    PATCHES_GRAPH,
    WORDS_GRAPH,
    RerankCheckpoint,
    load_rerank_model,
)
from mmsearch.rerank.present import has_reranker
from mmsearch.rerank.sides import Sides, Words, checked_pairs
from mmsearch.rerank.tokens import Patches, quantise
from mmsearch.towers.checkpoint import TOKENIZER
from mmsearch.towers.locate import locate
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.types import Embeddings, Pixels

if TYPE_CHECKING:
    from mmsearch.rerank.run_torch import TorchRun
    from mmsearch.rerank.scores import Scoring

_WORTH_TORCH = 2048
_TABLE_SHARE = 32
"""A table is made whole when at most so many of its cells are computed for each that is wanted."""
_TEXTS_AT_ONCE = 64
T = TypeVar("T")


class _Runs(Protocol):
    def words(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]: ...

    def patches(self, pixels: Pixels) -> NDArray[np.float32]: ...

    def match(self, sides: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]: ...


class Reranker:
    """A loaded re-ranker. Thread-safe. Make one with `Reranker.load`.

    `identity`: changes with anything a logit depends on; `tokens_identity`: with anything that stored patches depend
    on. `towers`: which unit rows belong to it. `config`, `preprocessing`, `max_tokens`: as trained. `reads_tokens`:
    False for a fusion of unit rows alone, whose words and patches may be left out (None).
    """

    def __init__(self, opened: RerankCheckpoint, *, choice: Choice | None = None) -> None:
        self._choice = choice or Choice()
        if self._choice.backend == "onnx" and not opened.has_graphs:
            missing = ", ".join(graph for graph in GRAPHS if graph not in opened.files)
            raise ModelError(
                "backend 'onnx'", expected="a re-ranker with graphs", got=f"no {missing}", do="Use 'torch'."
            )
        towers = opened.towers.config
        self._opened = opened
        self.name, self.config, self.reads_tokens = opened.name, opened.config, opened.reads_tokens
        self.scoring_json, self.towers = opened.scoring_json, opened.towers.identity
        self.preprocessing, self.max_tokens = towers.preprocessing, towers.max_tokens
        self._tokeniser = Tokeniser.from_file(opened.towers.directory / TOKENIZER, max_tokens=self.max_tokens)
        self._onnx: _Runs | None = None
        self._torch: TorchRun | None = None
        self._lock = threading.Lock()
        if self._choice.needs_torch:
            self._run_torch()  # a GPU that is not there is said now

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
    ) -> Reranker:
        """The re-ranker of a model directory: None is the bundled model's; else see `towers.locate`.

        `device`: "auto", "cpu", "cuda", "cuda:N". `backend`: "auto", "onnx" (CPU, needs graphs), "torch". `threads`:
        of the CPU, None picks. Raises `ModelError` when there is none, and for one damaged or of other towers.
        """
        choice = Choice(device=device, backend=backend, threads=threads)
        return cls(RerankCheckpoint.open(locate(model)[0]), choice=choice)

    @property
    def identity(self) -> str:
        """Hex digest of weights, settings, towers and preprocessing."""
        return self._opened.identity

    @property
    def tokens_identity(self) -> str:
        """Hex digest of what makes a picture's patches."""
        return self._opened.tokens_identity

    @functools.cached_property
    def scoring(self) -> Scoring:
        """How logit and cosine become a probability; `ModelError` when what was saved is not a scoring."""
        from mmsearch.rerank.scores import Scoring

        return Scoring.from_json(self.scoring_json)

    @functools.cached_property
    def caption_bank(self) -> Embeddings:
        """(m, d) unit rows of captions that say how common a picture is (`commonness.rarity`); m = 0: there is none."""
        return self._opened.bank("caption")

    @functools.cached_property
    def picture_bank(self) -> Embeddings:
        """(m, d) unit rows of pictures that say how common a caption is; m = 0: there is none."""
        return self._opened.bank("picture")

    def read_texts(self, texts: Sequence[str]) -> Words:
        """(n) texts -> `Words`, padded to the longest, cut at `max_tokens`."""
        if isinstance(texts, str):
            raise UsageError("texts", expected="a list of texts", got="one str", do="Write [text].")
        if not texts:
            one = self.read_texts([""])
            return Words(one.tokens[:0], one.mask[:0])
        found = self._tokeniser(texts)
        runs = self._runs(WORDS_GRAPH)
        parts = _in_batches(
            lambda part: runs.words(found.ids[part], found.mask[part]), len(texts), batch_size=_TEXTS_AT_ONCE
        )
        return Words(np.where(found.mask[..., None] > 0, np.concatenate(parts), np.float32(0)), found.mask)

    def read_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> Patches:
        """(n, s, s, 3) uint8 prepared pictures -> quantised patch tokens; a picture without finite ones is marked."""
        size = self.preprocessing.size
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {pixels.shape}"
            raise UsageError("pixels", expected=f"uint8 (n, {size}, {size}, 3)", got=got, do="Prepare them first.")
        if not len(pixels):
            return quantise(np.zeros((0, self.config.patches, self.config.patch_dim), np.float32))
        runs = self._runs(PATCHES_GRAPH)
        parts = _in_batches(lambda part: quantise(runs.patches(pixels[part])), len(pixels), batch_size=batch_size)
        return Patches.concatenate(parts)

    def logits(
        self,
        words: Words | None,
        text_rows: Embeddings,
        patches: Patches | None,
        image_rows: Embeddings,
        *,
        pairs: ArrayLike,
        batch_size: int = 64,
    ) -> NDArray[np.float32]:
        """Of the `pairs` (m, 2), whole numbers (text, picture) -> (m,) float32 logits of "they match".

        Both sides' unit rows, (n, d), stand in the order of their words and patches. NaN for a marked picture.
        Pairs of one text, or of one picture, that follow each other are cheaper. Raises `UsageError` for sizes that do
        not fit and pairs that are not there, `ModelError` when a logit is not finite.
        """
        places = checked_pairs(pairs, texts=len(text_rows), pictures=len(image_rows))
        sides = self._sides((words, text_rows), (patches, image_rows))
        found = np.full(len(places), np.nan, np.float32)
        wanted = np.flatnonzero(sides.usable()[places[:, 1]])
        found[wanted] = self._logits(sides, places[wanted], batch_size=batch_size)
        if not (finite := np.isfinite(found[wanted])).all():
            text, picture = places[wanted[int(np.argmin(finite))]].tolist()
            got = f"NaN or infinity for text {text} and picture {picture}"
            raise ModelError("the re-ranker's output", expected="finite logits", got=got)
        return found

    def _logits(self, sides: Sides, places: NDArray[np.int64], *, batch_size: int) -> NDArray[np.float32]:
        cells = sides.size[0] * sides.size[1]
        if len(places) >= _WORTH_TORCH and cells <= _TABLE_SHARE * len(places) and self._choice.backend != "onnx":
            with self._lock:
                run = self._run_torch()
            if run.cheap_pairs:
                table = run.matrix(sides.every())
                return table[places[:, 0], places[:, 1]]
        runs = self._runs(MATCH_GRAPH, pairs=len(places))
        parts = _in_batches(lambda part: runs.match(sides.gather(places[part]))[0], len(places), batch_size=batch_size)
        return np.concatenate([np.empty(0, np.float32), *parts])

    def attention(
        self,
        words: Words | None,
        text_rows: Embeddings,
        patches: Patches | None,
        image_rows: Embeddings,
        *,
        pair: tuple[int, int] = (0, 0),
    ) -> NDArray[np.float32] | None:
        """Of one (text, picture) -> (t, p) float32: how much each word looks at each patch, summing to 1 over patches.

        Rows are the words of `words_of`, patches row by row of the grid. None when the fusion has no attention, or the
        picture is marked. Raises as `logits` does.
        """
        places = checked_pairs([pair], texts=len(text_rows), pictures=len(image_rows))
        sides = self._sides((words, text_rows), (patches, image_rows))
        if not self.reads_tokens or not sides.usable()[pair[1]]:
            return None
        found = self._runs(MATCH_GRAPH, pairs=1).match(sides.gather(places))[1]
        return None if found is None else found[0]

    def words_of(self, text: str) -> list[str]:
        """The spelling of a text's tokens as the re-ranker reads them, special ones included."""
        return self._tokeniser.spelling(text)

    def _sides(self, text: tuple[Words | None, Embeddings], image: tuple[Patches | None, Embeddings]) -> Sides:
        return Sides(text, image, config=self.config, dim=self.towers.dim, reads_tokens=self.reads_tokens)

    def _runs(self, graph: str, *, pairs: int = 0) -> _Runs:
        with self._lock:
            if self._by_onnx(graph, pairs=pairs):
                if self._onnx is None:
                    from mmsearch.rerank.run_onnx import OnnxRun

                    directory, threads = self._opened.directory, self._choice.threads
                    self._onnx = OnnxRun(directory, reads_tokens=self.reads_tokens, threads=threads)
                return self._onnx
            return self._run_torch()

    def _by_onnx(self, graph: str, *, pairs: int) -> bool:
        choice = self._choice
        needed = {MATCH_GRAPH, MATCH_ONE_GRAPH} if graph == MATCH_GRAPH else {graph}
        if not choice.allows_onnx or not needed <= set(self._opened.files):
            return False
        if graph == WORDS_GRAPH or choice.backend == "onnx" or choice.device == "cpu":
            return True
        few = graph == MATCH_GRAPH and self._torch is None and pairs < _WORTH_TORCH
        return few or not gpu_works()

    def _run_torch(self) -> TorchRun:
        if self._torch is None:
            from mmsearch.rerank.run_torch import TorchRun

            try:
                model = load_rerank_model(self._opened)
                self._torch = TorchRun(model, device=self._choice.device, threads=self._choice.threads)
            except MemoryError as error:
                raise _out_of_memory("loading the re-ranker") from error
        return self._torch


def _in_batches(run: Callable[[slice], T], count: int, *, batch_size: int) -> list[T]:
    """Run slices of at most `batch_size` over `count` inputs; a `MemoryError` halves the size and tries again."""
    if batch_size < 1:
        raise UsageError("batch_size", expected="1 or more", got=str(batch_size))
    parts: list[T] = []
    start, size = 0, batch_size
    while start < count:
        stop = min(start + size, count)
        try:
            parts.append(run(slice(start, stop)))
        except MemoryError as error:
            size = (stop - start) // 2
            if size < 1:
                raise _out_of_memory("a batch of one") from error
            continue
        start = stop
    return parts


def _out_of_memory(what: str) -> ResourceError:
    return ResourceError(what, expected="enough memory", got="none left", do="Free memory or use a smaller model.")


__all__ = ["Patches", "Reranker", "Words", "has_reranker"]

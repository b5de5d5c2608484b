"""Patch tokens of every picture in an index, made once and kept, so that re-ranking need not look at pictures again.

Decisions:
- Which pictures lack tokens is asked of the cache, page by page: stopped at any instant, the next run goes on from
  what was committed. There is no list of what is to be done that could go out of date.
- A picture is read once whatever number of items show it; of several copies, one that is there.
- What was decoded must be the picture that was indexed, byte for byte, else it is left out: the index is stale, and
  the next build brings both up to date.
- A picture that cannot be read costs itself only. Its tokens are made when it is re-ranked, or by the next run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np

from mmsearch.data.images import DEFAULT_LIMITS, Limits
from mmsearch.data.loading import Failed, Loaded, Loader
from mmsearch.errors import ModelError
from mmsearch.progress import Progress, SilentProgress
from mmsearch.rerank.tokens import ReadsPatches, pack
from mmsearch.store.directory import IndexStore
from mmsearch.store.tokens import TokenStore
from mmsearch.types import BuildReport, Skipped, SkipReason

COMMIT_PICTURES = 256
COMMIT_SECONDS = 1.5
_PAGE = 500
_STALE = "not the picture that was indexed; the next 'mmsearch index' brings it up to date"


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What filling did, in pictures of different content: `added` now, `present` before, `removed` as they are gone.

    `skipped`: pictures that have no tokens, and why. `bytes_per_picture`: of the tokens of one. `seconds`: wall time.
    """

    added: int
    present: int
    skipped: tuple[Skipped, ...]
    bytes_per_picture: int
    seconds: float
    removed: int = 0


def fill_tokens(
    index_path: str | os.PathLike[str],
    reranker: ReadsPatches,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    thorough: bool = True,
    progress: Progress | None = None,
) -> TokenReport:
    """Make the patch tokens that the index at `index_path` lacks, and drop those of pictures that are gone.

    `batch_size`: pictures per pass of the model. `workers`: decoding processes (None: one a core). `thorough`: tokens
    that are there are read, and damaged ones made anew; without it only those that are not there are made.
    Ctrl-C keeps what is done. Raises `IndexNotFoundError`, `IndexDamagedError`, `IndexLockedError`, `ResourceError`.
    """
    started = time.perf_counter()
    path, told = os.fspath(index_path), progress or SilentProgress()
    with (
        IndexStore.open(path) as store,
        TokenStore.open(path, identity=reranker.tokens_identity, write=True) as tokens,
        store.snapshot() as snapshot,
        _loader(reranker, store.settings, workers=workers) as loader,
    ):
        if thorough:
            tokens.repair()
        removed = tokens.prune(digest for digest, _ in snapshot.pictures())
        told.start(sum(1 for _ in _by_content(snapshot.pictures())), what="patch tokens")
        filling = Filling(tokens, reranker, batch_size=batch_size, told=told)
        filling.run(loader, _by_content(snapshot.pictures()))
    return TokenReport(
        added=filling.added,
        present=filling.present,
        skipped=tuple(filling.skipped),
        bytes_per_picture=reranker.config.bytes_per_picture,
        seconds=time.perf_counter() - started,
        removed=removed,
    )


@dataclass(slots=True)
class Waiting:
    """Tokens that were made since the last commit."""

    pairs: list[tuple[bytes, bytes]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class Filling:
    """One pass over the pictures of an index. Totals are in `added`, `present` and `skipped`."""

    def __init__(self, tokens: TokenStore, reranker: ReadsPatches, *, batch_size: int, told: Progress) -> None:
        self._tokens, self._reranker, self._told = tokens, reranker, told
        self._batch_size = batch_size
        self._asked: dict[int, tuple[bytes, str]] = {}
        self._next_key = 0
        self._loaded: list[Loaded] = []
        self._waiting = Waiting()
        self.added = self.present = 0
        self.skipped: list[Skipped] = []

    def run(self, loader: Loader, pictures: Iterator[tuple[bytes, list[str]]]) -> None:
        """Make the tokens of all `pictures` (content hash, paths of its copies) that lack them."""
        try:
            for result in loader.load(self._requests(pictures)):
                self._take(result)
            self._read_loaded()
        finally:
            # Also on Ctrl-C and on errors: what was made is kept, the next run goes on from here.
            self._commit()

    def _requests(self, pictures: Iterator[tuple[bytes, list[str]]]) -> Iterator[tuple[int, str]]:
        while page := dict(islice(pictures, _PAGE)):
            lacking = self._tokens.missing(page)
            self.present += len(page) - len(lacking)
            self._told.advance(len(page) - len(lacking))
            for digest in lacking:
                path = next((path for path in page[digest] if os.path.exists(path)), page[digest][0])
                key, self._next_key = self._next_key, self._next_key + 1
                self._asked[key] = digest, path
                yield key, path

    def _take(self, result: Loaded | Failed) -> None:
        digest, path = self._asked[result.key]
        if isinstance(result, Loaded) and result.content_hash == digest:
            self._loaded.append(result)
            if len(self._loaded) >= self._batch_size:
                self._read_loaded()
            return
        why = result.skipped if isinstance(result, Failed) else Skipped(path, SkipReason.CHANGING, _STALE)
        self.skipped.append(why)
        del self._asked[result.key]
        self._told.advance(1)

    def _read_loaded(self) -> None:
        loaded, self._loaded = self._loaded, []
        if not loaded:
            return
        patches = self._reranker.read_pixels(np.stack([one.pixels for one in loaded]), batch_size=self._batch_size)
        config = self._reranker.config
        expected = (len(loaded), config.patches, config.patch_dim)
        if patches.values.shape != expected:
            raise ModelError("patch tokens", expected=str(expected), got=str(patches.values.shape))
        for place, (one, good) in enumerate(zip(loaded, patches.intact(), strict=True)):
            digest, path = self._asked.pop(one.key)
            if good:
                self._waiting.pairs.append((digest, pack(patches.take([place]))))
            else:
                self.skipped.append(Skipped(path, SkipReason.BAD_EMBEDDING, "the model gave no finite patch tokens"))
        self._told.advance(len(loaded))
        if len(self._waiting.pairs) >= COMMIT_PICTURES or time.monotonic() - self._waiting.since > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        waiting = self._waiting
        if waiting.pairs:
            self._tokens.put(waiting.pairs)
            self.added += len(waiting.pairs)
        self._waiting = Waiting()


def keeps_tokens(index_path: str, wanted: bool | None) -> bool:
    """Whether an index is to keep patch tokens: what was asked for, else what it has, else not."""
    if wanted is None and IndexStore.exists(index_path):
        return IndexStore.stored_settings(index_path).get("tokens") is True
    return bool(wanted)


def reranker_of(model: str | None, *, device: str) -> ReadsPatches:
    """The re-ranker of a model (None: the bundled one); `ModelError` when it has none, or one that reads no patches."""
    from mmsearch.rerank.reranker import Reranker

    loaded = Reranker.load(model, device=device)
    if not loaded.reads_tokens:
        raise ModelError(
            loaded.name, expected="a re-ranker that reads patches", got=f"fusion {loaded.config.fusion}",
            do="There is nothing to keep for it: say --no-tokens.",
        )  # fmt: skip
    return loaded


def with_tokens(
    report: BuildReport,
    reranker: ReadsPatches,
    *,
    batch_size: int,
    workers: int | None,
    thorough: bool,
    progress: Progress,
) -> BuildReport:
    """Fill the tokens of the index that was built; its report with a line about them."""
    filled = fill_tokens(
        report.index, reranker, batch_size=batch_size, workers=workers, thorough=thorough, progress=progress
    )
    size = f"{filled.bytes_per_picture / 1000:.1f} KB each"
    notes = [f"patch tokens of {filled.added + filled.present} pictures ({filled.added} new), {size}"]
    if filled.skipped:
        first = filled.skipped[0]
        notes.append(f"no patch tokens for {len(filled.skipped)} pictures, the first {first.path}: {first.reason}")
    return replace(report, tokens=filled.added, notes=(*report.notes, *notes))


def _by_content(pictures: Iterable[tuple[bytes, str]]) -> Iterator[tuple[bytes, list[str]]]:
    """(content hash, path) in order of the hash -> each hash once, with all its paths."""
    for digest, copies in groupby(pictures, key=itemgetter(0)):
        yield digest, [path for _, path in copies]


def _loader(reranker: ReadsPatches, settings: Mapping[str, Any], *, workers: int | None) -> Loader:
    """Decodes within the limits that the index was built with: what it holds can be read again."""
    try:
        limits = Limits(**settings["limits"])
    except (KeyError, TypeError):
        limits = DEFAULT_LIMITS  # an index that was made without them, or with some of another version
    return Loader(preprocessing=reranker.preprocessing, workers=workers, limits=limits)

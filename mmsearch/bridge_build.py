"""The making of a bridge: a sample of an index's items encoded by the new model, fitted, measured, kept in the index.

    report = build_bridge("indexes/photos", model="./mine")

Decisions:
- Old rows come from the index, so that the old model need not be there.
- Copies of one picture are taken once: one in another fold would give the answer away.
- The file is put in place in one rename and needs no lock: it may be made while a reindexing is running.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.bridge import LEAST, Bridge
from mmsearch.bridge_cost import Pairs, cost_lines, fitted
from mmsearch.data.images import kept_limits
from mmsearch.errors import UsageError
from mmsearch.evaluate.metrics import Ints
from mmsearch.opened import refuse_shards
from mmsearch.pictures import Encoded, EncodesPictures, LocalPictures, Request
from mmsearch.progress import Progress, SilentProgress
from mmsearch.store.base import Snapshot
from mmsearch.store.bridge_file import ends_of
from mmsearch.store.directory import IndexStore
from mmsearch.store.imports import TEXT_UNKNOWN
from mmsearch.types import Modality, Rows

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

SAMPLE = 2000


@dataclass(frozen=True, slots=True, eq=False)
class BridgeReport:
    """What was made. `pictures`, `texts`: the sample. `skipped`: pictures of it that could not be encoded."""

    index: Path
    bridge: Bridge
    pictures: int
    texts: int
    skipped: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; shares between 0 and 1, each [mean, low, high] of its 95 % interval."""
        sample = {"pictures": self.pictures, "texts": self.texts, "skipped": self.skipped}
        return {"index": os.fspath(self.index), "sample": sample, "seconds": self.seconds, **self.bridge.facts()}

    def lines(self) -> Iterator[str]:
        """For people: how it was fitted, then hit@k in per cent."""
        old, new = self.bridge.old.name, self.bridge.new.name
        yield f"{old} -> {new}: {self.pictures:,} pictures and {self.texts:,} texts in {self.seconds:.0f} s"
        if self.skipped:
            yield f"{self.skipped} pictures of the sample could not be encoded"
        for modality, one in self.bridge.maps.items():
            yield f"{modality.value} rows: {one.method}, rank {one.rank}, correlation of scores {one.agreement:.3f}"
        yield from cost_lines(self.bridge.cost)


def build_bridge(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    encoder: Encodes | None = None,
    sample: int = SAMPLE,
    queries: Sequence[str] = (),
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> BridgeReport:
    """Fit a bridge from the index at `path` to another model, measure it, and keep it in the index.

    `model`, `encoder`: as for `reindex`. `sample`: pictures drawn, with their captions. `queries`: texts to measure
    with beside the captions. From then on `Searcher.open(path, encoder=...)` answers queries of that model.
    Raises `UsageError` for an index of that model, one with fused item vectors, or one of fewer than 16 pictures.
    """
    started, told = time.perf_counter(), progress or SilentProgress()
    refuse_shards(os.fspath(path))
    with IndexStore.open(os.fspath(path)) as store, store.snapshot() as snapshot:
        _check(store, snapshot, sample)
        if encoder is None:
            from mmsearch.encoder import Encoder

            encoder = Encoder.load(os.fspath(model) if model is not None else None, device=device)
        if store.model.same_space(encoder.identity):
            raise UsageError(
                store.path, expected="another model than the index has", got=encoder.identity.name,
                do="Name the new one with --model.",
            )  # fmt: skip
        random = np.random.default_rng(seed)
        drawn = _drawn(snapshot, random, sample)
        limits = kept_limits(store.settings)
        with closing(LocalPictures(encoder, batch_size=batch_size, workers=workers, limits=limits)) as encodes:
            pictures = _pictures(snapshot, drawn, encodes, told)
        texts = _captions(snapshot, pictures.groups, encoder)
        others = _other_texts(snapshot, random, encoder, most=sample - len(texts.old), but=texts)
        asked = encoder.encode_texts(list(queries)) if queries else None
        maps, cost = fitted(pictures, texts, others=others, asked=asked)
        bridge = Bridge(store.model, encoder.identity, maps, cost)
        bridge.save(store.path)
    return BridgeReport(
        Path(path), bridge, len(pictures.old), len(texts.old) + len(others.old), len(drawn) - len(pictures.old),
        time.perf_counter() - started,
    )  # fmt: skip


def needs_bridge(path: str | os.PathLike[str], encoder: Encodes) -> bool:
    """Whether that encoder cannot ask the index at `path` yet: it is another model, and there is no bridge to it."""
    refuse_shards(os.fspath(path))
    with IndexStore.open(os.fspath(path)) as store:
        ends = ends_of(store.path)
        there = ends is not None and ends[0].same_space(store.model) and ends[1].same_space(encoder.identity)
        return not there and not store.model.same_space(encoder.identity)


def _check(store: IndexStore, snapshot: Snapshot, sample: int) -> None:
    if sample < LEAST:
        raise UsageError("sample", expected=f"{LEAST} pictures or more", got=str(sample), do="Leave --sample out.")
    if store.settings.get("item_vectors") == "fused":
        got = "fused ones, made of pictures and captions together"
        do = "Run 'mmsearch reindex' without a bridge."
        raise UsageError(store.path, expected="separate item vectors", got=got, do=do)
    if snapshot.count(Modality.IMAGE) < LEAST:
        raise UsageError(
            store.path, expected=f"{LEAST} pictures or more", got=str(snapshot.count(Modality.IMAGE)),
            do="Run 'mmsearch reindex' without a bridge: so few are encoded in no time.",
        )  # fmt: skip


def _drawn(snapshot: Snapshot, random: np.random.Generator, sample: int) -> Rows:
    """Picture rows, drawn without replacement, copies of a picture once."""
    alive = snapshot.alive_rows(Modality.IMAGE)
    rows = np.sort(random.choice(alive, min(sample, len(alive)), replace=False))
    hashes = snapshot.content_hashes(rows)
    first = {digest: row for digest, row in zip(reversed(hashes), rows[::-1].tolist(), strict=True) if digest}
    return np.array([r for r, h in zip(rows.tolist(), hashes, strict=True) if not h or first[h] == r], np.int64)


def _pictures(snapshot: Snapshot, rows: Rows, encodes: EncodesPictures, told: Progress) -> Pairs:
    """Those rows whose pictures are still what was indexed, by both models; the group of each is its row."""
    paths = [one.item.path for one in snapshot.locate(rows)]
    hashes = snapshot.content_hashes(rows)
    told.start(len(rows), what="a sample for the bridge")
    kept: list[int] = []
    new: list[NDArray[np.floating[Any]]] = []
    requests = (Request(i, "", str(path), path, None) for i, path in enumerate(paths) if path is not None)
    for outcomes in encodes.encode(requests):
        for one in outcomes:
            if isinstance(one, Encoded) and one.vector is not None and hashes[one.key] in (None, one.content_hash):
                kept.append(one.key)
                new.append(one.vector)
        told.advance(len(outcomes))
    if len(kept) < LEAST:
        raise UsageError(
            "bridge", expected=f"{LEAST} pictures or more that can be read", got=str(len(kept)),
            do="Raise --sample, or see with 'mmsearch verify' what became of the files.",
        )  # fmt: skip
    chosen = rows[kept]
    return Pairs(snapshot.vectors(chosen), np.stack(new).astype(np.float32), chosen, chosen)


def _captions(snapshot: Snapshot, pictures: Ints, encoder: Encodes) -> Pairs:
    """The captions of those pictures, by both models, with the row of their picture as group."""
    rows: list[int] = []
    groups: list[int] = []
    for picture, located in zip(pictures.tolist(), snapshot.locate(pictures), strict=True):
        known = located.item.captions and located.item.metadata.get(TEXT_UNKNOWN) is not True
        own = snapshot.rows_of(located.item.id, Modality.TEXT).tolist() if known else []
        rows += own
        groups += [picture] * len(own)
    return _by_both(snapshot, encoder, rows, groups)


def _other_texts(snapshot: Snapshot, random: np.random.Generator, encoder: Encodes, *, most: int, but: Pairs) -> Pairs:
    """Texts of other items, at most `most` of them: an index may have few pictures with captions. No two in a group."""
    alive = np.setdiff1d(snapshot.alive_rows(Modality.TEXT), but.rows)
    drawn = np.sort(random.choice(alive, max(min(most, len(alive)), 0), replace=False))
    located = zip(drawn.tolist(), snapshot.locate(drawn), strict=True)
    rows = [row for row, one in located if one.item.metadata.get(TEXT_UNKNOWN) is not True]
    return _by_both(snapshot, encoder, rows, [-1 - row for row in rows])


def _by_both(snapshot: Snapshot, encoder: Encodes, rows: list[int], groups: list[int]) -> Pairs:
    captions = [one.caption or "" for one in snapshot.locate(rows)]
    new = encoder.encode_texts(captions) if captions else np.empty((0, encoder.dim), np.float32)
    chosen = np.array(rows, np.int64)
    return Pairs(snapshot.vectors(chosen), new, np.array(groups, np.int64), chosen)

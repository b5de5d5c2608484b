"""Bringing the searchable files of an index up to date: of which kind, for what memory and overlap, tuned on what.

Decisions:
- What was asked for once is a setting of the index, kept until something else is asked for; the default, "auto", is not
  written down.
- Queries to tune on come from the user's file, else from the collection's own captions, else they are made of class
  names that the package carries. Photos of the collection stand for searches by picture.
- Only what must be tuned loads a model, and only when captions do not already have their rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsearch.derived_maker import TARGET, IndexMaker
from mmsearch.errors import IndexMismatchError, InputError, ModelError, UsageError
from mmsearch.index.layouts import AUTO, EXACT, layout_of
from mmsearch.index.tuning import Questions
from mmsearch.progress import Progress
from mmsearch.store.directory import IndexStore
from mmsearch.types import Modality

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmsearch.encoder import Encodes
    from mmsearch.store.snapshot import DirectorySnapshot

QUERIES = 512
"""Queries of each sort that are tuned on and judged with."""
_SEED = 5
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class IndexWish:
    """What a user asks of the searchable files; None: as the index has it, for a new one "auto", no limit and 0.95.

    `kind`: a name (`index.layouts.kind_names`) or a FAISS factory string. `memory`: bytes or "4G"; "none": no limit.
    `overlap`: the share of the exact top 10 that must be found, 0.5 to 1. `queries`: a file of texts, one a line.
    """

    kind: str | None = None
    memory: int | str | None = None
    overlap: float | None = None
    queries: str | os.PathLike[str] | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.kind, self.memory, self.overlap, self.queries))

    def check(self, dim: int = 384) -> None:
        """Raise `UsageError` or `InputError` for what cannot be with d = `dim`, before there is any work to lose."""
        self.settings({}, dim=dim)
        if self.queries is not None:
            read_queries(self.queries)

    def settings(self, kept: Mapping[str, Any], *, dim: int) -> dict[str, Any]:
        """The settings to keep: `kept` with what is asked for, checked; defaults left out. Raises `UsageError`."""
        merged = dict(kept)
        if self.kind is not None:
            layout_of(self.kind, n=10_000_000, d=dim)  # is it a kind at all?
            merged["kind"] = self.kind
        if self.memory is not None:
            merged["memory"] = memory_of(self.memory)
        if self.overlap is not None:
            if not 0.5 <= self.overlap <= 1.0:
                raise UsageError("overlap", expected="a share from 0.5 to 1", got=str(self.overlap))
            merged["overlap"] = float(self.overlap)
        defaults: dict[str, Any] = {"kind": AUTO, "memory": None, "overlap": TARGET}
        return {name: value for name, value in merged.items() if value != defaults[name]}


def memory_of(text: int | str) -> int | None:
    """Bytes of "4G", "500M", "1.5g" or a number; None for "none". Known value: "1K" is 1,024. Raises `UsageError`."""
    if isinstance(text, str) and text.strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", str(text).lower())
    if found is None or float(found[1]) <= 0:
        raise UsageError("memory", expected="bytes such as 4G or 500M, or none", got=str(text))
    return int(float(found[1]) * _UNITS[found[2]])


def derive(
    store: IndexStore,
    *,
    encoder: Callable[[], Encodes | None] | None = None,
    wish: IndexWish | None = None,
    anew: bool = False,
    told: Progress | None = None,
) -> None:
    """Bring the derived files of an index that is open for writing up to date, then its manifest.

    `encoder` is called when texts have to be encoded to tune with; without one, only rows that are there are used.
    `anew`: make and tune everything again. Raises `UsageError` (an unknown kind, too small a budget), `ResourceError`,
    `IndexDamagedError`. Killed half way, what was done of a long build is gone on with next time.
    """
    wish = wish or IndexWish()
    kept = wish.settings(store.settings.get("index", {}), dim=store.dim)
    texts = None if wish.queries is None else read_queries(wish.queries)
    with store.snapshot() as snapshot:

        def asks(modality: Modality) -> Mapping[str, Questions]:
            return _questions(snapshot, modality, texts=texts, encoder=lambda: _of_this_space(store, encoder, texts))

        maker = IndexMaker(
            kept.get("kind", AUTO), memory=kept.get("memory"), target=kept.get("overlap", TARGET), asks=asks,
            anew=anew, retune=texts is not None, told=told,
        )  # fmt: skip
        store.update_derived(maker)
    settings = {name: value for name, value in store.settings.items() if name != "index"}
    store.note_settings(settings | ({"index": kept} if kept else {}))  # not before: what cannot be is not kept
    store.finish()


def tune_index(
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    memory: int | str | None = None,
    overlap: float | None = None,
    queries: str | os.PathLike[str] | None = None,
    anew: bool = False,
    encoder: Encodes | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Lay an index out for searching as asked, tune it, and say by modality what that is and finds: JSON values.

    The arguments are those of `IndexWish`. `encoder`: used instead of the index's own model when texts are encoded.
    Raises as `derive`, and `IndexLockedError` while somebody else writes. Searchers see it after `refresh`.
    """
    from mmsearch.opened import refuse_shards

    wish = IndexWish(kind, memory, overlap, queries)
    refuse_shards(os.fspath(path))
    with IndexStore.open(os.fspath(path), write=True) as store:
        wish.check(store.dim)

        def load() -> Encodes | None:
            try:
                return encoder or load_encoder(store.settings.get("model"), device=device)
            except ModelError:
                if wish.queries is not None:
                    raise
                return None  # vectors of a model that nobody named: what is stored has to do for queries

        derive(store, encoder=load, wish=wish, anew=anew, told=progress)
        with store.snapshot() as snapshot:
            return {m.value: _shown(snapshot, m) for m in Modality if snapshot.count(m)}


def _of_this_space(
    store: IndexStore, encoder: Callable[[], Encodes | None] | None, texts: Sequence[str] | None
) -> Encodes | None:
    """The encoder, when its rows can be compared with those of the index.

    Else None, and queries are rows that are there; `IndexMismatchError` where the user brought texts to encode.
    """
    model = None if encoder is None else encoder()
    if model is None or store.model.same_space(model.identity):
        return model
    if texts is None:
        return None
    raise IndexMismatchError(
        store.path, expected=f"model {store.model.name}, to encode the queries", got=model.identity.name,
        do="Name the model of the index, or leave the queries out.",
    )  # fmt: skip


def load_encoder(name: str | None, *, device: str) -> Encodes:
    """The model of an index; None is the bundled one."""
    from mmsearch.encoder import Encoder

    return Encoder.load(name, device=device)


def _shown(snapshot: DirectorySnapshot, modality: Modality) -> dict[str, Any]:
    found = snapshot.derived(modality)
    if found is None:
        return {"kind": EXACT, "rows": snapshot.count(modality), "bytes": 0}
    return {"kind": found.kind, "rows": found.count, "bytes": found.size, **found.facts}


def read_queries(path: str | os.PathLike[str]) -> list[str]:
    """Texts, one a line, empty lines left out. Raises `InputError`."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(os.fspath(path), expected="a text file, one query a line", got=str(error)) from error
    texts = [line for line in lines if line]
    if not texts:
        raise InputError(os.fspath(path), expected="one query a line", got="none")
    return texts


def _questions(
    snapshot: DirectorySnapshot,
    modality: Modality,
    *,
    texts: Sequence[str] | None,
    encoder: Callable[[], Encodes | None] | None,
) -> Mapping[str, Questions]:
    """Text and picture queries for rows of `modality`; a stored row that is a query is not its own answer."""
    asked = {"text": _texts(snapshot, modality, texts=texts, encoder=encoder)}
    asked["image"] = _stored(snapshot, Modality.IMAGE, of=modality, source="pictures of the collection")
    return {name: questions for name, questions in asked.items() if questions is not None}


def _texts(
    snapshot: DirectorySnapshot,
    modality: Modality,
    *,
    texts: Sequence[str] | None,
    encoder: Callable[[], Encodes | None] | None,
) -> Questions | None:
    if texts is None:
        captions = _stored(snapshot, Modality.TEXT, of=modality, source="captions of the collection")
        if captions is not None and len(captions.vectors) >= 32:
            return captions
    model = None if encoder is None else encoder()
    if model is None:
        return None
    source = "made of class names" if texts is None else f"a file of {len(texts):,} texts"
    chosen = made_texts(QUERIES) if texts is None else _some(texts, QUERIES)
    vectors = model.encode_texts(list(chosen))
    return Questions(vectors, np.full(len(vectors), -1, np.int64), source)


def _stored(snapshot: DirectorySnapshot, sort: Modality, *, of: Modality, source: str) -> Questions | None:
    alive = snapshot.alive_rows(sort)
    if not len(alive):
        return None
    drawn = np.random.default_rng(_SEED).choice(len(alive), size=min(QUERIES, len(alive)), replace=False)
    rows = alive[np.sort(drawn)]
    own = rows if sort is of else np.full(len(rows), -1, np.int64)
    return Questions(snapshot.vectors(rows), own, source)


def _some(texts: Sequence[str], n: int) -> list[str]:
    """At most n of them, spread over the whole file."""
    if len(texts) <= n:
        return list(texts)
    return [texts[i] for i in np.linspace(0, len(texts) - 1, n).astype(int)]


def made_texts(n: int) -> list[str]:
    """n texts of the sort people type, made of the thousand class names that the package carries; always the same."""
    from mmsearch.towers.anchor_names import imagenet_prompts

    frames = (
        "a photo of a {}",
        "{}",
        "a {} and a {}",
        "a {} in front of a {}",
        "two {}s outdoors",
        "a small {} next to a {}",
    )
    names, rng = imagenet_prompts(synonyms=1, template="{}")[0], np.random.default_rng(_SEED)
    return [frames[i % len(frames)].format(*(names[j] for j in rng.integers(0, len(names), size=2))) for i in range(n)]


def derive_or_scan(
    store: IndexStore, *, encoder: Callable[[], Encodes | None] | None, told: Progress | None = None
) -> tuple[str, ...]:
    """`derive` for rows that came as a whole, copied or encoded anew, as the settings of the index say.

    Where those do not suit the rows (too few to learn a kind from, a budget they exceed), searches scan all of them,
    and what is returned says so: nothing is lost, only speed. Raises `ModelError` and what else `derive` raises.
    """
    try:
        derive(store, encoder=encoder, told=told)
    except UsageError as error:
        store.finish()
        return (f"{store.path}: searches scan all rows: {error}",)
    return ()

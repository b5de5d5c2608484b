"""Which model imported vectors belong to, as the index records it.

Decisions:
- Vectors of a model that is named are that model's: texts are encoded with it, and only its rows are let in.
- Vectors of nobody in particular are a space of their own. It is called "imported", its weights are a digest of the
  name that the user gives the space, and its setting `model` names no model: whoever wants to encode something is told
  to name one (`towers.locate`). Rows of two spaces of the same name and dimension can be compared.
- Naming the model later changes the record, not the rows: it is what the user knows about them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmsearch.errors import IndexMismatchError, UsageError
from mmsearch.exchange.base import VectorSource
from mmsearch.store.directory import IndexStore
from mmsearch.store.imports import imports_of, name_model
from mmsearch.towers.locate import UNNAMED
from mmsearch.types import ModelIdentity, Preprocessing

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

UNKNOWN = "unknown"
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Space:
    """Whose vectors they are: identity and preprocessing as an index records them; `source`: its setting `model`.

    `encoder` hands out the model; None where nobody named one. `said`: the user said so now; else it is what the index
    has.
    """

    model: ModelIdentity
    preprocessing: Preprocessing
    source: str | None
    encoder: Callable[[], Encodes] | None = None
    said: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of an index that is made for these vectors."""
        return {"model": self.source}


def unnamed_space(name: str, dim: int) -> Space:
    """The space of vectors whose model nobody named. `UsageError` for a name that is none."""
    if not name.strip() or len(name) > _LONGEST or not name.isprintable():
        raise UsageError("--space", expected=f"a name of 1 to {_LONGEST} characters", got=repr(name[:_LONGEST]))
    digest = hashlib.sha256(f"{UNNAMED}{name}".encode()).hexdigest()[:32]
    preprocessing = Preprocessing()
    identity = ModelIdentity("imported", weights=digest, preprocessing=preprocessing.digest(), dim=dim)
    return Space(identity, preprocessing, f"{UNNAMED}{name}")


def space_of(
    target: str, dim: int, *, model: str | None, encoder: Encodes | None, space: str | None, device: str
) -> Space:
    """What was said about the vectors, else what the index at `target` holds, else an unknown space.

    Raises `UsageError` when both a model and a space are named, `ModelError` when the model cannot be loaded.
    """
    if space is not None and (model is not None or encoder is not None):
        raise UsageError("--space", expected="a model or a space", got="both", do="A model is a space already.")
    if model is not None and encoder is None:
        encoder = _load(model, device)
    if encoder is not None:
        loaded = encoder
        return Space(loaded.identity, loaded.preprocessing, loaded.source, lambda: loaded)
    if space is None and IndexStore.exists(target):
        with IndexStore.open(target) as store:
            source = store.settings.get("model")
            named = not str(source).startswith(UNNAMED)
            load = (lambda: _load(source, device)) if named else None
            return Space(store.model, store.preprocessing, source, load, said=False)
    return unnamed_space(UNKNOWN if space is None else space, dim)


def check_known(store: IndexStore, source: VectorSource, space: Space) -> None:
    """`IndexMismatchError` when `source` was imported as another model's vectors, and nobody says whose they are now.

    An index can be given another model after an import (`mmsearch reindex`); the source knows nothing of that.
    """
    with store.snapshot() as snapshot:
        record = imports_of(snapshot).get(source.root)
    if record is not None and not space.said and record.space not in ("", space.model.weights):
        raise IndexMismatchError(
            source.path,
            expected=f"vectors of {space.model.name}, which the index has now",
            got="a source that was imported when it had another model",
            do="Say with --model whose vectors they are, or choose another --out.",
        )


def _load(model: str | None, device: str) -> Encodes:
    from mmsearch.encoder import Encoder

    return Encoder.load(model, device=device)


def check_dim(space: Space, dim: int, *, where: str) -> None:
    """`IndexMismatchError` unless the space has vectors of that dimension."""
    if space.model.dim != dim:
        raise IndexMismatchError(
            where,
            expected=f"vectors of d = {space.model.dim}, as those of {space.model.name} are",
            got=f"d = {dim}",
            do="Name the model that made them with --model, and choose another --out.",
        )


def open_index(target: str, space: Space) -> IndexStore:
    """The index at `target`, made if need be, opened for writing. An unnamed space is given the name that is known now.

    Raises `IndexMismatchError` when the index holds vectors of another model or space.
    """
    if not IndexStore.exists(target):
        return IndexStore.create(target, model=space.model, preprocessing=space.preprocessing, settings=space.settings)
    store = IndexStore.open(target, write=True)
    try:
        if not store.model.same_space(space.model) and may_be_named(store.settings, store.model, space):
            settings = {**store.settings, **space.settings}
            name_model(store, model=space.model, preprocessing=space.preprocessing, settings=settings)
            store.finish()
            store.close()
            store = IndexStore.open(target, write=True)
        if not store.model.same_space(space.model):
            raise _other_space(target, store.model, space.model)
        if store.settings.get("item_vectors") == "fused":
            raise IndexMismatchError(
                target, expected="an index with a vector of its own for each picture", got="fused item vectors",
                do="Choose another --out.",
            )  # fmt: skip
    except BaseException:
        store.close()
        raise
    return store


def may_be_named(settings: Mapping[str, Any], model: ModelIdentity, space: Space) -> bool:
    """Whether an index of that setting and model may be said to be of `space`: it is of a space without a model."""
    named = not (space.source or "").startswith(UNNAMED)
    return named and str(settings.get("model")).startswith(UNNAMED) and model.dim == space.model.dim


def _other_space(target: str, has: ModelIdentity, got: ModelIdentity) -> IndexMismatchError:
    def shown(model: ModelIdentity) -> str:
        return f"{model.name} (weights {model.weights[:12]}, d = {model.dim})"

    return IndexMismatchError(
        target,
        expected=f"vectors of {shown(has)}",
        got=f"those of {shown(got)}",
        do="Leave --model and --space out if they are the same after all, or choose another --out.",
    )

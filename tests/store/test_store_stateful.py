"""Any sequence of batches, crashes, compactions and searches against a dict that does the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_kit import Disk, PlainDerived, create, numbers, skip, source, unit, upsert

from mmsearch.index.derived import neighbours
from mmsearch.store import Batch, IndexStore, ItemState, Move, Upsert
from mmsearch.types import Modality

NAMES = st.sampled_from("abcdef")
SEEDS = st.integers(0, 20)


class Killed(BaseException):
    """Stands for the end of the process."""


class Fuse(Disk):
    """Ends the 'process' after so many operations."""

    left: int | None = None

    def step(self, operation: str, path: str) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class StoreAgainstDict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = tempfile.mkdtemp(prefix="mmsearch-test-", dir=shared if shared.is_dir() else None)
        self.path = str(Path(self.folder, "index"))
        self.model: dict[str, object] = {}

    @initialize()
    def make(self) -> None:
        self.disk = Fuse()
        self.store = create(self.path, disk=self.disk)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def commit(self, batch: Batch, after: dict[str, object], fuse: int | None) -> None:
        """Commit; with a fuse the process may end on the way, and either outcome is right."""
        self.disk.left = fuse
        try:
            self.store.commit(batch)
            self.model = after
        except Killed:
            self.reopen()
            found = self.read()
            assert found in (self.model, after)
            self.model = found
        self.disk.left = None

    def reopen(self) -> None:
        self.store.close()
        self.disk = Fuse()
        self.store = IndexStore.open(self.path, write=True, disk=self.disk)

    def read(self) -> dict[str, object]:
        found: dict[str, object] = {}
        with IndexStore.open(self.path) as store, store.snapshot() as snapshot:
            for known in snapshot.items(state=None):
                if known.state is ItemState.SKIPPED:
                    found[known.name] = None
                    continue
                image = snapshot.vectors(snapshot.rows_of(known.id, Modality.IMAGE))
                seed = next(s for s in range(21) if np.abs(image[0] - unit(s)).max() < 2e-3)
                texts = snapshot.vectors(snapshot.rows_of(known.id, Modality.TEXT))
                for i, text in enumerate(texts):
                    assert np.abs(text - unit(seed + 1000 + i)).max() < 2e-3
                found[known.name] = (seed, len(texts))
        return found

    FUSE = st.none() | st.integers(0, 6)

    @rule(items=st.dictionaries(NAMES, st.tuples(SEEDS, st.integers(0, 2)), min_size=1, max_size=4), fuse=FUSE)
    def put(self, items, fuse):
        batch = Batch(upserts=[upsert(n, seed, captions=["c"] * m) for n, (seed, m) in items.items()])
        self.commit(batch, {**self.model, **items}, fuse)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), fuse=FUSE)
    def remove(self, data, fuse):
        gone = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1))
        n = numbers(self.store)
        after = {name: value for name, value in self.model.items() if name not in gone}
        self.commit(Batch(removals=[n[name] for name in gone]), after, fuse)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), fuse=FUSE)
    def move(self, data, fuse):
        names = sorted(self.model)
        olds = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        news = data.draw(st.lists(NAMES, min_size=len(olds), max_size=len(olds), unique=True))
        n = numbers(self.store)
        after = {name: value for name, value in self.model.items() if name not in olds and name not in news}
        after |= {new: self.model[old] for old, new in zip(olds, news, strict=True)}
        moves = [Move(n[old], source(new)) for old, new in zip(olds, news, strict=True)]
        self.commit(Batch(moves=moves), after, fuse)

    @rule(name=NAMES, fuse=FUSE)
    def spoil(self, name, fuse):
        self.commit(Batch(skips=[skip(name)]), {**self.model, name: None}, fuse)

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data(), name=NAMES, fuse=FUSE)
    def copy(self, data, name, fuse):
        original = data.draw(st.sampled_from(sorted(n for n, value in self.model.items() if value)))
        item = Upsert(source(name), image_from=numbers(self.store)[original])
        self.commit(Batch(upserts=[item]), {**self.model, name: (self.model[original][0], 0)}, fuse)

    @rule(fuse=FUSE)
    def tidy_up(self, fuse):
        self.disk.left = fuse
        try:
            self.store.compact(share=0.1, at_least=1)
            self.store.update_derived(PlainDerived())
        except Killed:
            self.reopen()
        self.disk.left = None

    @rule()
    def crash_and_reopen(self):
        self.reopen()

    @rule(seed=SEEDS, k=st.integers(1, 8))
    def search(self, seed, k):
        with self.store.snapshot() as snapshot:
            scores, rows = neighbours(snapshot, Modality.IMAGE).search(unit(seed)[None], k)
            found = [one.item.path.rsplit("/")[-1] for one in snapshot.locate([r for r in rows[0] if r >= 0])]
        living = {name: value[0] for name, value in self.model.items() if value}
        right = sorted((float(unit(seed) @ unit(s)) for s in living.values()), reverse=True)[:k]
        np.testing.assert_allclose(scores[0][: len(right)], right, atol=3e-3)
        assert len(found) == min(k, len(living)) == len(set(found))
        assert set(found) <= set(living)

    @invariant()
    def the_same_items_are_there(self):
        if hasattr(self, "store"):
            assert self.read() == self.model
            assert self.store.verify() == []


StoreAgainstDict.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_history_equals_that_of_a_dict = StoreAgainstDict.TestCase

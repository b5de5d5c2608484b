"""Any history of adding, replacing, deleting, compacting, growing, crashing and reopening, with an approximate index,
against a dict that does the same."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

sys.path[:0] = [str(Path(__file__).parent / "store")]
from store_kit import Disk, create, numbers, source, unit, upsert  # noqa: E402

from mmsearch.derived_maker import IndexMaker  # noqa: E402
from mmsearch.index.approximate import ApproximateIndex, Parameters  # noqa: E402
from mmsearch.index.derived import neighbours  # noqa: E402
from mmsearch.store import Batch, IndexStore, Move  # noqa: E402
from mmsearch.types import Modality  # noqa: E402

NAMES = [f"n{i:02}" for i in range(40)]
KINDS = ["IVF4,Flat", "IVF4,SQ8", "HNSW8,SQfp16", "auto"]


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


class IndexAgainstDict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = tempfile.mkdtemp(prefix="mmsearch-test-", dir=shared if shared.is_dir() else None)
        self.path = str(Path(self.folder, "index"))
        self.model: dict[str, int] = {}

    @initialize(kind=st.sampled_from(KINDS))
    def make(self, kind) -> None:
        self.disk, self.kind = Fuse(), kind
        self.store = create(self.path, disk=self.disk)
        self.model = {name: i for i, name in enumerate(NAMES[:16])}
        self.store.commit(Batch(upserts=[upsert(name, seed) for name, seed in self.model.items()]))
        self.derive(None)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def reopen(self) -> None:
        self.store.close()
        self.disk = Fuse()
        self.store = IndexStore.open(self.path, write=True, disk=self.disk)

    @rule(items=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 99), min_size=1, max_size=8))
    def put(self, items):
        self.store.commit(Batch(upserts=[upsert(name, seed) for name, seed in items.items()]))
        self.model |= items

    @precondition(lambda self: len(self.model) > 6)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1, max_size=5))
        known = numbers(self.store)
        self.store.commit(Batch(removals=[known[name] for name in gone]))
        self.model = {name: seed for name, seed in self.model.items() if name not in gone}

    @rule(data=st.data())
    def move(self, data):
        old, new = data.draw(st.sampled_from(sorted(self.model))), data.draw(st.sampled_from(NAMES))
        self.store.commit(Batch(moves=[Move(numbers(self.store)[old], source(new))]))
        self.model[new] = self.model.pop(old)

    @rule(fuse=st.none() | st.integers(0, 8), anew=st.booleans())
    def derive(self, fuse, anew=False):
        self.disk.left = fuse
        try:
            self.store.update_derived(IndexMaker(self.kind, anew=anew))
        except Killed:
            self.reopen()
        self.disk.left = None

    @rule(fuse=st.none() | st.integers(0, 8))
    def compact(self, fuse):
        self.disk.left = fuse
        try:
            self.store.compact(share=0.05, at_least=1)
        except Killed:
            self.reopen()
        self.disk.left = None

    @rule()
    def crash_and_reopen(self):
        self.reopen()

    @rule(seed=st.integers(0, 99), k=st.integers(1, 50))
    def search(self, seed, k):
        with self.store.snapshot() as snapshot:
            index = neighbours(snapshot, Modality.IMAGE, small=0, few=0)
            for _, part in index._parts:
                if isinstance(part, ApproximateIndex):  # every list, every node: what is tested is which rows there are
                    part.parameters = Parameters(probes=4, effort=400, factor=100)
            scores, rows = index.search(unit(seed)[None], k)
            found = [one.item.path.rsplit("/")[-1] for one in snapshot.locate([r for r in rows[0] if r >= 0])]
        right = sorted((float(unit(seed) @ unit(s)) for s in self.model.values()), reverse=True)[:k]
        assert len(found) == len(set(found)) == len(right)
        assert set(found) <= set(self.model)
        np.testing.assert_allclose(scores[0][: len(right)], right, atol=4e-3)
        real = [float(unit(seed) @ unit(self.model[name])) for name in found]
        np.testing.assert_allclose(real, right, atol=4e-3)

    @invariant()
    def nothing_is_damaged(self):
        if hasattr(self, "store"):
            assert self.store.verify() == []


IndexAgainstDict.TestCase.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_history_answers_as_a_dict_would = IndexAgainstDict.TestCase

"""The plan of an epoch: what meets in a batch, how often, and that it is the same again."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.train.batches import Draw, batches_in_epoch, numbered, plan_epoch
from mmsearch.types import Pair


def pairs(count: int, *, groups: int = 0, captions: int = 1) -> list[Pair]:
    """`count` pictures of as many groups, or of `groups` in turn."""
    texts = tuple(f"c{i}" for i in range(captions))
    return [Pair(f"{i}", texts, f"g{i % groups if groups else i}") for i in range(count)]


def plan(some: list[Pair], repeats: int = 1, **options) -> list[list[Draw]]:
    return plan_epoch(some, [repeats] * len(some), **{"batch_size": 8, "seed": 0, "epoch": 0, **options})


def rows(batches: list[list[Draw]]) -> list[list[int]]:
    return [[draw.row for draw in batch] for batch in batches]


def meetings(some: list[Pair], batches: list[list[Draw]]) -> int:
    """Draws whose group is in their batch already."""
    return sum(len(batch) - len({some[draw.row].group for draw in batch}) for batch in batches)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    repeats=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
    hard=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_comes_as_often_as_it_should(sizes, repeats, batch_size, epoch, hard):
    """But for what does not fill a batch; batches are full, and there are as many as `batches_in_epoch` says."""
    some = [Pair(f"{g}/{i}", ("a", "b"), f"{g}") for g, size in enumerate(sizes) for i in range(size)]
    near = np.random.default_rng(0).integers(-1, len(some), (len(some), 3)) if hard else None
    found = plan(some, repeats, batch_size=batch_size, epoch=epoch, neighbours=near)
    total = len(some) * repeats
    assert len(found) == batches_in_epoch([repeats] * len(some), batch_size)
    assert {len(batch) for batch in found} == {min(batch_size, total)}
    counts = Counter(draw.row for batch in found for draw in batch)
    assert max(counts.values()) <= repeats
    assert sum(counts.values()) == len(found) * min(batch_size, total)


def test_a_plan_is_a_function_of_seed_and_epoch():
    """The same twice; another for another seed or epoch."""
    some = pairs(40, captions=5)
    assert plan(some, seed=3, epoch=2) == plan(some, seed=3, epoch=2)
    others = [plan(some, seed=3, epoch=2), plan(some, seed=3, epoch=1), plan(some, seed=2, epoch=3)]
    assert others[0] != others[1] != others[2] != others[0]


def test_a_plan_may_have_any_seed():
    """Also a negative one, or one of many digits."""
    assert plan(pairs(9), seed=-1) != plan(pairs(9), seed=2**62)


def test_repeats_differ_from_pair_to_pair():
    """A small data set beside a large one."""
    found = plan_epoch(pairs(6), [1, 1, 1, 1, 4, 4], batch_size=4, seed=0, epoch=0)
    counts = Counter(draw.row for batch in found for draw in batch)
    assert counts == {0: 1, 1: 1, 2: 1, 3: 1, 4: 4, 5: 4}


def test_what_does_not_fill_a_batch_is_another_remainder_each_epoch():
    """No pair is left out for good."""
    left = {frozenset(range(10)) - {row for batch in rows(plan(pairs(10), epoch=e)) for row in batch} for e in range(9)}
    assert all(len(one) == 2 for one in left)
    assert len(left) > 3


def test_fewer_pairs_than_a_batch_are_one_batch():
    """All of them, once."""
    (only,) = rows(plan(pairs(5)))
    assert sorted(only) == [0, 1, 2, 3, 4]


def test_captions_come_in_turn_from_a_random_one():
    """Three draws of five captions are three captions; over epochs each caption comes as often as the others."""
    some = pairs(32, captions=5)
    seen: Counter[int] = Counter()
    for epoch in range(20):
        taken: dict[int, list[int]] = {}
        for draw in (draw for batch in plan(some, 3, epoch=epoch) for draw in batch):
            taken.setdefault(draw.row, []).append(draw.caption)
            seen[draw.caption] += 1
        assert all(len(set(captions)) == 3 for captions in taken.values())
    assert set(seen) == {0, 1, 2, 3, 4}
    assert max(seen.values()) < 1.3 * min(seen.values())


def test_views_differ_between_draws():
    """Seeds are as good as unique, also for the draws of one pair."""
    seeds = [draw.seed for batch in plan(pairs(100), 4) for draw in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("count", "groups"), [(400, 400), (400, 100), (400, 40), (403, 16)])
def test_a_group_is_not_twice_in_a_batch(count, groups, repeats):
    """As long as there are enough groups to choose from."""
    some = pairs(count, groups=groups)
    for epoch in range(3):
        assert meetings(some, plan(some, repeats, epoch=epoch)) == 0


def test_large_groups_beside_small_ones_do_not_meet_themselves():
    """Where the places that they want crowd by chance, a draw waits for the next batch."""
    sizes = [6, 1, 1, 1, 1, 1, 1] * 5  # seven batches of eight
    some = [Pair(f"{g}/{i}", ("a",), f"g{g}") for g, size in enumerate(sizes) for i in range(size)]
    assert sum(meetings(some, plan(some, epoch=epoch)) for epoch in range(20)) == 0


def test_a_group_with_too_many_draws_is_spread_evenly():
    """Half of all pictures in one group: no batch is full of it."""
    some = [*pairs(200, groups=1), *(Pair(f"x{i}", ("a",), f"x{i}") for i in range(200))]
    found = plan(some, batch_size=10)
    shares = [sum(some[draw.row].group == "g0" for draw in batch) for batch in found]
    assert max(shares) <= 9
    assert min(shares) >= 1


def test_pairs_meet_others_in_the_next_round():
    """With three repeats, the second batch of a pair is not the first one again."""
    met: dict[int, list[set[int]]] = {}
    for batch in rows(plan(pairs(240), 3)):
        for row in batch:
            met.setdefault(row, []).append(set(batch) - {row})
    again = [len(first & second) for first, second, _ in met.values()]
    assert sum(again) / len(again) < 1.0  # of 7; by chance 7 * 7 / 239 = 0.2


def twins(count: int) -> np.ndarray:
    """(n, 1): 0 and 1 are each other's neighbours, 2 and 3, ..."""
    return (np.arange(count) ^ 1)[:, None].astype(np.int64)


def test_mined_neighbours_are_in_the_batch():
    """Half of each batch, until those to come are used up; without them twins hardly meet."""
    some = pairs(64)

    def together(batches) -> int:
        return sum((row ^ 1) in batch for batch in rows(batches) for row in batch)

    assert together(plan(some, neighbours=twins(64))) >= 56  # two of the random half may be twins already
    assert together(plan(some, neighbours=twins(64), hard_share=0.25)) < 50
    assert together(plan(some)) < 24
    assert together(plan(some, neighbours=twins(64), hard_share=0.0)) == together(plan(some))


def test_neighbours_of_the_own_group_or_none_are_passed_over():
    """-1 pads; a picture of the same group is no negative."""
    some = pairs(64, groups=32)
    near = np.full((64, 2), -1, np.int64)
    near[:, 0] = (np.arange(64) + 32) % 64
    assert meetings(some, plan(some, neighbours=near)) == 0


def test_another_neighbour_is_taken_each_epoch():
    """Of the ones that were mined: not always the nearest."""
    near = np.full((64, 6), -1, np.int64)
    near[0] = range(1, 7)
    found = [plan(pairs(64), neighbours=near, epoch=epoch, batch_size=2) for epoch in range(40)]
    partners = [batch[1] for batches in found for batch in rows(batches) if batch[0] == 0]
    assert {1, 2, 3, 4, 5, 6} <= set(partners)


def test_fifty_thousand_pairs_are_planned_in_no_time():
    """Half a second of CPU on an idle machine; the bound leaves room for a busy one."""
    some = pairs(50_000)
    began = time.process_time()
    plan(some, batch_size=512)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"hard_share": 1.5}, {"neighbours": np.zeros((3, 2), np.int64)}, {"repeats": [1]}]
)
def test_numbers_that_do_not_fit_together_are_refused(options):
    """Rather than a plan that means something else."""
    facts = {"repeats": [1] * 4, "batch_size": 2, "seed": 0, "epoch": 0, **options}
    with pytest.raises(UsageError):
        plan_epoch(pairs(4), facts.pop("repeats"), **facts)


def test_names_are_numbered_in_the_order_they_appear():
    """Equal numbers for equal names, and none for none."""
    assert numbered(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert numbered([]).shape == (0,)


# One source a batch


def sources(*sizes: int) -> tuple[list[Pair], list[int]]:
    """Pairs of as many sources, not sorted by it, and the source of each."""
    origins = np.repeat(np.arange(len(sizes)), sizes)
    return pairs(len(origins)), np.random.default_rng(1).permutation(origins).tolist()


def test_a_batch_is_of_one_source():
    """All of them, spread over the whole epoch, and as many as are foretold."""
    some, origins = sources(40, 83)
    found = plan(some, origins=origins)
    assert len(found) == batches_in_epoch([1] * len(some), 8, origins=origins) == 5 + 10
    kinds = [{origins[row] for row in batch} for batch in rows(found)]
    assert {len(kind) for kind in kinds} == {1}
    assert len({row for batch in rows(found) for row in batch}) == 5 * 8 + 10 * 8
    firsts = [number for number, kind in enumerate(kinds) if kind == {0}]
    assert all(2 <= late - early <= 4 for early, late in itertools.pairwise(firsts))


def test_a_source_too_small_for_a_batch_has_one_of_its_own():
    """It is not left out, and not mixed with another."""
    some, origins = sources(3, 40)
    found = plan(some, origins=origins)
    assert sorted(len(batch) for batch in found) == [3, 8, 8, 8, 8, 8]


def test_one_source_alone_is_planned_as_ever():
    """Whether it may be mixed with others or not."""
    some = pairs(40)
    assert plan(some, origins=[0] * 40) == plan(some)


def test_hard_negatives_stay_in_their_source():
    """A neighbour from elsewhere does not count; one from here is pulled forward."""
    some, origins = sources(64, 64)
    own = [[row for row in range(128) if origins[row] == kind] for kind in (0, 1)]
    near = np.array([[own[1 - origins[row]][0], own[origins[row]][0]] for row in range(128)])
    found = plan(some, origins=origins, neighbours=near, batch_size=16)
    assert all(len({origins[row] for row in batch}) == 1 for batch in rows(found))
    for kind in (0, 1):
        first = next(batch for batch in rows(found) if origins[batch[0]] == kind)
        assert own[kind][0] in first


def test_origins_of_other_pairs_are_refused():
    """One each."""
    with pytest.raises(UsageError, match="origins"):
        plan(pairs(10), origins=[0] * 9)

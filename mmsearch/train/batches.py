"""The plan of an epoch: which pictures meet in which batch, with which caption, seen through which random view.

Decisions:
- A plan is a function of its arguments alone. A run that was killed makes the same plan again, and so does every rank.
- The draws of one group are spread over the epoch: with m of them, one falls into each m-th of it, at a random place
  that keeps two of them more than a batch apart. Where that fails by chance, a draw waits for the next batch; of a
  group that has more draws than there are batches none waits, since they would all meet in the last ones.
- A pair that comes several times takes its captions in turn, from a random one on.
- Mined negatives are pulled forward, not added: every pair still comes as often as it should, and an epoch is no
  longer than without them. Late in an epoch most of them have been used, and its batches are nearly random again.
- Batches of one source each (`origins`) are planned apart and dealt evenly over the epoch. Pictures of two collections
  are told apart by their look and the way they are captioned, so in a mixed batch half of the rivals are no rivals.
- Draws that do not fill a batch are left out (others in each epoch): a small batch has few negatives, and so a loss of
  its own size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.types import Pair

Ints: TypeAlias = NDArray[np.int64]

_APART = 2.0
_VIEWS = 2**31
_ANY = -1


@dataclass(frozen=True, slots=True)
class Draw:
    """One place in a batch: `row` of the pairs, `caption` of that pair, `seed` of the random view and word drop."""

    row: int
    caption: int
    seed: int


def batches_in_epoch(repeats: Sequence[int], batch_size: int, *, origins: Sequence[int] | None = None) -> int:
    """How many batches `plan_epoch` plans: full ones, or a single smaller one. Known value: 10 draws by 4 are 2."""
    return sum(max(1, sum(repeats[i] for i in part) // batch_size) for part in _parts(len(repeats), origins))


def _parts(count: int, origins: Sequence[int] | None) -> list[list[int]]:
    """Rows 0..count-1 by their origin, in the order of its number; all in one part without origins."""
    if origins is None:
        return [list(range(count))]
    parts: dict[int, list[int]] = {}
    for row, origin in enumerate(origins):
        parts.setdefault(origin, []).append(row)
    return [parts[origin] for origin in sorted(parts)]


def plan_epoch(
    pairs: Sequence[Pair],
    repeats: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    neighbours: Ints | None = None,
    hard_share: float = 0.5,
    origins: Sequence[int] | None = None,
) -> list[list[Draw]]:
    """Batches of exactly `batch_size` draws; one smaller batch where there are fewer draws than that.

    Pair i is drawn `repeats[i]` times, but for the fewer than `batch_size` draws that are left out. A group comes twice
    in a batch only where it has more draws than there are batches, or where the last batches leave no choice.
    `neighbours`: (n, k) int64, rows of pairs that are hard negatives of pair i, -1 for none. Of each batch,
    `hard_share` (0..1) of the places go to neighbours of its other draws, as far as they have draws left.
    `origins`: of each pair; all draws of a batch are then of one origin. None: whatever comes meets.

    Raises `UsageError` when the numbers do not fit together.
    """
    _check(pairs, repeats, batch_size=batch_size, neighbours=neighbours, hard_share=hard_share, origins=origins)
    parts = _parts(len(pairs), origins)
    if len(parts) > 1:
        plans = [
            _plan_part(
                part, pairs, repeats, batch_size=batch_size, seed=[seed & (2**63 - 1), epoch, number],
                neighbours=neighbours, hard_share=hard_share,
            )
            for number, part in enumerate(parts)
        ]  # fmt: skip
        return _dealt(plans)
    return _plan(
        pairs, repeats, batch_size=batch_size, seed=[seed & (2**63 - 1), epoch], neighbours=neighbours,
        hard_share=hard_share,
    )  # fmt: skip


def _plan_part(
    part: Sequence[int], pairs: Sequence[Pair], repeats: Sequence[int], *, batch_size: int, seed: Sequence[int],
    neighbours: Ints | None, hard_share: float,
) -> list[list[Draw]]:  # fmt: skip
    """The batches of the rows in `part` alone; neighbours outside of it do not count."""
    near = None
    if neighbours is not None:
        places = np.full(len(pairs) + 1, -1, np.int64)  # the last is where -1 points
        places[list(part)] = np.arange(len(part))
        near = places[neighbours[list(part)]]
    plan = _plan(
        [pairs[i] for i in part], [repeats[i] for i in part], batch_size=batch_size, seed=seed, neighbours=near,
        hard_share=hard_share,
    )  # fmt: skip
    return [[Draw(part[draw.row], draw.caption, draw.seed) for draw in batch] for batch in plan]


def _dealt(plans: Sequence[list[list[Draw]]]) -> list[list[Draw]]:
    """All batches of all plans, those of each one evenly over the whole."""
    places = [((j + 0.5) / len(plan), i, j) for i, plan in enumerate(plans) for j in range(len(plan))]
    return [plans[i][j] for _, i, j in sorted(places)]


def _plan(
    pairs: Sequence[Pair], repeats: Sequence[int], *, batch_size: int, seed: Sequence[int], neighbours: Ints | None,
    hard_share: float,
) -> list[list[Draw]]:  # fmt: skip
    """As `plan_epoch`, for one part; `seed`: of its random numbers."""
    random = np.random.default_rng(seed)
    groups = numbered(pair.group for pair in pairs)
    rows = np.repeat(np.arange(len(pairs)), repeats)  # (N,) the row of each draw
    captions = _captions(pairs, repeats, random)
    seeds = random.integers(0, _VIEWS, len(rows))
    order = np.argsort(_places(groups[rows], batch_size=batch_size, random=random), kind="stable")
    count = batches_in_epoch(repeats, batch_size)
    too_many = np.bincount(groups[rows], minlength=len(pairs)) > count
    apart = np.where(too_many[groups[rows]], _ANY, groups[rows])
    stream = _Stream(order.tolist(), groups=apart.tolist(), batch_size=batch_size)
    if neighbours is not None and hard_share > 0:
        near = random.permuted(neighbours, axis=1)
        stream.pull(rows, near, places=min(batch_size - 1, round(hard_share * batch_size)))
    draws = [Draw(*facts) for facts in zip(rows.tolist(), captions.tolist(), seeds.tolist(), strict=True)]
    return [[draws[i] for i in batch] for batch in stream.batches(count)]


def _check(
    pairs: Sequence[Pair], repeats: Sequence[int], *, batch_size: int, neighbours: Ints | None, hard_share: float,
    origins: Sequence[int] | None,
) -> None:  # fmt: skip
    if batch_size < 1:
        raise UsageError("batch_size", expected="1 or more", got=str(batch_size))
    if not 0.0 <= hard_share <= 1.0:
        raise UsageError("hard_share", expected="0..1", got=str(hard_share))
    if len(repeats) != len(pairs):
        raise UsageError("repeats", expected=f"{len(pairs)}, one a pair", got=str(len(repeats)))
    if origins is not None and len(origins) != len(pairs):
        raise UsageError("origins", expected=f"{len(pairs)}, one a pair", got=str(len(origins)))
    if neighbours is not None and (neighbours.ndim != 2 or len(neighbours) != len(pairs)):
        raise UsageError("neighbours", expected=f"({len(pairs)}, k)", got=str(neighbours.shape))


def numbered(names: Iterable[str]) -> Ints:
    """(n,) a number for each name, equal for equal names, in the order in which they appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _captions(pairs: Sequence[Pair], repeats: Sequence[int], random: np.random.Generator) -> Ints:
    """(N,) which caption each draw takes: draw j of a pair with c captions takes (start + j) mod c."""
    counts = np.array([len(pair.captions) for pair in pairs], dtype=np.int64)
    start = random.integers(0, np.maximum(counts, 1))
    taken: Ints = (np.repeat(start, repeats) + _turn(np.asarray(repeats, np.int64))) % np.repeat(counts, repeats)
    return taken


def _turn(counts: Ints) -> Ints:
    """(k,) counts -> (sum,) 0, 1, ... counts[0]-1, 0, 1, ..."""
    ends = np.cumsum(counts)
    turns: Ints = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    return turns


def _places(groups: Ints, *, batch_size: int, random: np.random.Generator) -> NDArray[np.float64]:
    """(N,) groups of the draws -> (N,) where in the epoch each one wants to come, in [0, 1)."""
    total = len(groups)
    members = np.bincount(groups)  # m of each group
    by_group = np.argsort(groups, kind="stable")
    parts = np.empty(total, np.int64)
    parts[by_group] = _turn(members)  # which m-th of the epoch
    parts = _shuffled_within(parts, by_group, members, random)
    count = members[groups]
    apart = np.minimum(1.0, _APART * batch_size * count / max(total, 1))  # share of its part that stays empty
    phase = random.random(len(members))[groups]
    wanted: NDArray[np.float64] = (parts + phase + (1.0 - apart) * random.random(total)) / count % 1.0
    return wanted


def _shuffled_within(parts: Ints, by_group: Ints, members: Ints, random: np.random.Generator) -> Ints:
    """The parts of each group dealt to its draws anew, so that no pair of a group always comes first."""
    keys = random.random(len(parts))
    owners = np.repeat(np.arange(len(members)), members)
    shuffled = np.empty_like(parts)
    shuffled[by_group[np.lexsort((keys[by_group], owners))]] = parts[by_group]
    return shuffled


class _Stream:
    """Draws in the order they should come, cut into batches; those that must not meet wait for a later one.

    `groups`: of each draw; those of `_ANY` may meet.
    """

    def __init__(self, order: list[int], *, groups: list[int], batch_size: int) -> None:
        self._groups, self._batch_size = groups, batch_size
        self._rest = iter(order)
        self._waiting: deque[int] = deque()
        self._used = bytearray(len(order))
        self._hard = 0
        self._rows: list[int] = []
        self._near: list[list[int]] = []
        self._left: list[list[int]] = []

    def pull(self, rows: Ints, near: Ints, *, places: int) -> None:
        """Give `places` of each batch to neighbours (`near`: (n, k) rows) of its other draws (`rows`: of each draw)."""
        self._hard, self._rows, self._near = places, rows.tolist(), near.tolist()
        self._left = [[] for _ in self._near]
        for draw, row in enumerate(self._rows):
            self._left[row].append(draw)

    def batches(self, count: int) -> Iterator[list[int]]:
        """`count` batches of draws."""
        for _ in range(count):
            batch: list[int] = []
            present: set[int] = set()
            self._fill(batch, present, upto=self._batch_size - self._hard)
            if self._hard:
                self._fill_hard(batch, present)
                self._fill(batch, present, upto=self._batch_size)
            yield batch

    def _fill(self, batch: list[int], present: set[int], *, upto: int) -> None:
        """Take the next draws of groups that are not `present`; after a batch of refusals, whatever comes."""
        passed: list[int] = []
        while len(batch) < upto:
            draw = self._waiting.popleft() if self._waiting else next(self._rest, None)
            if draw is None:
                break
            if self._used[draw]:
                continue
            if self._groups[draw] in present and len(passed) < self._batch_size:
                passed.append(draw)
            else:
                self._take(draw, batch, present)
        while passed and len(batch) < upto:  # nothing else is left
            self._take(passed.pop(0), batch, present)
        self._waiting.extendleft(reversed(passed))

    def _fill_hard(self, batch: list[int], present: set[int]) -> None:
        """One neighbour of each draw in turn, then a second one, until the hard places are taken."""
        drawn = [iter(self._near[self._rows[draw]]) for draw in batch]
        while drawn and len(batch) < self._batch_size:
            going_on = []
            for neighbours in drawn:
                if len(batch) == self._batch_size:
                    return
                found = next((d for row in neighbours if (d := self._unused(row, present)) is not None), None)
                if found is not None:
                    self._take(found, batch, present)
                    going_on.append(neighbours)
            drawn = going_on

    def _unused(self, row: int, present: set[int]) -> int | None:
        """A draw of `row` that is still to come and whose group is not in the batch."""
        left = self._left[row] if row >= 0 else []
        while left and self._used[left[-1]]:
            left.pop()
        return left[-1] if left and self._groups[left[-1]] not in present else None

    def _take(self, draw: int, batch: list[int], present: set[int]) -> None:
        self._used[draw] = 1
        batch.append(draw)
        if self._groups[draw] != _ANY:
            present.add(self._groups[draw])

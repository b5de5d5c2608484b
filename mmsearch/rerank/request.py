"""What a search asks of the second stage, checked once. No numpy, no torch: the command line makes one."""

from __future__ import annotations

from dataclasses import dataclass

from mmsearch.errors import UsageError

AUTO = "auto"
OFF = "off"
MAX_DEPTH = 1000
"""Candidates of one query that a second stage may read at most."""
AUTO_DEPTH = 64
"""What "auto" re-ranks where it re-ranks."""


@dataclass(frozen=True, slots=True)
class Rerank:
    """How far and how strictly to re-rank.

    `depth`: how many of the first stage's best compete, 1..1000; 0 for none; "auto" for 64 where the model has a
    re-ranker and the index nearly all their tokens, else none. Never fewer than the hits asked for compete.
    `min_probability`: in (0, 1], only hits that match with at least that probability. `cut`: "auto" shows nothing where
    nothing seems to match. `budget_ms`: the time of the second stage in milliseconds; see `second_stage`.
    Raises `UsageError` for other values, and for conditions on probabilities without re-ranking.
    """

    depth: int | str = AUTO
    min_probability: float | None = None
    cut: str | None = None
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        depth = self.depth
        if depth != AUTO and (type(depth) is not int or not 0 <= depth <= MAX_DEPTH):
            raise UsageError("rerank", expected=f"0 to {MAX_DEPTH}, {AUTO} or {OFF}", got=str(depth)[:60])
        if self.min_probability is not None and not 0.0 < self.min_probability <= 1.0:  # also true for NaN
            raise UsageError("min probability", expected="above 0, at most 1", got=str(self.min_probability))
        if self.cut not in (None, AUTO):
            raise UsageError("cut", expected=f"{AUTO} or nothing", got=str(self.cut)[:60])
        if self.budget_ms is not None and not 0.0 < self.budget_ms < float("inf"):
            raise UsageError("budget", expected="milliseconds, more than 0", got=str(self.budget_ms))
        if not depth and self.needs_probabilities:
            raise no_probabilities("re-ranking is off", do="Leave --rerank auto, or name a depth: --rerank 64.")

    @property
    def needs_probabilities(self) -> bool:
        """Whether hits are left out by what only a second stage knows: then there must be one."""
        return self.min_probability is not None or self.cut is not None

    @property
    def is_auto(self) -> bool:
        """Whether it may be left out where it would cost time or is not there."""
        return self.depth == AUTO

    def competing(self, k: int) -> int:
        """How many candidates compete for `k` hits: the depth, and never fewer than k."""
        return max(AUTO_DEPTH if isinstance(self.depth, str) else self.depth, k)


def depth_of(words: str) -> int | str:
    """A depth as it is written on a command line: "auto", "off" or a number. Raises `UsageError`."""
    if words == AUTO:
        return AUTO
    if words == OFF:
        return 0
    if not (words.isascii() and words.isdigit()):
        raise UsageError("rerank", expected=f"0 to {MAX_DEPTH}, {AUTO} or {OFF}", got=repr(words)[:60])
    return int(words[:9])


def no_probabilities(got: str, *, do: str) -> UsageError:
    """The error of a search that asks for probabilities where there are none."""
    return UsageError("min probability and cut", expected="a search that is re-ranked", got=got, do=do)


STORE_TOKENS = "Store what is needed once, mmsearch index --tokens, or name a depth: --rerank 64."
"""What to do where "auto" lacks patch tokens."""


def asked_for(wish: Rerank | int | str) -> Rerank:
    """A depth, also in words ("auto", "off"), as a checked `Rerank`; one that is one already is left as it is."""
    if isinstance(wish, Rerank):
        return wish
    return Rerank(depth_of(wish) if isinstance(wish, str) else wish)

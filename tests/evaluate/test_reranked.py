"""Ranks after a second stage, against a dumb sort, and the job that measures both stages."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsearch.errors import UsageError
from mmsearch.evaluate.comparison import Verdict
from mmsearch.evaluate.metrics import rank_groups
from mmsearch.evaluate.rerank_eval import evaluate_stages
from mmsearch.evaluate.reranked import Candidates, best_candidates, evaluate_reranked, reranked
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.similarity import normalise
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker

PAIRS = tuple(itertools.combinations(COLORS, 2))


def rows(n: int, *, seed: int, d: int = 6) -> np.ndarray:
    return normalise(np.random.default_rng(seed).normal(size=(n, d)))


def scored(found: Candidates, final: np.ndarray) -> Candidates:
    return Candidates(found.rows, found.cosines, final)


def slow_ranks(queries, candidates, groups, own, *, depth: int, final) -> list[list[int]]:
    """Sort each list by hand: the best `depth` by final score, the others as they were; relevant ones last of ties."""
    ranks = []
    for query, group in zip(queries, groups, strict=True):
        cosines = candidates @ query
        order = sorted(range(len(own)), key=lambda i: (-cosines[i], i))
        head = sorted(order[:depth], key=lambda i: (-final(query, i), own[i] == group, i))
        ranks.append([place for place, i in enumerate(head + order[depth:], 1) if own[i] == group])
    return ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4))
def test_ranks_are_those_of_sorting_each_list_by_hand(seed, depth, kinds):
    """Any depth, ties of final scores included, several relevant candidates a query."""
    random = np.random.default_rng(seed)
    queries, candidates = rows(5, seed=seed), rows(10, seed=seed + 1)
    own, groups = np.arange(10) % 5, np.arange(5)
    first = rank_groups(queries, candidates, query_groups=groups, candidate_groups=own)
    found = best_candidates(queries, candidates, depth)
    table = random.integers(0, kinds, (5, 10)).astype(float)
    final = np.take_along_axis(table, found.rows, axis=1)
    ranks = reranked(first, scored(found, final), query_groups=groups, candidate_groups=own)
    numbers = {q.tobytes(): i for i, q in enumerate(queries)}
    slow = slow_ranks(queries, candidates, groups, own, depth=depth, final=lambda q, i: table[numbers[q.tobytes()], i])
    assert [ranks.ranks[a:b].tolist() for a, b in itertools.pairwise(ranks.starts)] == slow


def test_final_scores_in_the_order_of_the_first_stage_change_nothing():
    """A second stage that agrees is no second stage."""
    queries, candidates, groups = rows(8, seed=1), rows(8, seed=2), np.arange(8)
    first = rank_groups(queries, candidates, query_groups=groups, candidate_groups=groups)
    found = best_candidates(queries, candidates, 5)
    same = reranked(first, scored(found, found.cosines), query_groups=groups, candidate_groups=groups)
    assert np.array_equal(same.ranks, first.ranks)


def test_what_is_no_candidate_keeps_its_rank_and_what_is_can_become_first():
    """Right scores bring every candidate to rank 1; below the depth nothing moves."""
    queries, candidates, groups = rows(20, seed=3), rows(20, seed=4), np.arange(20)
    first = rank_groups(queries, candidates, query_groups=groups, candidate_groups=groups)
    found = best_candidates(queries, candidates, 7)
    right = (found.rows == groups[:, None]).astype(float)
    ranks = reranked(first, scored(found, right), query_groups=groups, candidate_groups=groups).ranks
    assert ((first.ranks <= 7) & (ranks == 1) | (first.ranks > 7) & (ranks == first.ranks)).all()
    assert (first.ranks > 7).any() and (first.ranks <= 7).any()


def test_a_final_score_that_is_alike_for_all_is_the_worst_case():
    """Ties count against the model here as well."""
    queries, candidates, groups = rows(6, seed=5), rows(6, seed=6), np.arange(6)
    first = rank_groups(queries, candidates, query_groups=groups, candidate_groups=groups)
    found = best_candidates(queries, candidates, 6)
    ranks = reranked(first, scored(found, np.zeros((6, 6))), query_groups=groups, candidate_groups=groups).ranks
    assert (ranks == 6).all()


def test_candidates_do_not_depend_on_the_block():
    """A block of queries is a matter of memory; more than there are gives all."""
    queries, candidates = rows(23, seed=7), rows(9, seed=8)
    one, two = (best_candidates(queries, candidates, 4, block=block) for block in (5, 1000))
    assert np.array_equal(one.rows, two.rows) and one.rows.shape == (23, 4)
    assert best_candidates(queries, candidates, 50).rows.shape == (23, 9)
    with pytest.raises(UsageError):
        best_candidates(queries, candidates, 0)


@pytest.mark.parametrize("final", [None, np.zeros((6, 2)), np.full((6, 3), np.nan)])
def test_final_scores_that_are_not_there_are_refused(final):
    """Not read as a low score."""
    queries, groups = rows(6, seed=9), np.arange(6)
    first = rank_groups(queries, queries, query_groups=groups, candidate_groups=groups)
    with pytest.raises(UsageError):
        reranked(
            first, scored(best_candidates(queries, queries, 3), final), query_groups=groups, candidate_groups=groups
        )


def test_both_directions_are_re_ranked():
    """Perfect final scores make hit@1 what the candidates allow."""
    texts, images, groups = rows(12, seed=10), rows(12, seed=11), np.arange(12)
    first = evaluate_rows(texts, images, text_groups=groups, image_groups=groups, model="m")
    ways = [best_candidates(*sides, 12) for sides in ((texts, images), (images, texts))]
    right = [scored(way, (way.rows == groups[:, None]).astype(float)) for way in ways]
    second = evaluate_reranked(first, *right, groups=(groups, groups))
    assert second.text_to_image.values["hit@1"] == second.image_to_text.values["hit@1"] == 1.0
    assert first.text_to_image.values["hit@1"] < 0.5 and second.model == "m, top 12 re-ranked"


def two_colours(folder: Path, *, broken: bool = False) -> Path:
    lines = []
    for left, right in PAIRS:
        image = Image.new("RGB", (16, 16), COLORS[left])
        image.paste(COLORS[right], (8, 0, 16, 16))
        image.save(folder / f"{left}-{right}.png")
        lines += [f"{left}-{right}.png,{left} and {right}", f"{left}-{right}.png,{right} beside {left}"]
    if broken:
        (folder / "red-blue.png").write_bytes(b"nothing")
    (folder / "pairs.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return folder / "pairs.csv"


class Told:
    def __init__(self) -> None:
        self.parts: list[tuple[str, int]] = []
        self.done = 0

    def start(self, total, *, what="", unit=""):
        self.parts.append((what, total))

    def advance(self, n, *, note=""):
        self.done += n

    def note(self, text):
        pass


def test_the_job_measures_both_stages_on_the_same_pairs(tmp_path):
    """What the first stage mixes up the second puts right, and it is more than chance; broken pictures are left out."""
    told = Told()
    path = two_colours(tmp_path, broken=True)
    found = evaluate_stages(
        path, load=lambda: (ColorEncoder(), ColorReranker()), depth=20, workers=1, batch_size=8, progress=told
    )
    assert (found.before.images, found.before.texts, len(found.after.skipped)) == (27, 54, 1)
    for way in ("text_to_image", "image_to_text"):
        change = found.differences[way]["hit@1"]
        assert change.after > 0.9 > change.before and change.verdict is Verdict.RISES
        assert change.low > 0
    assert [what for what, _ in told.parts] == ["", "re-ranking"]
    assert told.done == sum(total for _, total in told.parts)


def test_the_job_gives_what_a_search_would(tmp_path):
    """Blocks and batches change nothing: all pairs at once give the same ranks."""
    path = two_colours(tmp_path)
    ways = [
        evaluate_stages(path, load=lambda: (ColorEncoder(), ColorReranker()), depth=28, workers=1, batch_size=size)
        for size in (5, 64)
    ]
    assert ways[0].after == ways[1].after or np.array_equal(
        ways[0].after.text_to_image.ranked.ranks, ways[1].after.text_to_image.ranked.ranks
    )
    assert ways[0].after.text_to_image.values["hit@1"] == 1.0


class Marks(ColorReranker):
    """Cannot read what begins with green: its numbers are not finite."""

    def read_pixels(self, pixels, *, batch_size=32):
        found = super().read_pixels(pixels)
        found.scales[(pixels[:, 0, 0] == COLORS["green"]).all(axis=1)] = np.nan
        return found


def test_a_picture_whose_patches_are_no_numbers_is_left_out_and_shifts_nothing(tmp_path):
    """The others keep their own patches: the second stage is right about them as before."""
    path = two_colours(tmp_path)
    found = evaluate_stages(path, load=lambda: (ColorEncoder(), Marks()), depth=28, workers=1, batch_size=8)
    assert found.after.images == 22 and all("green-" in one.path for one in found.after.skipped)
    assert found.after.text_to_image.values["hit@1"] == 1.0


@pytest.mark.parametrize("depth", [0, -1, 1001])
def test_a_depth_outside_its_range_is_refused_before_anything_is_loaded(depth):
    """Not after minutes of encoding."""
    with pytest.raises(UsageError, match="--rerank"):
        evaluate_stages("pairs.csv", load=lambda: pytest.fail("loaded"), depth=depth)

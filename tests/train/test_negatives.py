"""Mined hard negatives against the double loop that cannot be wrong, and what must never be mined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.similarity import normalise
from mmsearch.train import negatives
from mmsearch.train.negatives import mine

FEW = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]], np.float32)
"""Unit rows whose products are exact in any order of adding: ties are real ties."""


def unit_rows(n, d=8, *, seed=0):
    return normalise(np.random.default_rng(seed).standard_normal((n, d)))


def numbers(*values):
    return np.array(values, dtype=np.int64)


def dumb_mine(texts, images, *, groups, count, owners=None, skip=0, margin=None):
    """Every pair against every other one, sorted in full."""
    owners = range(len(images)) if owners is None else owners
    found = []
    for i in range(len(images)):
        own_texts = [text for text, owner in zip(texts, owners, strict=True) if owner == i]
        score = [max((float(text @ image) for text in own_texts), default=-9.0) for image in images]
        rivals = [
            j
            for j in sorted(range(len(images)), key=lambda j: (-score[j], j))
            if own_texts and groups[j] != groups[i] and (margin is None or score[j] <= score[i] + margin)
        ]
        rivals = rivals[skip : skip + count]
        found.append(rivals + [-1] * (count - len(rivals)))
    return found


@pytest.mark.parametrize("kind", ["exact", "faiss-flat"])
def test_the_hardest_negative_is_the_nearest_picture_of_another_group(kind):
    """Three pictures on a quarter circle: each caption's nearest other picture comes first."""
    rows = normalise(np.array([[1, 0], [1, 0.5], [0, 1]], float))
    assert mine(rows, rows, groups="abc", count=2, kind=kind).tolist() == [[1, 2], [0, 2], [1, 0]]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pairs=st.integers(1, 12),
    texts=st.integers(0, 25),
    groups=st.integers(1, 12),
    count=st.integers(1, 5),
    skip=st.integers(0, 3),
    margin=st.sampled_from([None, -0.5, 0.0, 0.5]),
    cells=st.sampled_from([1, 7, 1 << 20]),
)
def test_mining_agrees_with_the_full_sort(seed, pairs, texts, groups, count, skip, margin, cells):
    """Ties, several captions or none, large groups, near duplicates, any block size: what sorting everything gives."""
    random = np.random.default_rng(seed)
    images, captions = FEW[random.integers(0, 5, pairs)], FEW[random.integers(0, 5, texts)]
    owners = random.integers(0, pairs, texts)
    names = [f"photo {number}" for number in random.integers(0, groups, pairs)]
    options = {"groups": names, "count": count, "owners": owners, "skip": skip, "margin": margin}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "_CELLS", cells)
        found = mine(captions, images, **options)
    assert found.dtype == np.int64
    assert found.tolist() == dumb_mine(captions, images, **options)


def test_random_rows_agree_with_the_full_sort_in_both_kinds():
    """Forty pairs with three captions each; half-precision FAISS may only swap what is all but equal."""
    texts, images, owners = unit_rows(120), unit_rows(40, seed=1), np.repeat(np.arange(40), 3)
    options = {"groups": np.arange(40) // 2, "count": 5, "owners": owners}
    expected = dumb_mine(texts, images, **options)
    assert mine(texts, images, **options).tolist() == expected
    scores = (texts @ images.T).reshape(40, 3, 40).max(axis=1)
    by_faiss = mine(texts, images, **options, kind="faiss-flat")
    gap = np.take_along_axis(scores, by_faiss, 1) - np.take_along_axis(scores, np.array(expected), 1)
    assert np.abs(gap).max() < 2e-3


def test_a_pair_of_the_same_group_is_never_a_negative():
    """Ten copies of one photo under one name, however near: only the other two are mined, then -1."""
    rows = np.concatenate([np.repeat(unit_rows(1), 10, axis=0), unit_rows(2, seed=1)])
    found = mine(rows, rows, groups=["one"] * 10 + ["two", "three"], count=3)
    assert set(found[:10].ravel().tolist()) == {10, 11, -1}
    assert (found[:10, 2] == -1).all()


def test_a_picture_that_fits_better_than_the_own_one_is_left_out_by_margin():
    """Caption 0 fits picture 1 (cosine 1) better than its own (0.8): a false negative, unless nobody asks."""
    texts = normalise(np.array([[1, 0], [0, 1], [0.6, 0.8]], float))
    images = normalise(np.array([[0.8, 0.6], [1, 0], [0, 1]], float))
    assert mine(texts, images, groups="abc", count=2)[0].tolist() == [1, 2]
    assert mine(texts, images, groups="abc", count=2, margin=0.1)[0].tolist() == [2, -1]
    assert mine(texts, images, groups="abc", count=2, margin=0.3)[0].tolist() == [1, 2]


def test_a_duplicate_seen_by_one_caption_is_left_out_for_all_of_them():
    """Picture 1 is above the limit for caption 0: caption 1, which finds it harmless, does not bring it back."""
    texts = normalise(np.array([[1, 0], [0, 1]], float))
    images = normalise(np.array([[0.6, 0.8], [1, 0.1], [0, -1]], float))
    found = mine(texts, images, groups="abc", count=2, owners=numbers(0, 0), margin=0.0)
    assert found.tolist() == [[2, -1], [-1, -1], [-1, -1]]


def test_a_deeper_answer_takes_back_what_a_shallow_one_let_through():
    """Pictures 1 and 2 hide from caption 0 at first that picture 3 is a near duplicate too; caption 1 named it."""
    texts = normalise(np.array([[1, 0], [0, 1]], float))
    images = normalise(np.array([[0.6, 0.8], [1, 0], [1, 0], [0.9, 0.1]], float))
    assert mine(texts, images, groups="abcd", count=1, owners=numbers(0, 0), margin=0.0)[0].tolist() == [-1]


def test_skip_leaves_out_the_hardest():
    """The first of the list is dropped, the others move up."""
    rows = unit_rows(9)
    whole = mine(rows, rows, groups=range(9), count=4)
    assert mine(rows, rows, groups=range(9), count=3, skip=1).tolist() == whole[:, 1:].tolist()


def test_more_negatives_than_pairs_are_padded():
    """count beyond what is there: -1, never a repeated row."""
    rows = unit_rows(3)
    found = mine(rows, rows, groups=range(3), count=10)
    assert found.shape == (3, 10)
    assert (found[:, 2:] == -1).all()
    assert all(len(set(line[:2])) == 2 for line in found.tolist())


def test_an_answer_is_asked_for_in_pieces(monkeypatch):
    """No search is for more cells than allowed plus one pair's, even where every pair must be asked to the end."""
    rows, asked = unit_rows(60), []

    class Watched(negatives.index_kind("exact")):
        def search(self, queries, k, *, allowed=None):
            asked.append(len(queries) * k)
            return super().search(queries, k, allowed=allowed)

    monkeypatch.setattr(negatives, "index_kind", lambda name: Watched)
    monkeypatch.setattr(negatives, "_CELLS", 120)
    mine(rows, rows, groups=[0] * 59 + [1], count=2)
    assert max(asked) <= 120 + 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "hard negatives"),
        ({"skip": -1}, "hard negatives"),
        ({"groups": "ab"}, "groups"),
        ({"owners": numbers(0, 1)}, "owners"),
        ({"owners": numbers(0, 1, 3)}, "owners"),
        ({"owners": numbers(0, 1, -1)}, "owners"),
        ({"texts": unit_rows(4)}, "owners"),
        ({"texts": unit_rows(3, 5)}, "text rows"),
        ({"texts": 2 * unit_rows(3)}, "text rows"),
        ({"images": 2 * unit_rows(3)}, "image rows"),
        ({"kind": "nonsense"}, "index kind"),
    ],
)
def test_what_cannot_mean_anything_is_refused(options, message):
    """Counts, lengths, rows that are not unit rows, an unknown kind."""
    whole = {"texts": unit_rows(3), "images": unit_rows(3), "groups": "abc", "count": 1, **options}
    with pytest.raises(UsageError, match=message):
        mine(**whole)

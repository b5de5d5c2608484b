"""How rare a candidate is: known values, and what a hub gets."""

import numpy as np
import pytest

from mmsearch.rerank import commonness
from mmsearch.rerank.commonness import SHARPNESS, rarity


def rows(count: int, *, dim: int = 8, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def by_hand(one: np.ndarray, bank: np.ndarray, sharpness: float) -> float:
    powers = [np.exp(sharpness * float(one.astype(np.float64) @ other.astype(np.float64))) for other in bank]
    return -float(np.log(np.mean(powers))) / sharpness


@pytest.mark.parametrize("sharpness", [1.0, SHARPNESS, 400.0])
def test_it_is_what_the_formula_says(sharpness):
    """-log(mean(exp(s · cosines))) / s of each row, float64; nothing overflows."""
    candidates, bank = rows(7), rows(11, seed=1)
    found = rarity(candidates, bank, sharpness=sharpness)
    assert (found.shape, found.dtype) == ((7,), np.float64)
    assert found == pytest.approx([by_hand(one, bank, sharpness) for one in candidates], abs=1e-5)
    assert (abs(found) <= 1 + 1e-6).all()


def test_equal_cosines_give_their_negative():
    """A bank of one row, however often it is there."""
    candidates, bank = rows(5), rows(1, seed=2)
    wanted = -(candidates @ bank[0])
    for times in (1, 300):
        assert rarity(candidates, np.repeat(bank, times, axis=0)) == pytest.approx(wanted, abs=1e-5)


def test_without_a_bank_all_are_alike():
    """0 for each; and no candidates are no numbers."""
    assert rarity(rows(3), np.zeros((0, 8), np.float32)).tolist() == [0.0, 0.0, 0.0]
    assert rarity(rows(0), rows(4)).shape == (0,)


def test_what_is_near_to_every_query_is_less_rare():
    """A hub lies between two crowds of queries; each of the others is near to one of them."""
    left, right = np.eye(8, dtype=np.float32)[:2]
    hub = (left + right) / np.sqrt(np.float32(2))
    bank = np.stack([0.8 * left + 0.6 * right, 0.6 * left + 0.8 * right])
    stranger = np.eye(8, dtype=np.float32)[5]
    common, near, far = rarity(np.stack([hub, left, stranger]), bank)
    assert common < near < far == pytest.approx(0.0)


def test_the_size_of_a_block_changes_nothing(monkeypatch):
    """A row at a time, all at once, and a number that does not go into them."""
    candidates, bank = rows(300), rows(50, seed=1)
    whole = rarity(candidates, bank)
    for block in (1, 7, 1000):
        monkeypatch.setattr(commonness, "_BLOCK", block)
        assert rarity(candidates, bank) == pytest.approx(whole, abs=1e-6)
    order = np.random.default_rng(0).permutation(50)
    assert rarity(candidates, bank[order]) == pytest.approx(whole, abs=1e-6)

"""Quantised patch tokens: half a step at most, in any half precision, through bytes and back."""

import numpy as np
import pytest

from mmsearch.errors import UsageError
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.tokens import Patches, dequantise, pack, quantise, unpack
from mmsearch.testing import GridPatches, color_image


def patches(n=3, p=4, c=5, *, scale=1.0, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, p, c)) * scale).astype(np.float32)


def test_the_known_values():
    """The largest number of a token is 127 steps; the other ones are rounded, half to even."""
    made = quantise(np.array([[[1, -2], [0, 0]]], np.float32))
    assert made.values.tolist() == [[[64, -127], [0, 0]]]
    assert made.scales.tolist() == [[float(np.float16(2 / 127)), 0.0]]


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 3e-6, 1e-4, 1.0, 300.0, 1e6])
def test_no_number_is_off_by_more_than_half_a_step(scale):
    """Against the scale as stored: also where half precision has only a few digits left (below 6e-5), or none."""
    exact = patches(40, 9, 7, scale=scale)
    made = quantise(exact)
    error = np.abs(dequantise(made).astype(np.float64) - exact)
    half = made.scales.astype(np.float64)[..., None] / 2
    assert (error <= half * (1 + 1e-6) + 3e-8).all()  # 3e-8: half of the smallest half-precision number
    assert (error <= half * (1 + 1e-6)).mean() > 0.99 or scale < 1e-8


def test_a_token_does_not_see_its_neighbours():
    """A token of large numbers leaves the precision of the small ones alone, and so do other pictures."""
    exact = patches(2, 4, 5)
    loud = exact.copy()
    loud[0, 1] *= 1000
    loud[1] *= 7
    assert (dequantise(quantise(loud))[0, [0, 2, 3]] == dequantise(quantise(exact))[0, [0, 2, 3]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 8.4e6])
def test_numbers_that_are_not_finite_mark_their_picture_only(bad):
    """It is known as such, gives NaN and no number, and cannot be packed; the others are what they were."""
    exact = patches()
    exact[1, 2, 3] = bad
    made = quantise(exact)
    assert made.intact().tolist() == [True, False, True]
    assert np.isnan(dequantise(made)[1]).all()
    assert (dequantise(made)[[0, 2]] == dequantise(quantise(exact[[0, 2]]))).all()
    with pytest.raises(UsageError, match="not finite"):
        pack(made.take([1]))


def test_a_picture_goes_through_bytes_and_back():
    """Scales first, then values: p * c + 2 * p bytes, whatever else was quantised with it."""
    made = quantise(patches(3, 4, 5))
    blob = pack(made.take([1]))
    assert len(blob) == 4 * 5 + 2 * 4
    assert blob[:8] == made.scales[1].astype("<f2").tobytes()
    again = unpack(blob, p=4, c=5)
    assert (again.values == made.values[[1]]).all()
    assert (again.scales == made.scales[[1]]).all()


def test_the_size_is_the_one_that_is_promised():
    """31,266 bytes a picture for the bundled shape, below 32 KB."""
    config = RerankConfig()
    blob = pack(quantise(patches(1, config.patches, config.patch_dim)))
    assert len(blob) == config.bytes_per_picture == 31_266


def test_bytes_of_another_length_are_refused():
    """Tokens of another grid or width are not taken for these."""
    blob = pack(quantise(patches(1, 4, 5)))
    for other in (blob[:-1], blob + b"x", b""):
        with pytest.raises(UsageError, match="28 bytes"):
            unpack(other, p=4, c=5)
    with pytest.raises(UsageError, match="2 pictures"):
        pack(quantise(patches(2)))


def test_pictures_are_taken_and_joined_in_order():
    """By place, by mask, none at all; parts come back as the whole."""
    made = quantise(patches(4))
    assert (made.take([3, 0, 3]).values == made.values[[3, 0, 3]]).all()
    assert len(made.take(np.array([True, False, True, False]))) == 2
    assert len(made.take([])) == 0
    joined = Patches.concatenate([made.take([0, 1]), made.take([]), made.take([2, 3])])
    assert (joined.values == made.values).all() and (joined.scales == made.scales).all()


def test_shapes_that_do_not_fit_are_refused():
    """Values without their scales, other dtypes, parts of two kinds, no parts, a missing axis."""
    made = quantise(patches())
    wrong = [
        lambda: Patches(made.values, made.scales[:2]),
        lambda: Patches(made.values.astype(np.int16), made.scales),
        lambda: Patches(made.values, made.scales.astype(np.float32)),
        lambda: Patches.concatenate([made, quantise(patches(c=6))]),
        lambda: Patches.concatenate([]),
        lambda: quantise(patches()[0]),
    ]
    for each in wrong:
        with pytest.raises(UsageError):
            each()


def test_no_pictures_are_no_patches():
    """An empty batch goes through everything."""
    made = quantise(np.empty((0, 4, 5), np.float32))
    assert dequantise(made).shape == (0, 4, 5)
    assert made.intact().shape == (0,)


def test_the_stand_in_sees_the_colour_of_each_cell():
    """`testing.GridPatches`: what is red on the left and blue on the right is so in its tokens."""
    pixels = np.concatenate([color_image("red", size=(8, 16)), color_image("blue", size=(8, 16))], axis=1)
    seen = dequantise(GridPatches(size=16, grid=2).read_pixels(pixels[None]))[0].round(2)
    assert seen.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]

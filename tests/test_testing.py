"""The colour encoder's answers are the ones everybody can tell beforehand."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmsearch.similarity import check_embeddings
from mmsearch.testing import COLORS, ColorEncoder, color_image


@pytest.mark.parametrize("color", COLORS)
def test_a_colour_word_finds_its_picture_first(color):
    """Both directions, for each of the eight."""
    encoder, names = ColorEncoder(), list(COLORS)
    images = encoder.encode_images([color_image(name) for name in names])
    texts = encoder.encode_texts([f"a {name} thing" for name in names])
    place = names.index(color)
    assert (images @ texts[place]).argmax() == place
    assert (texts @ images[place]).argmax() == place


def test_rows_are_unit_and_every_door_gives_the_same(tmp_path):
    """PIL image, pixels, path and prepared pixels of one colour."""
    encoder = ColorEncoder(size=16)
    Image.fromarray(color_image("cyan")).save(tmp_path / "c.png")
    rows = encoder.encode_images([color_image("cyan"), Image.fromarray(color_image("cyan")), tmp_path / "c.png"])
    prepared, ok = encoder.encode_pixels(color_image("cyan", size=(16, 16))[None])
    check_embeddings(np.concatenate([rows, prepared]), dim=8)
    assert ok.all()
    assert np.allclose(rows, prepared)


def test_a_text_without_colours_is_in_the_middle():
    """As near to one colour as to another."""
    assert np.allclose(ColorEncoder().encode_texts(["a dog"]), 8**-0.5)


def test_it_needs_no_torch():
    """Importing and using it leaves torch alone."""
    code = "import sys, mmsearch.testing as t; t.ColorEncoder().encode_texts(['red']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Why this hit: words, where they look, and a picture of it that shows the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch.builder import build
from mmsearch.encoder import to_pixels
from mmsearch.errors import ResourceError, UsageError
from mmsearch.explain import Explanation, _Scored, draw, explain, whole_words
from mmsearch.rerank.heatmap import contact_sheet, overlay
from mmsearch.searcher import Searcher
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker
from mmsearch.types import Hit, Item, Modality, Preprocessing

SQUASH = Preprocessing()


def halves(path: Path, left: str, right: str, *, size: tuple[int, int] = (60, 40)) -> Path:
    image = Image.new("RGB", size, COLORS[left])
    image.paste(COLORS[right], (size[0] // 2, 0, *size))
    image.save(path)
    return path


def hit(path: Path | None, **values) -> Hit:
    item = Item("0" * 16, None if path is None else str(path))
    return replace(Hit(1, 0.5, item, Modality.IMAGE, parts={"cosine": 0.5}), **values)


def spot(row: int, column: int, *, side: int = 4) -> np.ndarray:
    grid = np.zeros((side, side))
    grid[row, column] = 1.0
    return grid


def explained(found: Hit, **query) -> Explanation:
    return explain(found, reranker=ColorReranker(grid=2), encoder=ColorEncoder(), **query)


def test_a_word_looks_where_its_colour_is(tmp_path):
    """Red is left, blue is right; every word's shares sum to 1; the parts of the score come along."""
    found = explained(hit(halves(tmp_path / "p.png", "red", "blue")), text="red or blue")
    assert found.words == ("red", "or", "blue") and found.grid.shape == (3, 2, 2)
    assert np.allclose(found.grid.sum(axis=(1, 2)), 1.0)
    assert found.grid[0, :, 0].sum() > 0.99 and found.grid[2, :, 1].sum() > 0.99
    assert np.allclose(found.grid[1], 0.25)
    assert found.to_json()["parts"] == {"cosine": 0.5}
    assert np.allclose(found.to_json()["attention"], found.grid, atol=1e-5)


def test_a_score_rests_where_its_colour_is(tmp_path):
    """Covering the red half costs the word red, the blue half the word blue; the text of both rests on both."""
    found = explained(hit(halves(tmp_path / "p.png", "red", "blue")), text="red and blue")
    assert found.asked == ("red", "blue") and found.falls.shape == (3, 7, 7)
    whole, red, blue = found.falls
    assert red[:, :3].max() > 0.2 > red[:, 4:].max() and blue[:, 4:].max() > 0.2 > blue[:, :3].max()
    assert whole[:, :3].max() > 0.2 and whole[:, 4:].max() > 0.2
    read = found.to_json()["occlusion"]
    assert np.allclose(read["text"], whole, atol=1e-5) and list(read["words"]) == ["red", "blue"]


def test_a_caption_is_explained_over_the_query_picture(tmp_path):
    """A picture that was asked with, and the words of the hit."""
    picture = halves(tmp_path / "p.png", "red", "blue")
    found = explained(hit(None, modality=Modality.TEXT, caption="blue things"), picture=str(picture))
    assert found.words == ("blue", "things") and found.grid[0, :, 1].sum() > 0.99


def test_what_is_explained_is_the_score_of_the_search(tmp_path):
    """Without a cover it is the hit's own, either way, with a text of its own or without."""
    (tmp_path / "photos").mkdir()
    for left, right in (("red", "blue"), ("green", "black"), ("white", "cyan")):
        halves(tmp_path / "photos" / f"{left}-{right}.png", left, right)
    (tmp_path / "photos" / "red-blue.txt").write_text("red and blue\n")
    (tmp_path / "photos" / "green-black.txt").write_text("green and black\n")
    encoder, reranker = ColorEncoder(), ColorReranker()
    build([tmp_path / "photos"], tmp_path / "index", encoder=encoder, workers=1)
    reranker.caption_bank = encoder.encode_texts(["red", "white", "a blue thing"])
    reranker.picture_bank = encoder.encode_texts(["green", "black and white"])
    cases = {
        name: replace(case, weights=tuple(w + 0.5 for w in case.weights))
        for name, case in reranker.scoring.cases.items()
    }
    reranker.scoring = replace(reranker.scoring, cases=cases)
    picture = tmp_path / "photos" / "red-blue.png"
    with Searcher.open(tmp_path / "index", encoder=encoder, reranker=reranker) as searcher:
        of_text = searcher.search_text("red and blue", k=3, rerank=3)
        of_picture = searcher.search_image(picture, k=2, to="text", rerank=2)
    for found in (*of_text, *of_picture):
        text, path = ("red and blue", found.item.path) if found.modality is Modality.IMAGE else (found.caption, picture)
        pixels = to_pixels(Path(path), reranker.preprocessing)
        score = _Scored(found.parts, of_text=found.modality is Modality.IMAGE, reranker=reranker, encoder=encoder)
        assert score.log_odds([text], pixels[None])[0, 0] == pytest.approx(found.parts["log_odds"], abs=0.02)


@pytest.mark.parametrize("alone", [False, True])
def test_without_attention_there_is_still_what_the_score_rests_on(tmp_path, alone):
    """A fusion of unit rows alone has no patches to look at, and is explained all the same."""
    reranker, path = ColorReranker(), halves(tmp_path / "p.png", "red", "blue")
    if alone:
        reranker.reads_tokens = False
        reranker.logits = lambda words, texts, patches, rows, *, pairs, batch_size=64: (
            8.0 * np.einsum("md,md->m", texts[pairs[:, 0]], rows[pairs[:, 1]]).astype(np.float32)
        )
    else:
        reranker.attention = lambda *sides: None
    found = explain(hit(path), reranker=reranker, encoder=ColorEncoder(), text="red")
    assert (found.grid, found.asked) == (None, ("red",))
    assert found.falls[1][:, :3].max() > found.falls[1][:, 4:].max()
    assert draw(found, tmp_path / "why.png", preprocessing=SQUASH)


@pytest.mark.parametrize("case", ["no picture", "broken picture", "picture for picture"])
def test_without_words_over_a_picture_there_are_the_parts_alone(tmp_path, case):
    """Nothing fails for want of a picture or of words."""
    reranker, path, query = ColorReranker(), halves(tmp_path / "p.png", "red", "blue"), {"text": "red"}
    if case == "no picture":
        path = None
    elif case == "broken picture":
        path.write_bytes(b"nothing")
    else:
        query = {"picture": str(path)}
    found = explain(hit(path), reranker=reranker, encoder=ColorEncoder(), **query)
    assert (found.grid, found.falls, dict(found.parts)) == (None, None, {"cosine": 0.5})
    assert found.to_json() == {"words": [], "attention": None, "parts": {"cosine": 0.5}, "occlusion": None}
    assert not draw(found, tmp_path / "none.png", preprocessing=SQUASH)


def test_pieces_of_a_word_are_one_word():
    """Their mean; the model's own marks are left out; spaces of other tokenisers are no letters."""
    looks = np.arange(12, dtype=np.float32).reshape(6, 2)
    words, shares = whole_words(["[CLS]", "a", "rain", "##bow", "\u0120here", "[SEP]"], looks)
    assert words == ["a", "rainbow", "here"]
    assert shares.tolist() == [[2, 3], [5, 6], [8, 9]]
    assert whole_words(["[CLS]", "[SEP]"], looks[:2])[0] == ["[CLS]", "[SEP]"]


def brightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64).sum(axis=2)


def lit(image: Image.Image) -> tuple[float, float]:
    """Where the brightest hundredth lies, as shares of width and height."""
    light = brightness(image)
    y, x = np.nonzero(light >= np.quantile(light, 0.99))
    return x.mean() / light.shape[1], y.mean() / light.shape[0]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (3, 0), (3, 3), (1, 2)])
def test_the_map_is_bright_where_the_word_looks(row, column):
    """A map with one patch lights that part of the photo and no other."""
    photo = Image.new("RGB", (120, 80), (120, 120, 120))
    x, y = lit(overlay(photo, spot(row, column), preprocessing=SQUASH))
    assert abs(x - (column + 0.5) / 4) < 0.1 and abs(y - (row + 0.5) / 4) < 0.1


def test_the_map_covers_what_the_model_saw():
    """With "crop" only the middle square is lit; with "pad" the map reaches beyond the photo."""
    photo = Image.new("RGB", (120, 60), (120, 120, 120))
    x, _ = lit(overlay(photo, spot(1, 0), preprocessing=Preprocessing(fit="crop")))
    assert 0.25 < x < 0.4
    dark = brightness(overlay(photo, np.ones((4, 4)), preprocessing=SQUASH)).max()
    padding = overlay(photo, spot(0, 0), preprocessing=Preprocessing(fit="pad"))  # above the photo: all black there
    assert brightness(padding)[20:].max() <= dark + 1


def test_equal_shares_light_nothing():
    """Noise is not blown up to a pattern."""
    photo = Image.new("RGB", (50, 50), (200, 10, 10))
    flat = brightness(overlay(photo, np.full((3, 3), 1 / 9), preprocessing=SQUASH))
    assert flat.max() == flat.min() < brightness(photo).max() / 2


def test_small_numbers_are_drawn_faintly(tmp_path):
    """Below `least` a map is not stretched to full light; a word that costs next to nothing stays dark."""
    photo = Image.new("RGB", (80, 80), (120, 120, 120))
    lost = np.stack([spot(0, 0, side=7), 0.05 * spot(0, 0, side=7)])
    path = halves(tmp_path / "p.png", "black", "black")
    draw(Explanation(asked=("dog",), falls=lost, picture=str(path)), tmp_path / "why.png", preprocessing=SQUASH)
    with Image.open(tmp_path / "why.png") as sheet:
        tiles = [brightness(sheet.crop((left, 8, left + 240, 168))).max() for left in (8, 256)]
    assert tiles[0] > 2 * tiles[1]
    full, faint = (brightness(overlay(photo, spot(1, 1), preprocessing=SQUASH, least=least)).max() for least in (1, 5))
    assert full > 1.2 * faint


def test_a_sheet_has_a_tile_for_the_whole_text_and_one_for_each_word():
    """Its size grows with the words; many and very long words do no harm; the photo's shape is kept."""
    photo = Image.new("RGB", (400, 200), (90, 90, 90))
    one = contact_sheet(photo, ["dog"], np.full((1, 3, 3), 1 / 9), whole=np.zeros((3, 3)), preprocessing=SQUASH)
    assert one.size == (2 * 248 + 8, 120 + 22 + 8 + 8)
    many = ["word" * 60, "кошка", "\n", ""] * 30
    sheet = contact_sheet(photo, many, np.full((120, 3, 3), 1 / 9), whole=np.zeros((3, 3)), preprocessing=SQUASH)
    assert sheet.size[0] < 3000 and sheet.size[1] < 3000


@pytest.mark.parametrize("grid", [np.ones((2, 3, 3)), np.ones((1, 3, 4)), np.ones((1, 9)), np.full((1, 3, 3), np.nan)])
def test_numbers_that_do_not_fit_the_words_are_refused(grid):
    """Not drawn as something else."""
    with pytest.raises(UsageError):
        contact_sheet(Image.new("RGB", (9, 9)), ["one"], grid, whole=grid[0], preprocessing=SQUASH)


def test_a_drawing_is_a_png_of_the_upright_photo(tmp_path):
    """EXIF rotation is applied; nothing half written stays; a folder that cannot be is an error."""
    path = tmp_path / "p.jpg"
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("RGB", (200, 100), (10, 200, 10)).save(path, exif=exif)
    found = Explanation(asked=("dog",), falls=np.stack([spot(0, 0), spot(0, 0)]), picture=str(path))
    assert draw(found, tmp_path / "why" / "1.png", preprocessing=SQUASH)
    with Image.open(tmp_path / "why" / "1.png") as sheet:
        assert sheet.format == "PNG" and sheet.height > 240  # the tile stands upright: 120 x 240
    assert [one.name for one in (tmp_path / "why").iterdir()] == ["1.png"]
    with pytest.raises(ResourceError):
        draw(found, path / "below-a-file.png", preprocessing=SQUASH)
    path.unlink()
    assert not draw(found, tmp_path / "2.png", preprocessing=SQUASH)

"""The picture of a run: which numbers it shows, and that it is drawn from what is there."""

import json

import numpy as np
import pytest
from PIL import Image

from mmsearch.errors import InputError
from mmsearch.train.curves import PANELS, LiveCurves, draw_curves


def metrics(directory, *lines: dict):
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(directory, *lines: dict) -> np.ndarray:
    draw_curves(metrics(directory, *lines), directory / "curves.png")
    with Image.open(directory / "curves.png") as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_panels_are_drawn_for_what_was_logged(tmp_path):
    """A run without validation has no empty panel for it; two rows of panels are higher than one."""
    loss = drawn(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    full = drawn(
        tmp_path,
        {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "logit_scale": 14.0},
        {"step": 2, "loss": 1.0, "val/text_to_image/hit@1": 0.5},
    )
    assert full.shape[0] == 2 * loss.shape[0]


def test_a_better_run_looks_different(tmp_path):
    """The numbers are in the picture."""
    lines = [{"step": step, "loss": 1.0 + step % 2, "logit_scale": 14.0} for step in range(5)]
    assert (drawn(tmp_path, *lines) == drawn(tmp_path, *lines)).all()
    assert (drawn(tmp_path, *lines) != drawn(tmp_path, *lines[:-1], {"step": 4, "loss": 9.0})).any()


def test_many_steps_gaps_and_a_torn_line_are_drawn(tmp_path):
    """A long run, a NaN that the journal wrote as null, a line that is being written: still a picture."""
    path = metrics(tmp_path, *({"step": step, "loss": None if step == 50 else 1.0 / step} for step in range(1, 200)))
    with path.open("a") as file:
        file.write('{"step": 200, "lo')
    draw_curves(path, tmp_path / "curves.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("lines", [(), ({"step": 1, "note": "started"},)])
def test_nothing_to_draw_is_said(tmp_path, lines):
    """An empty picture would look like a run that learned nothing."""
    with pytest.raises(InputError, match="logged steps"):
        draw_curves(metrics(tmp_path, *lines), tmp_path / "curves.png")
    with pytest.raises(InputError):
        draw_curves(tmp_path / "not-there.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("loss", "loss"),
        ("loss_item", "loss"),
        ("val/loss", "loss"),
        ("val/image_to_text/hit@10", "validation, per cent"),
        ("learning_rate", "learning rate"),
        ("logit_scale", "logit scale (1 / temperature)"),
        ("pairs_per_s", None),
        ("step", None),
    ],
)
def test_a_name_decides_its_panel(name, title):
    """What the trainer logs under these names is shown, and nothing is shown twice."""
    assert [panel.title for panel in PANELS if panel.shows(name)] == ([title] if title else [])


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    """A notebook keeps its own backend and open figures."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_backend(), pyplot.get_fignums()
    drawn(tmp_path, {"step": 1, "loss": 2.0})
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


def test_a_run_that_goes_on_is_drawn_now_and_then(tmp_path):
    """Not after every short epoch, and with what was logged last."""
    times, png = iter([0.0, 29.0, 30.0, 31.0, 59.0, 61.0, 62.0]), tmp_path / "curves.png"
    live = LiveCurves(metrics(tmp_path, {"step": 1, "loss": 2.0}), seconds=30.0, clock=lambda: next(times))
    live.draw()  # at 29
    assert not png.exists()
    live.draw()  # at 30, done at 31
    first = png.read_bytes()
    metrics(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    live.draw()  # at 59
    assert png.read_bytes() == first
    live.draw()  # at 61
    assert png.read_bytes() != first


def test_no_run_ends_for_a_picture(tmp_path):
    """A journal that was moved away, a folder where the picture should be."""
    LiveCurves(tmp_path / "gone.jsonl", seconds=0.0).draw()
    (tmp_path / "curves.png").mkdir()
    LiveCurves(metrics(tmp_path, {"step": 1, "loss": 2.0}), seconds=0.0).draw()

"""What a run leaves behind while it runs: whole lines, each step once."""

import json
import os
import subprocess
import sys

import pytest

from mmsearch.errors import UsageError
from mmsearch.train.journal import EVENTS, METRICS, Journal, open_events, read_journal


class Drawn:
    """A live view that remembers what it was told."""

    def __init__(self) -> None:
        self.scalars, self.closed = [], 0

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))

    def close(self):
        self.closed += 1


def no_events(directory, resume_step):
    return None


def journal(directory, *, resume_step=None, events=no_events) -> Journal:
    return Journal(directory, resume_step=resume_step, events=events)


def written(directory, *steps: int) -> list[str]:
    with journal(directory) as run:
        for step in steps:
            run.log(step, {"loss": step / 10})
    return (directory / METRICS).read_text().splitlines()


def test_a_line_is_a_step_with_its_values(tmp_path):
    """One JSON object a line, in the order they were logged, strings and numbers as they came."""
    with journal(tmp_path / "new" / "run") as run:
        run.log(0, {"val/hit@1": 0.25, "phase": "start"})
        run.log(1, {"loss": 4.5, "skipped": 2})
    lines = [json.loads(line) for line in (tmp_path / "new" / "run" / METRICS).read_text().splitlines()]
    assert lines == [{"step": 0, "val/hit@1": 0.25, "phase": "start"}, {"step": 1, "loss": 4.5, "skipped": 2}]


def test_a_line_is_on_disk_before_the_process_dies(tmp_path):
    """Nothing is held back: a process that ends without closing anything has lost no line."""
    code = (
        "import os, pathlib, sys; from mmsearch.train.journal import Journal\n"
        "run = Journal(pathlib.Path(sys.argv[1]), events=lambda *_: None)\n"
        "run.log(7, {'loss': 1.0})\n"
        "os._exit(9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], env=dict(os.environ), check=False)
    assert ended.returncode == 9
    assert read_journal(tmp_path / METRICS) == [{"step": 7, "loss": 1.0}]


def test_nan_and_infinity_become_null(tmp_path):
    """Other readers of JSON refuse the words NaN and Infinity."""
    with journal(tmp_path) as run:
        run.log(1, {"loss": float("nan"), "norm": float("inf")})
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null, "norm": null}\n'


def test_a_step_cannot_be_given_twice(tmp_path):
    """Two numbers for one name: the second would silently win."""
    with journal(tmp_path) as run, pytest.raises(UsageError, match="step"):
        run.log(1, {"step": 2.0})


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Lines past the checkpoint go, those up to it stay as they are, and the run writes on behind them."""
    before = written(tmp_path, 1, 2, 3, 4, 5)
    with journal(tmp_path, resume_step=3) as run:
        run.log(4, {"loss": 0.4})
    assert (tmp_path / METRICS).read_text().splitlines() == before[:4]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 2}', "\0\0\0\0", '{"ste\n', "[1]\n", '{"loss": 1}\n'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    """What a crash left half written is no line, and the next one does not stick to it."""
    before = written(tmp_path, 1, 2)
    with (tmp_path / METRICS).open("a") as file:
        file.write(torn)
    assert [line["step"] for line in read_journal(tmp_path / METRICS)] == [1, 2]
    with journal(tmp_path, resume_step=2) as run:
        run.log(3, {"loss": 0.3})
    assert (tmp_path / METRICS).read_text().splitlines() == [*before, '{"step": 3, "loss": 0.3}']


def test_a_new_run_begins_with_an_empty_journal(tmp_path):
    """The lines of another run in the same folder would be drawn as one curve with this one's."""
    written(tmp_path, 1, 2)
    journal(tmp_path).close()
    assert read_journal(tmp_path / METRICS) == []


def test_a_journal_that_is_not_there_has_no_lines(tmp_path):
    """A run may be resumed from a checkpoint alone."""
    assert read_journal(tmp_path / METRICS) == []
    journal(tmp_path, resume_step=9).close()
    assert read_journal(tmp_path / METRICS) == []


def test_numbers_are_drawn_and_words_are_not(tmp_path):
    """TensorBoard gets each number under its name; closing twice is harmless."""
    drawn = Drawn()
    with journal(tmp_path, events=lambda *_: drawn) as run:
        run.log(3, {"loss": 2.0, "phase": "warm-up"})
        run.close()
    assert drawn.scalars == [("loss", 2.0, 3)]
    assert drawn.closed == 1
    assert run.notes == ()


def test_without_tensorboard_there_is_one_note(tmp_path, monkeypatch):
    """The run goes on, and the note says what to type."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Journal(tmp_path) as run:
        run.log(1, {"loss": 1.0})
    assert len(run.notes) == 1
    assert "pip install 'mmsearch[train]'" in run.notes[0]
    assert len(read_journal(tmp_path / METRICS)) == 1


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path):
    """Events past the checkpoint are hidden, and a new run does not show the old one's."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve():
        events = EventAccumulator(str(tmp_path / EVENTS))
        events.Reload()
        return [(one.step, one.value) for one in events.Scalars("loss")]

    for resume, steps, value in ((None, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        with journal(tmp_path, resume_step=resume, events=open_events) as run:
            for step in steps:
                run.log(step, {"loss": value})
    assert curve() == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    with journal(tmp_path, events=open_events) as run:
        run.log(1, {"loss": 9.0})
    assert curve() == [(1, 9.0)]

"""What only a terminal shows: the bar and the table, seen through a pseudo-terminal."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmsearch.cli.progress import Bar

HERE = Path(__file__).parent
HEAD = (
    f"import sys, time; sys.path.insert(0, {str(HERE)!r})\n"
    "from cli_fakes import FakeLibrary, hit\n"
    "from mmsearch.cli.app import main\n"
)


def on_terminal(code: str) -> str:
    """Everything that a person sees when `code` runs on a terminal of 100 columns, without colours."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", HEAD + code], stdout=theirs, stderr=theirs, stdin=theirs, cwd=HERE.parents[1], env=env
    ):
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 65536):
                seen += block
        except OSError:  # Linux says EIO when the last writer is gone
            pass
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())


def test_the_bar_shows_count_rate_and_what_is_going_on():
    """And it is gone when the work is done, leaving the notes and the summary."""
    seen = on_terminal(
        "class Slow(FakeLibrary):\n"
        "    def build(self, paths, out, *, progress, **options):\n"
        "        progress.start(None)\n"
        "        progress.start(40)\n"
        "        for n in range(4):\n"
        "            progress.advance(10, note='[red]x')\n"
        "            time.sleep(0.15)\n"
        "        progress.note('a [bold]note\\x07')\n"
        "        return super().build(paths, out)\n"
        "main(['index', 'photos'], library=Slow())\n"
    )
    assert re.search(r"indexing .*\d+/40 .*images/s", seen)
    assert "[red]x" in seen  # names are not markup
    assert "a [bold]note\\x07" in seen
    assert "indexes/photos: nothing to do" in seen


def test_a_person_gets_a_table_and_a_pipe_gets_tabs():
    """The same hits; the table has headings and does not cut paths."""
    long = "/photos/" + "x" * 150 + ".jpg"
    code = f"main(['query', 'x', '--index', 'i'], library=FakeLibrary(hits=[hit({long!r}, score=0.25)]))\n"
    seen = on_terminal(code)
    assert re.search(r"rank +score +path", seen)
    assert "0.250" in seen
    assert long in re.sub(r"\s+", "", seen)
    assert "rank" not in on_terminal("main(['query', 'x', '--index', 'i'], library=FakeLibrary())\n")  # no empty table


def test_control_characters_do_not_reach_the_terminal():
    """Neither in the table nor with -f: a name cannot clear the screen."""
    for flag in ("", "-f"):
        arguments = ["query", "x", "--index", "i", *([flag] if flag else [])]
        seen = on_terminal(f"main({arguments}, library=FakeLibrary(hits=[hit('/p/a\\x1b]0;title\\x07.jpg')]))\n")
        assert "\\x1b]0;title\\x07.jpg" in seen


def test_nothing_is_drawn_where_nobody_looks(capsys):
    """A log file gets notes, no bar."""
    with Bar("indexing") as bar:
        bar.start(10)
        bar.advance(10, note="x")
        bar.note("a note")
    assert capsys.readouterr().err == "a note\n"


def test_a_log_gets_a_line_a_minute(capsys):
    """Whoever runs it overnight sees how far it is; short work says nothing."""
    now = [0.0]
    with Bar("training", unit="steps", quiet=True, clock=lambda: now[0]) as bar:
        bar.start(1400)
        bar.advance(1000)  # what an earlier run did says nothing of the pace
        for _ in range(5):
            now[0] += 30.0
            bar.advance(20, note="loss 1.5")
        bar.start(None, what="encoding", unit="texts")
        for _ in range(2):
            now[0] += 60.0
            bar.advance(600)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1,040 of 1,400 steps, 0.7 a second: about 9 minutes left; loss 1.5",
        "training: 1,080 of 1,400 steps, 0.7 a second: about 8 minutes left; loss 1.5",
        "encoding: 1,200 texts, 10.0 a second",
    ]


def test_a_bar_stops_drawing_when_the_work_fails():
    """The error line comes after the bar, not into it."""
    with pytest.raises(ZeroDivisionError), Bar("indexing", quiet=False) as bar:
        bar.start(10)
        raise ZeroDivisionError
    assert bar._drawn is not None
    assert not bar._drawn.live.is_started

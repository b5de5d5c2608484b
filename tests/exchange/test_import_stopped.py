"""An import that is stopped, killed or interrupted goes on where it was, and ends as one that was not."""

import itertools
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from exchange_kit import bits, clip_folder, everything, held, npy, pictures, progress_of, unit

from mmsearch.exchange import import_vectors
from mmsearch.progress import SilentProgress
from mmsearch.store import IndexStore

ROWS, BLOCK = 4000, 100
DRIVER = f"""
import sys
from mmsearch.exchange import base, import_vectors
from mmsearch.progress import SilentProgress

class Told(SilentProgress):
    def advance(self, n, *, note=""):
        print("block", flush=True)

base.BLOCK_ROWS = {BLOCK}
print("ready", flush=True)
import_vectors(sys.argv[1], sys.argv[2], progress=Told())
"""


class Stop(SilentProgress):
    """Raises after so many blocks; `seen` collects what was said."""

    def __init__(self, blocks: int) -> None:
        self.left, self.seen, self.totals = blocks, [], []

    def start(self, total, *, what="", unit=""):
        self.totals.append(total)

    def advance(self, n, *, note=""):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def note(self, text):
        self.seen.append(text)


def test_sigkill_again_and_again_ends_bit_by_bit_as_a_calm_import(tmp_path):
    """Killed at random moments, it goes on each time without reading what is done, and both indexes are equal."""
    columns = {"id": [f"id{i % (ROWS - 50)}" for i in range(ROWS)], "caption": [f"caption {i}" for i in range(ROWS)]}
    rows = unit(ROWS)
    rows[::97] = 0
    folder = clip_folder(tmp_path / "clip", [rows], texts=[unit(ROWS, seed=1)], columns=[columns])
    command = [sys.executable, "-c", DRIVER, str(folder)]
    draw, cut_short, rows_then = random.Random(0), 0, [0]
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for _ in range(draw.randint(2, 8)):
            process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.01))
        cut_short += process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        if IndexStore.exists(str(tmp_path / "killed")):
            held(tmp_path / "killed")  # whole after every single kill, without a repair step
            rows_then.append(progress_of(tmp_path / "killed")["clip"].rows)
    assert cut_short >= 2 and rows_then == sorted(rows_then) and 0 < rows_then[-1] < ROWS
    ended = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert ended.stdout.count("block") <= (ROWS - rows_then[-1]) // BLOCK + 1, "what is done is not read again"
    subprocess.run([*command, str(tmp_path / "calm")], check=True, capture_output=True)
    assert everything(tmp_path / "killed") == everything(tmp_path / "calm")


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_an_interrupt_keeps_what_is_committed(tmp_path, blocks):
    """Ctrl-C between blocks: the next run begins with the block after the last commit, and says so."""
    for number in range(4):
        npy(tmp_path / "x" / f"{number}.npy", unit(10, seed=number))
    with pytest.raises(KeyboardInterrupt):
        import_vectors(tmp_path / "x", tmp_path / "i", progress=Stop(blocks))
    done = progress_of(tmp_path / "i")["x"]
    assert (done.rows, done.items, done.complete) == (blocks * 10, blocks * 10, False)
    told = Stop(-1)
    report = import_vectors(tmp_path / "x", tmp_path / "i", progress=told)
    if blocks < 4:
        assert (report.resumed, report.rows) == (blocks * 10, 40 - blocks * 10)
        assert any(f"going on at row {blocks * 10} of 40" in line for line in told.seen)
        assert told.totals[0] == 40 - blocks * 10, "the time left is that of what is left"
    expected = dict(
        itertools.chain(*(bits(unit(10, seed=n), [f"{n}:{i}" for i in range(10)]).items() for n in range(4)))
    )
    assert pictures(tmp_path / "i") == expected


def test_a_source_that_changed_while_it_was_half_imported_is_compared(tmp_path):
    """What is there is not believed to be of the new file: each row is looked at."""
    for number in range(3):
        npy(tmp_path / "x" / f"{number}.npy", unit(10, seed=number))
    with pytest.raises(KeyboardInterrupt):
        import_vectors(tmp_path / "x", tmp_path / "i", progress=Stop(2))
    changed = unit(10, seed=0)
    changed[4] = unit(1, seed=99)[0]
    np.save(tmp_path / "x" / "0.npy", changed)
    report = import_vectors(tmp_path / "x", tmp_path / "i")
    assert (report.added, report.changed, report.unchanged) == (10, 1, 19)
    assert pictures(tmp_path / "i")["0:4"] == changed[4].tobytes()


def test_a_comparison_that_was_stopped_is_begun_again(tmp_path):
    """Killed while it brings a changed source up to date: nothing was removed yet, and the next run ends right."""
    for number in range(3):
        npy(tmp_path / "x" / f"{number}.npy", unit(10, seed=number))
    import_vectors(tmp_path / "x", tmp_path / "i")
    for number in range(3):
        np.save(tmp_path / "x" / f"{number}.npy", unit(9, seed=number + 10))
    with pytest.raises(KeyboardInterrupt):
        import_vectors(tmp_path / "x", tmp_path / "i", progress=Stop(2))
    assert len(held(tmp_path / "i")) == 30 and "x" not in progress_of(tmp_path / "i")
    report = import_vectors(tmp_path / "x", tmp_path / "i")
    assert (report.changed, report.unchanged, report.removed) == (9, 18, 3)
    assert import_vectors(tmp_path / "x", tmp_path / "i").rows == 0

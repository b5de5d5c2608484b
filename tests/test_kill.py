"""The indexer is killed again and again; what it leaves behind is what an undisturbed run leaves.

`benchmarks/bench_kill.py` does the same to the real command with the bundled model, 200 times.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmsearch.builder import build
from mmsearch.store import IndexStore
from mmsearch.testing import ColorEncoder
from mmsearch.types import Modality

KILLS = 12
DRIVER = """
import sys
from mmsearch import builder, ingest
from mmsearch.testing import ColorEncoder

class Slow(ColorEncoder):
    def encode_pixels(self, pixels, **options):
        import time
        print("batch", flush=True)
        time.sleep(0.02)  # as a model would: so that kills fall between commits, too
        return super().encode_pixels(pixels, **options)

ingest.COMMIT_ROWS = 8
print("ready", flush=True)
builder.build([sys.argv[1]], sys.argv[2], encoder=Slow(), batch_size=4, workers=1)
"""


def contents(path: Path) -> dict[str, np.ndarray]:
    with IndexStore.open(str(path)) as store:
        assert store.verify() == []
        with store.snapshot() as snapshot:
            rows = snapshot.alive_rows(Modality.IMAGE)
            paths = [str(one.item.path) for one in snapshot.locate(rows)]
            assert len(paths) == len(set(paths)), "a photo is there twice"
            return dict(zip(paths, snapshot.vectors(rows), strict=True))


def test_sigkill_at_any_moment_loses_and_doubles_nothing(tmp_path):
    """After the last of many killed runs every photo is there once, with the vector of a calm run."""
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(160):
        Image.new("RGB", (12, 12), tuple(rng.integers(0, 255, 3).tolist())).save(photos / f"{i:03d}.png")
    command = [sys.executable, "-c", DRIVER, str(photos), str(tmp_path / "killed")]
    draw, cut_short = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for _ in range(draw.randint(0, 6)):
            process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.04))
        cut_short += process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        if IndexStore.exists(str(tmp_path / "killed")):
            contents(tmp_path / "killed")  # whole after every single kill, without a repair step
    assert cut_short > KILLS // 2
    report = build([photos], tmp_path / "killed", encoder=ColorEncoder(), workers=1)
    assert 0 < report.added < 160, "what was committed before a kill is not encoded again"
    build([photos], tmp_path / "calm", encoder=ColorEncoder(), workers=1)
    calm, killed = contents(tmp_path / "calm"), contents(tmp_path / "killed")
    assert calm.keys() == killed.keys() and len(calm) == 160
    assert all(np.array_equal(calm[path], killed[path]) for path in calm)

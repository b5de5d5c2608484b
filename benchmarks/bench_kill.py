"""SIGKILL the indexer at random moments, again and again; nothing may be lost, doubled, or different.

    python benchmarks/bench_kill.py --photos 500 --kills 200

Makes a folder of photos (noise, gradients and shapes in several formats), builds one index undisturbed, and
another one by runs that are killed at moments drawn evenly from 0 to `--longest` seconds. A run that ends before
its kill completes an index: it is compared (same paths, each once, same vectors) and begun anew, until there were
`--kills` real kills; then one last run is left in peace and compared, too.
Prints one JSON object. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmsearch.store import IndexStore
from mmsearch.types import Modality


def make_photos(folder: Path, count: int, *, seed: int = 0) -> None:
    """`count` different pictures, 160-400 pixels wide, as jpg, png and webp."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        w, h = (int(v) for v in rng.integers(160, 400, 2))
        base = np.linspace(rng.integers(0, 255, 3), rng.integers(0, 255, 3), w)[None].repeat(h, 0)
        image = Image.fromarray(np.clip(base + rng.normal(0, 9, (h, w, 3)), 0, 255).astype(np.uint8))
        left, top = int(rng.integers(0, w // 2)), int(rng.integers(0, h // 2))
        fill = tuple(rng.integers(0, 255, 3).tolist())
        ImageDraw.Draw(image).ellipse((left, top, left + w // 3, top + h // 3), fill=fill)
        image.save(folder / f"photo_{i:05d}.{('jpg', 'png', 'webp')[i % 3]}")


def read_index(path: str) -> dict[str, np.ndarray]:
    """Path -> vector of every picture that is there. Raises when one is there twice."""
    found: dict[str, np.ndarray] = {}
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        vectors = snapshot.vectors(rows)
        for located, vector in zip(snapshot.locate(rows), vectors, strict=True):
            name = str(located.item.path)
            if name in found:
                raise SystemExit(f"{name} is there twice")
            found[name] = vector
        problems = store.verify()
    if problems:
        raise SystemExit(f"verify: {problems[:3]}")
    return found


def run_killed(command: list[str], seconds: float) -> bool:
    """Run `command`, SIGKILL it (and its workers' parent with it) after `seconds`; True when it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True


def compare(calm: dict[str, np.ndarray], disturbed: dict[str, np.ndarray]) -> dict[str, object]:
    """What differs between the undisturbed and the disturbed index."""
    shared = sorted(set(calm) & set(disturbed))
    cosines = np.array([float(calm[p] @ disturbed[p]) / float(np.linalg.norm(calm[p]) ** 2) for p in shared] or [0.0])
    return {
        "photos": len(calm),
        "missing": len(set(calm) - set(disturbed)),
        "extra": len(set(disturbed) - set(calm)),
        "identical_vectors": sum(bool((calm[p] == disturbed[p]).all()) for p in shared),
        "lowest_cosine": round(float(cosines.min()), 6),
    }


def main() -> int:
    """Parse, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", help="photos to index instead of made ones")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds; the latest moment of a kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder) if options.folder else Path(scratch) / "photos"
        if not options.folder:
            make_photos(folder, options.photos, seed=options.seed)
        outs = [str(Path(scratch) / name) for name in ("calm", "killed")]
        commands = [[sys.executable, "-m", "mmsearch", "index", str(folder), "--out", out] for out in outs]
        started = time.perf_counter()
        subprocess.run(commands[0], check=True, capture_output=True)
        whole = time.perf_counter() - started
        rng, kills, runs, compared = random.Random(options.seed), 0, 0, []
        calm = read_index(outs[0])
        while kills < options.kills:
            runs += 1
            if run_killed(commands[1], rng.uniform(0.0, options.longest)):
                kills += 1
                continue
            compared.append(compare(calm, read_index(outs[1])))
            shutil.rmtree(outs[1])
        subprocess.run(commands[1], check=True, capture_output=True)
        compared.append(compare(calm, read_index(outs[1])))
        worst = min(compared, key=lambda one: (-int(str(one["missing"])), float(str(one["lowest_cosine"]))))
        counts = {"kills": kills, "runs": runs, "indexes_completed": len(compared)}
        print(json.dumps({**counts, "seconds_undisturbed": round(whole, 2), "worst": worst}))
        bad = (one["missing"] or one["extra"] or float(str(one["lowest_cosine"])) < 0.9999 for one in compared)
        return int(any(bad))


if __name__ == "__main__":
    raise SystemExit(main())

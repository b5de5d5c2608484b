"""Many rows on a small machine: imported and indexed in bounded memory, killed on the way, gone on with, and compared.

    python benchmarks/vectors.py --real indexes/real --rows 10000000 --out /tmp/vectors-10m
    python benchmarks/bench_scale.py --vectors /tmp/vectors-10m --index /tmp/scale [--rows N] [-- OPTIONS]

Runs `mmsearch import` as a user would, which also builds the search index. It is killed (SIGKILL) twice and started
again as it was: at a random share of the rows, and at a random moment of the building, within `--building` seconds of
the last row (so let them be about what building takes). What comes after `--` is handed to the command. In the end it
is checked that every row is there once, that a sample of rows is bit for bit what was brought, and what share of the
exact answers is found. Prints one JSON object; exit status 1 when anything is lost.
Peak memory is VmHWM, asked for ten times a second, for a killed process cannot tell it any more. It counts mapped pages
too, which the kernel takes back when it needs them: `own` is the highest RssAnon.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rivals import bytes_on_disk
from search_worker import MODALITIES, Asked, K, asked, overlap
from vectors import exact

from mmsearch.index.derived import neighbours
from mmsearch.store import IndexStore
from mmsearch.types import Modality

_SAMPLE = 20_000
_QUERIES = 200


@dataclass(frozen=True, slots=True)
class Process:
    """What became of one process. Seconds and bytes; `killed`: at what, or "" when it ended by itself."""

    seconds: float
    peak: int
    own: int
    killed: str


def run(command: Sequence[str], due: Callable[[], str]) -> Process:
    """One process, killed as soon as `due` says at what."""
    start, highest, killed = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}, ""
    process = subprocess.Popen([sys.executable, "-m", "mmsearch", *command], stdout=sys.stderr)
    while process.poll() is None and not killed:
        for name, value in _memory(process.pid).items():
            highest[name] = max(highest[name], value)
        killed = due()
        if killed:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    if process.wait() and not killed:
        raise SystemExit(f"mmsearch {' '.join(command)}: expected exit status 0, got {process.returncode}")
    return Process(time.perf_counter() - start, highest["VmHWM"], highest["RssAnon"], killed)


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in ("VmHWM", "RssAnon")}


def while_importing(vectors: Path, *, size: int, share: float) -> Callable[[], str]:
    """Due when that share of `size` bytes is in the vector file."""

    def due() -> str:
        there = vectors.stat().st_size if vectors.exists() else 0
        return f"{there / size:.0%} of the rows" if there >= share * size else ""

    return due


def while_building(vectors: Path, *, size: int, seconds: float) -> Callable[[], str]:
    """Due so many seconds after the vector file is complete."""
    complete: list[float] = []

    def due() -> str:
        if not complete and vectors.exists() and vectors.stat().st_size >= size:
            complete.append(time.perf_counter())
        return f"{seconds:.0f} s into building" if complete and time.perf_counter() - complete[0] >= seconds else ""

    return due


def first_rows(vectors: Path, rows: int | None, folder: Path) -> tuple[Path, dict[str, Asked]]:
    """The file to import and questions about it: all rows of base.npy, or (`rows`) a copy of its first ones."""
    whole = np.load(vectors / "base.npy", mmap_mode="r")
    if rows is None or rows >= len(whole):
        return vectors / "base.npy", asked(vectors)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "base.npy", whole[:rows])
    found: dict[str, Asked] = {}
    for name in MODALITIES:
        queries = np.load(vectors / f"{name}_queries.npy")
        scores, best = exact(whole[:rows], queries)
        found[name] = Asked(queries, best, scores)
    return folder / "base.npy", found


def compared(index: Path, base: Path, questions: dict[str, Asked]) -> dict[str, Any]:
    """Rows that are there, sampled rows that differ from those brought, and overlap with exact search."""
    given = np.load(base, mmap_mode="r")
    with IndexStore.open(str(index)) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        sample = np.sort(np.random.default_rng(0).choice(rows, min(_SAMPLE, len(rows)), replace=False))
        # Without ids in the source the name of an item is the number of its row.
        numbers = [int(located.item.id) for located in snapshot.locate(sample)]
        differing = int((snapshot.take(sample) != given[numbers]).any(axis=1).sum())
        search = neighbours(snapshot, Modality.IMAGE)
        found = {}
        for name, question in questions.items():
            some = Asked(question.queries[:_QUERIES], question.rows[:_QUERIES], question.scores[:_QUERIES])
            start = time.perf_counter()
            answers = search.search(some.queries, K)[1]
            found[name] = {"overlap": overlap(answers, some), "qps": _QUERIES / (time.perf_counter() - start)}
        line = {"rows": len(rows), "differing": differing, "kind": search.kind, **found}
    return {**line, "lost": len(given) - len(rows), "disk": bytes_on_disk(index)}


def main() -> None:
    """Import with two kills, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vectors", type=Path, required=True, help="folder that vectors.py wrote")
    parser.add_argument("--index", type=Path, required=True, help="where to make it; removed first")
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--building", type=float, default=60.0, help="about how many seconds the building takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("rest", nargs="*", help="more options for `mmsearch import`, after --")
    args = parser.parse_args()
    shutil.rmtree(args.index, ignore_errors=True)
    base, questions = first_rows(args.vectors, args.rows, args.index.with_name(args.index.name + "-rows"))
    shape, chance = np.load(base, mmap_mode="r").shape, random.Random(args.seed)
    vectors, size = args.index / "vectors.f16", shape[0] * shape[1] * 2
    dues = [
        while_importing(vectors, size=size, share=chance.uniform(0.1, 0.9)),
        while_building(vectors, size=size, seconds=chance.uniform(0.1, 0.9) * args.building),
        lambda: "",
    ]
    command = ["import", str(base), "--out", str(args.index), *args.rest]
    processes = [run(command, due) for due in dues]
    line = compared(args.index, base, questions)
    kills = sum(bool(process.killed) for process in processes)
    print(json.dumps({**line, "kills": kills, "processes": [asdict(process) for process in processes]}))
    if line["lost"] or line["differing"] or kills < 2:
        sys.exit(1)


if __name__ == "__main__":
    main()

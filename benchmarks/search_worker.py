"""One step of `bench_search.py` in a process of its own, so that its memory is its own: prints one JSON line.

    python benchmarks/search_worker.py build   hnswlib --vectors DIR --work DIR
    python benchmarks/search_worker.py open    hnswlib --vectors DIR --work DIR --settings "[64]" [--cold]
    python benchmarks/search_worker.py measure hnswlib --vectors DIR --work DIR [--settings JSON]

Peak memory is the kernel's high-water mark of this process (VmHWM; `ru_maxrss` would begin with what the parent had at
the fork). Times are wall time. Memory after opening is told apart: `anon` is the process's own, `file` is mapped pages,
which the kernel may drop. `cold` drops the index's files from the page cache first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rivals import RIVALS, Base, Floats, Rival, Rows, Setting, bytes_on_disk

K = 10
MODALITIES = ("text", "image")
_BATCH_SECONDS, _SINGLE_SECONDS, _SINGLES, _LEAST_SINGLES = 0.6, 4.0, 500, 20
ENOUGH = 0.995
TARGET = 0.95
_TIE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Queries of one modality, (q, d), with the exact answers: rows (q, 100) and their scores, best first."""

    queries: Floats
    rows: Rows
    scores: Floats


def asked(vectors: Path) -> dict[str, Asked]:
    """Both kinds of queries of a folder that `vectors.py` wrote."""
    found: dict[str, Asked] = {}
    for name in MODALITIES:
        truth = np.load(vectors / f"truth_{name}.npz")
        found[name] = Asked(np.load(vectors / f"{name}_queries.npy"), truth["rows"], truth["scores"])
    return found


def overlap(found: Rows, asked: Asked) -> float:
    """Share of the k nearest that were found; rows as near as the k-th count as well as it does."""
    good = asked.scores >= asked.scores[:, K - 1 : K] - _TIE
    hits = [
        min(len(np.intersect1d(line, rows[near])), K) for line, rows, near in zip(found, asked.rows, good, strict=True)
    ]
    return float(np.mean(hits)) / K


def memory() -> dict[str, int]:
    """Bytes of this process now, and at its highest."""
    names = {"VmHWM": "peak", "RssAnon": "anon", "RssFile": "file"}
    lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) * 1024 for name, value in lines if name in names}


def rival(method: str) -> Rival:
    """The adapter of a method; "mmsearch KIND" is our own."""
    if method in RIVALS:
        found: Rival = RIVALS[method]()
        return found
    if not method.startswith("mmsearch "):
        raise SystemExit(f"method: expected {', '.join(RIVALS)} or mmsearch KIND, got {method}")
    from own_kinds import OwnKind

    return OwnKind(method.removeprefix("mmsearch "))


def build(library: Rival, vectors: Path, folder: Path, *, threads: int, budget: int) -> dict[str, Any]:
    """Build in an empty folder that takes its name when all is done."""
    shutil.rmtree(folder, ignore_errors=True)
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    start, used = time.perf_counter(), time.process_time()
    facts = library.build(Base(vectors / "base.npy"), fresh, threads=threads, memory=budget)
    line = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    fresh.rename(folder)
    return {**line, "disk": bytes_on_disk(folder), "peak": memory()["peak"], "facts": facts}


def drop_from_cache(folder: Path) -> None:
    """The next reader finds these files on the disk only."""
    for at, _, names in os.walk(folder):
        for name in names:
            file = os.open(os.path.join(at, name), os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def open_once(library: Rival, vectors: Path, folder: Path, *, setting: Setting, cold: bool) -> dict[str, Any]:
    """Milliseconds to import the library, then to open the index and answer; what is in memory then, and was added."""
    query = np.load(vectors / "text_queries.npy")[:1]
    if cold:
        drop_from_cache(folder)
    start = time.perf_counter()
    for module in library.modules:
        importlib.import_module(module)
    imported, before = time.perf_counter(), memory()
    library.open(folder)
    opened = time.perf_counter()
    library.search(query, K, setting=setting, threads=1)
    done, after = time.perf_counter(), memory()
    times = {"import_ms": imported - start, "open_ms": opened - imported, "first_ms": done - imported}
    grown = {f"{name}_grown": after[name] - before[name] for name in ("anon", "file")}
    return {"cold": cold, **{name: seconds * 1e3 for name, seconds in times.items()}, **after, **grown}


def _batch(search: Callable[[], Rows], count: int) -> tuple[Rows, float]:
    """What was found, and queries a second: the best of as many repetitions as fit into the time."""
    found, best, began = search(), 0.0, time.perf_counter()
    while True:
        start = time.perf_counter()
        search()
        best = max(best, count / (time.perf_counter() - start))
        if time.perf_counter() - began > _BATCH_SECONDS:
            return found, best


def _singles(library: Rival, queries: Floats, setting: Setting) -> list[float]:
    """Milliseconds of queries that come one by one, on one thread."""
    times: list[float] = []
    began = time.perf_counter()
    for i in range(min(_SINGLES, len(queries))):
        start = time.perf_counter()
        library.search(queries[i : i + 1], K, setting=setting, threads=1)
        times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= _LEAST_SINGLES and time.perf_counter() - began > _SINGLE_SECONDS:
            break
    return times


def measured(library: Rival, questions: dict[str, Asked], setting: Setting, *, threads: int) -> dict[str, Any]:
    """One setting: overlap, queries a second in a batch, milliseconds one by one; for both modalities."""
    line: dict[str, Any] = {"setting": setting}
    for name, question in questions.items():
        queries = question.queries

        def search(queries: Floats = queries) -> Rows:
            return library.search(queries, K, setting=setting, threads=threads)

        found, speed = _batch(search, len(queries))
        times = _singles(library, queries, setting)
        p50, p99 = np.percentile(times, [50, 99])
        line[name] = {"overlap": overlap(found, question), "qps": speed, "p50": float(p50), "p99": float(p99)}
    return line


def between(lines: list[dict[str, Any]]) -> Iterator[int]:
    """Whole numbers that narrow down where text queries reach the target, while the caller appends what they gave."""
    for _ in range(3):
        numbered = sorted((line["setting"], line["text"]["overlap"]) for line in lines)
        above = [setting for setting, found in numbered if found >= TARGET]
        below = [setting for setting, found in numbered if found < TARGET and above and setting < above[0]]
        if not above or not below or above[0] - below[-1] <= max(2, above[0] // 16):
            return
        yield (above[0] + below[-1]) // 2


def sweep(library: Rival, vectors: Path, *, settings: list[Setting], threads: int) -> list[dict[str, Any]]:
    """The settings given; else the library's own, until nearly all is found, and some around the target."""
    questions = asked(vectors)
    if settings:
        return [measured(library, questions, setting, threads=threads) for setting in settings]
    lines: list[dict[str, Any]] = []
    for setting in library.settings:
        lines.append(measured(library, questions, setting, threads=threads))
        if isinstance(setting, int) and min(lines[-1][name]["overlap"] for name in MODALITIES) >= ENOUGH:
            break
    if all(isinstance(line["setting"], int) for line in lines):
        for setting in between(lines):
            lines.append(measured(library, questions, setting, threads=threads))
    return lines


def main() -> None:
    """One step of one method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("step", choices=("build", "open", "measure"))
    parser.add_argument("method")
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=4 * 10**9, help="bytes, for methods that can be told")
    parser.add_argument("--settings", type=json.loads, default=[])
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    library, folder = rival(args.method), args.work / args.method.replace(" ", "-")
    settings = [tuple(setting) if isinstance(setting, list) else setting for setting in args.settings]
    if args.step == "build":
        line = build(library, args.vectors, folder, threads=args.threads, budget=args.memory)
    elif args.step == "open":
        line = open_once(library, args.vectors, folder, setting=settings[0], cold=args.cold)
    else:
        library.open(folder)
        swept = sweep(library, args.vectors, settings=settings, threads=args.threads)
        line = {"lines": swept, **memory()}
    print(json.dumps({"step": args.step, "method": args.method, **line}))


if __name__ == "__main__":
    main()

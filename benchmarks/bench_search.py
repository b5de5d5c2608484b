"""Every index kind beside other libraries on the same rows and the same real queries: one command, one table, one plot.

    python benchmarks/vectors.py --real indexes/real --rows 1000000 --out /tmp/vectors-1m     # first, see there
    python benchmarks/bench_search.py --vectors /tmp/vectors-1m --methods all --out results.jsonl \\
        --python autofaiss=/tmp/venv/bin/python --python scann=/tmp/venv/bin/python

Each method is built, opened and measured in processes of its own (`search_worker.py`) and its results are appended to
`--out`: a stop loses one step, and the next run goes on. Measuring goes round by round over all methods, `--rounds`
times, so that a busy minute of the machine does not hit one of them alone; what is shown are medians over rounds.
Queries a second: a batch of all queries on `--threads` threads. Milliseconds: queries one by one, one thread.
Methods: `--methods all`, or names separated by commas; kinds of our own are "mmsearch KIND". The libraries beside ours
are not among our dependencies: pip install hnswlib usearch ml_dtypes voyager threadpoolctl; autofaiss, which wants
numpy 1 and a pyarrow below 20, and scann have their own environments here, given by `--python NAME=PATH`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_picture import draw
from search_worker import MODALITIES, TARGET

HERE = Path(__file__).resolve().parent
KINDS = ("auto", "exact", "flat", "sq8", "ivf-flat", "ivf-sq8", "ivf-pq", "opq", "hnsw", "hnsw-sq8", "rabitq")
RIVAL_NAMES = ("hnswlib", "usearch", "voyager", "autofaiss", "scann", "numpy")
HEAD = (
    "method",
    "build s",
    "build peak MB",
    "disk MB",
    "open and first answer ms: warm / cold",
    "in memory then MB: own / mapped",
    "peak of searching MB",
    "setting",
    "text: overlap",
    "q/s",
    "p50 / p99 ms",
    "image: overlap",
    "q/s",
    f"image q/s at {TARGET}",
)
Line = dict[str, Any]
Setting = int | str | list[int]
"""As in JSON."""


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same for all steps. `pythons`: interpreter by method."""

    vectors: Path
    work: Path
    out: Path
    threads: int
    memory: int
    pythons: dict[str, str]

    def step(self, step: str, method: str, *options: str, **more: object) -> Line | None:
        """One worker process; its line, with `more`, is appended to the results. None when it failed."""
        command = [self.pythons.get(method, sys.executable), str(HERE / "search_worker.py"), step, method]
        command += ["--vectors", str(self.vectors), "--work", str(self.work), "--threads", str(self.threads)]
        print(f"{step} {method} {' '.join(options)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [*command, "--memory", str(self.memory), *options], capture_output=True, text=True, env=_environment(self)
        )
        if done.returncode:
            print(f"{method}: {step} failed: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
            return None
        line: Line = {**json.loads(done.stdout.splitlines()[-1]), **more}
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def _environment(run: Run) -> dict[str, str]:
    threads = str(run.threads)
    return {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": str(HERE.parent)}


def read(out: Path) -> list[Line]:
    """The results so far. A last line that a kill cut off is cut off here as well."""
    if not out.exists():
        return []
    whole, _, _ = out.read_text().rpartition("\n")
    os.truncate(out, len(whole.encode()) + 1 if whole else 0)
    return [json.loads(text) for text in whole.splitlines()]


def of(lines: Iterable[Line], step: str, method: str) -> list[Line]:
    """The lines of one step of one method."""
    return [line for line in lines if line["step"] == step and line["method"] == method]


def build_all(run: Run, methods: Iterable[str]) -> list[str]:
    """Build what is not there yet; the methods that are there then."""
    built = []
    for method in methods:
        there = of(read(run.out), "build", method) and (run.work / method.replace(" ", "-")).exists()
        if there or run.step("build", method) is not None:
            built.append(method)
    return built


def measure_all(run: Run, methods: Iterable[str], *, rounds: int) -> None:
    """Sweep each method once a round; later rounds repeat the settings of the first one."""
    for number in range(rounds):
        for method in methods:
            done = of(read(run.out), "measure", method)
            if len(done) > number:
                continue
            options = ["--settings", json.dumps([line["setting"] for line in done[0]["lines"]])] if done else []
            run.step("measure", method, *options, round=number)


def open_all(run: Run, methods: Iterable[str], *, rounds: int) -> None:
    """Open and answer once a process: warm and cold, `rounds` times each, at the setting that reaches the target."""
    for number in range(rounds):
        for method in methods:
            lines = read(run.out)
            if len(of(lines, "open", method)) >= 2 * (number + 1) or not of(lines, "measure", method):
                continue
            at = json.dumps([summary(lines, method)["setting"]])
            for cold in ([], ["--cold"]):
                run.step("open", method, "--settings", at, *cold, round=number)


def curve(lines: Iterable[Line], method: str) -> list[Line]:
    """Per setting the medians over rounds, in order of what text queries find."""
    found: dict[str, list[Line]] = defaultdict(list)
    for measured in of(lines, "measure", method):
        for line in measured["lines"]:
            found[json.dumps(line["setting"])].append(line)

    def middle(same: list[Line], modality: str) -> Line:
        return {key: statistics.median(line[modality][key] for line in same) for key in same[0][modality]}

    points = [
        {"setting": json.loads(setting), **{name: middle(same, name) for name in MODALITIES}}
        for setting, same in found.items()
    ]
    return sorted(points, key=lambda point: (point["text"]["overlap"], -point["text"]["qps"]))


def fastest(points: list[Line], modality: str) -> Line | None:
    """The fastest setting at which queries of that modality reach the target."""
    there = [point for point in points if point[modality]["overlap"] >= TARGET]
    return max(there, key=lambda point: float(point[modality]["qps"]), default=None)


def summary(lines: list[Line], method: str, *, chosen: Setting | None = None) -> Line:
    """One line of the table, at the fastest setting that reaches the target; else at the one that finds most.

    `chosen`: at this setting instead, which the method chose by itself.
    """
    points = curve(lines, method)
    point = fastest(points, "text") or points[-1]
    if chosen is not None:
        point = next(point for point in points if point["setting"] == chosen)
    image = fastest(points, "image")
    build = of(lines, "build", method)[-1]
    opens = of(lines, "open", method)

    def middle(key: str, *, cold: bool) -> float | None:
        values = [line[key] for line in opens if line["cold"] == cold]
        return statistics.median(values) if values else None

    return {
        "method": method if chosen is None else f"{method}, as it chose",
        "build_s": build["seconds"],
        "build_peak": build["peak"],
        "disk": build["disk"],
        "facts": build["facts"],
        "setting": point["setting"],
        "text": point["text"],
        "image": point["image"],
        "image_qps_at_target": image["image"]["qps"] if image and chosen is None else None,
        "first_ms": middle("first_ms", cold=False),
        "first_cold_ms": middle("first_ms", cold=True),
        "anon": middle("anon", cold=False),
        "file": middle("file", cold=False),
        "search_peak": statistics.median(line["peak"] for line in of(lines, "measure", method)),
    }


def own_choice(facts: Line) -> Setting | None:
    """The setting that autofaiss, or our own tuning, chose by itself."""
    if "tuned" in facts:
        return [facts["tuned"]["parameters"][name] for name in ("probes", "effort", "factor")]
    chosen: str | None = facts.get("index_param")
    return chosen


def table(rows: list[Line]) -> str:
    """Markdown, the fastest first."""
    text = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row in sorted(rows, key=lambda row: (row["text"]["overlap"] < TARGET, -row["text"]["qps"])):
        cells = [
            row["method"],
            f"{row['build_s']:,.0f}",
            *(f"{row[name] / 1e6:,.0f}" for name in ("build_peak", "disk")),
            f"{_shown(row['first_ms'])} / {_shown(row['first_cold_ms'])}",
            f"{_shown(row['anon'], 1e6)} / {_shown(row['file'], 1e6)}",
            f"{row['search_peak'] / 1e6:,.0f}",
            str(row["setting"]),
            f"{row['text']['overlap']:.3f}",
            f"{row['text']['qps']:,.0f}",
            f"{row['text']['p50']:.2f} / {row['text']['p99']:.2f}",
            f"{row['image']['overlap']:.3f}",
            f"{row['image']['qps']:,.0f}",
            _shown(row["image_qps_at_target"]),
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _shown(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def machine() -> Line:
    """Where and on what this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Build, measure, open; then the table, the JSON line and the plot of what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vectors", type=Path, required=True, help="folder that vectors.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--work", type=Path, help="folder for the indexes (default: work/ in --vectors)")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=4 * 10**9, help="bytes, told to methods that can be told")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    args = parser.parse_args()
    every = [*(f"mmsearch {kind}" for kind in KINDS), *RIVAL_NAMES]
    methods = every if args.methods == "all" else args.methods.split(",")
    pythons = dict(pair.split("=", 1) for pair in args.python)
    work = args.work or args.vectors / "work"
    run = Run(args.vectors, work, args.out, args.threads, args.memory, pythons)
    methods = build_all(run, methods)
    measure_all(run, methods, rounds=args.rounds)
    open_all(run, methods, rounds=args.rounds)
    lines = read(run.out)
    methods = [method for method in methods if of(lines, "measure", method)]
    rows = [summary(lines, method) for method in methods]
    rows += [summary(lines, row["method"], chosen=own_choice(row["facts"])) for row in rows if own_choice(row["facts"])]
    print(table(rows))
    print(json.dumps({**machine(), "vectors": str(args.vectors), "rows": rows}))
    if args.picture:
        draw({method: curve(lines, method) for method in methods}, args.picture, target=TARGET)


if __name__ == "__main__":
    main()

"""All fusions of the second stage on the same pairs, with the same seed: one table.

    python benchmarks/bench_fusions.py pairs.csv
    python benchmarks/bench_fusions.py pairs.csv --epochs 4 --set rerank.grid=5 --out runs/fusions
    python benchmarks/bench_fusions.py pairs.csv --fusions gated late-interaction
    python benchmarks/bench_fusions.py data/captions.jsonl --split val --set data.val_share=0.25

Columns: parameters in millions, `MB` on disk (weights and graphs), `ms` to read 64 candidates together with one text
of 12 words (tokens in memory, onnxruntime, two threads, median of 20; torch where there are no graphs), hit@1/5/10 both
ways on the held-out pairs, seconds of training. The first row is the first stage alone. All runs share one folder of
views, so pictures are encoded once, by the run that comes first: its seconds hold that. May be run again: what has
ended in --out is read, not trained anew. `hit1.png` in --out draws hit@1 of both ways. The last line is JSON.

--split takes pairs of one split and divides them anew: of those that the towers were not trained on, say, since towers
that know their photos by heart leave a second stage nothing to learn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmsearch.data.pairs import read_pairs
from mmsearch.rerank.checkpoint import GRAPHS, RERANK_WEIGHTS, RerankCheckpoint
from mmsearch.rerank.config import FUSIONS
from mmsearch.rerank.reranker import Reranker
from mmsearch.rerank.tokens import quantise
from mmsearch.train.rerank_run import train_reranker
from mmsearch.train.settings import gathered

QUERY = "two brown dogs run over a wet beach after a red ball"  # 12 words
DEPTH, RUNS, THREADS = 64, 20, 2
WAYS = ("text_to_image", "image_to_text")
SHOWN = ("hit@1", "hit@5", "hit@10")


def of_split(paths: list[str], split: str, folder: Path) -> list[str]:
    """Tables with the pairs of one split and no word of it."""
    found = []
    for number, path in enumerate(paths):
        pairs = read_pairs(path, split=split, on_skip=lambda skipped: None)
        lines = [json.dumps({"image": p.image, "captions": p.captions, "group": p.group}) for p in pairs]
        table = folder / f"pairs-{number}.jsonl"
        table.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        found.append(str(table))
    return found


class Talk:
    """Tells on stderr what a run tells."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """Nothing: a bar for each of seven runs would be seven bars."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """One line."""
        print(f"  {text}", file=sys.stderr, flush=True)


def trained(fusion: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one run, as JSON; of an earlier one that has ended in that folder."""
    report = folder / "report.json"
    if not report.exists():
        print(f"{fusion}:", file=sys.stderr, flush=True)
        given = {
            "rerank.fusion": fusion, "rerank.start": "", "run.seed": options.seed, "run.epochs": options.epochs,
            "run.views_folder": str(folder.parent / "views"), "start.model": options.model,
        }  # fmt: skip
        settings = gathered(
            options.pairs, recipe=None, given={k: v for k, v in given.items() if v is not None}, assignments=options.set
        )
        train_reranker(settings, folder, watcher=Talk())
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def latency_ms(reranker: Reranker) -> float:
    """Median time of one text with 64 pictures whose tokens are at hand; what they hold does not change the work."""
    draw, config, dim = np.random.default_rng(0), reranker.config, reranker.towers.dim
    rows = draw.normal(size=(DEPTH + 1, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    patches = quantise(draw.normal(size=(DEPTH, config.patches, config.patch_dim)).astype(np.float32))
    pairs = np.stack([np.zeros(DEPTH, np.int64), np.arange(DEPTH)], axis=1)
    times = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        words = reranker.read_texts([QUERY])
        reranker.logits(words, rows[:1], patches, rows[1:], pairs=pairs)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])  # the first ones load the graphs


def row_of(fusion: str, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    opened = RerankCheckpoint.open(folder / "best")
    reranker = Reranker.load(folder, backend="onnx" if opened.has_graphs else "torch", device="cpu", threads=THREADS)
    size = sum((opened.directory / name).stat().st_size for name in (RERANK_WEIGHTS, *GRAPHS) if name in opened.files)
    return {
        "fusion": fusion, "parameters": report["parameters"], "bytes": size, "ms": round(latency_ms(reranker), 2),
        "graphs": opened.has_graphs, **shares(report, "after"), "seconds": report["seconds"],
    }  # fmt: skip


def shares(report: dict[str, Any], when: str) -> dict[str, dict[str, float]]:
    """hit@k both ways, "before" (the first stage) or "after"."""
    return {way: {name: report["comparison"][when][way][name] for name in SHOWN} for way in WAYS}


def line(row: dict[str, Any]) -> str:
    """A row for people; hit@k in per cent."""
    hits = "".join(f"{' / '.join(f'{100 * row[way][name]:.1f}' for name in SHOWN):>22}" for way in WAYS)
    if "parameters" not in row:
        return f"{row['fusion']:<18}{'':>8}{'':>8}{'':>8}{hits}"
    million, megabytes = row["parameters"] / 1e6, row["bytes"] / 1e6
    return f"{row['fusion']:<18}{million:>8.2f}{megabytes:>8.1f}{row['ms']:>8.1f}{hits}{row['seconds']:>9.0f}"


def draw(rows: list[dict[str, Any]], png: Path) -> None:
    """Bars of hit@1, both ways, a group of them for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    for shift, way in ((-0.2, WAYS[0]), (0.2, WAYS[1])):
        values = [100 * row[way]["hit@1"] for row in rows]
        bars = axes.bar(places + shift, values, width=0.38, label=way.replace("_to_", " -> "))
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(places, [row["fusion"] for row in rows], fontsize=7)
    axes.set_ylabel("hit@1, per cent", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, framealpha=0.6)
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "commit": commit}


def compared(options: argparse.Namespace, folder: Path) -> None:
    """Train, measure and print; `folder` keeps the runs."""
    print(f"{'':<18}{'M':>8}{'MB':>8}{'ms':>8}{'text -> image':>22}{'image -> text':>22}{'seconds':>9}")
    rows: list[dict[str, Any]] = []
    if options.split is not None:
        options.pairs = of_split(options.pairs, options.split, folder)
    for fusion in options.fusions:
        report = trained(fusion, folder / fusion, options)
        if not rows:
            rows.append({"fusion": "first stage", **shares(report, "before")})
            print(line(rows[0]), flush=True)
        rows.append(row_of(fusion, folder / fusion, report))
        print(line(rows[-1]), flush=True)
    draw(rows, folder / "hit1.png")
    asked = {"split": options.split, "seed": options.seed, "epochs": options.epochs, "set": options.set}
    held = {"trained_on": report["pairs"], "held_out": report["held_out"]}
    print(json.dumps({"bench": "fusions", **asked, **held, "rows": rows, **machine()}))


def main() -> None:
    """Parse and run; without --out everything is forgotten at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", help="pictures with captions, as `mmsearch train` takes them")
    parser.add_argument("--split", help="pairs of this split alone")
    parser.add_argument("--model", help="whose towers are read; the bundled model without it")
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=list(FUSIONS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="as `mmsearch train`")
    parser.add_argument("--out", type=Path, help="a folder that keeps the runs and hit1.png")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        return compared(options, options.out.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        return compared(options, Path(scratch))


if __name__ == "__main__":
    main()

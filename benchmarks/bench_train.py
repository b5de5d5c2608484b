"""Pairs per second and peak memory of a training step, by batch size, with and without gradient caching.

    python benchmarks/bench_train.py                                  # batches of 64, 512, 4096 on the CPU
    python benchmarks/bench_train.py --device cuda --precision bf16 --chunk 256
    python benchmarks/bench_train.py --batches 64 --seconds 5         # a quick look

A step is what `mmsearch train` does with a batch that is already decoded: both towers of the model forward and
backward, everything trained, symmetric InfoNCE over the whole batch, AdamW. Pixels and tokens are made up; their
values do not change the work. `cached` encodes `--chunk` pairs at a time, twice (mmsearch/train/chunked.py).

Each row is a process of its own, so its peak is its own: `peak` is the largest resident size of that process, model,
optimiser and batch included; `gpu` the largest that torch allocated there. What would not fit is not tried: two small
batches say what a pair takes, and a row that asks for more than is free says so instead. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

HEADROOM = 0.9  # of the free memory: an estimate that is a little low must not have the machine kill something else
PROBES = (8, 24)  # pairs
TOKENS = 16  # of a caption; Flickr8k has 14 on average, with both marks
MIB, GIB = 1 << 20, 1 << 30


def step_of(options: argparse.Namespace) -> tuple[Any, int]:
    """(a function: number of pairs -> one whole training step on them, to be called; side of a picture in pixels)."""
    import torch

    from mmsearch.towers.checkpoint import load_dual_encoder
    from mmsearch.towers.locate import locate
    from mmsearch.train.chunked import Side, backward_in_chunks, chunks_of
    from mmsearch.train.losses import InfoNce
    from mmsearch.train.parameters import Tuning, parameter_groups, set_mode

    torch.manual_seed(0)
    model = load_dual_encoder(locate(options.model)[0]).to(options.device)
    everything = {"text": Tuning(), "image": Tuning()}
    optimiser = torch.optim.AdamW(parameter_groups(model, **everything, rate=1e-5, weight_decay=0.01))
    set_mode(model, **everything)
    objective = InfoNce()
    cast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")
    size = model.config.preprocessing.size

    def encode_texts(chunk: Any) -> Any:
        with cast:
            return model.encode_texts(*(tensor.to(options.device) for tensor in chunk)).float()

    def encode_images(chunk: Any) -> Any:
        with cast:
            return model.encode_images(chunk[0].to(options.device)).float()

    def batch(pairs: int) -> tuple[Any, Any, Any]:
        ids = torch.randint(1000, 20000, (pairs, TOKENS))
        return ids, torch.ones_like(ids), torch.randint(0, 256, (pairs, size, size, 3), dtype=torch.uint8)

    def step(data: tuple[Any, Any, Any]) -> float:
        ids, mask, pixels = data
        groups = torch.arange(len(ids), device=options.device)
        chunk = options.chunk if options.cached else len(ids)
        sides = [
            Side(encode_texts, chunks_of(chunk, ids, mask), model.text),
            Side(encode_images, chunks_of(chunk, pixels), model.image),
        ]
        value = backward_in_chunks(
            sides, lambda t, i: objective(t, i, model.logit_scale, text_groups=groups, image_groups=groups)
        )
        optimiser.step()
        optimiser.zero_grad()
        return float(value)  # waits for the device

    return lambda pairs: partial(step, batch(pairs)), size


def one(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process of its own: steps until `--seconds` have passed, at least one, after a small one."""
    import torch

    prepare, size = step_of(options)
    prepare(min(options.pairs, options.chunk))()
    step = prepare(options.pairs)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, loss, started = 0, 0.0, time.perf_counter()
    while not steps or time.perf_counter() - started < options.seconds:
        loss = step()
        steps += 1
    seconds = time.perf_counter() - started
    gpu = {"gpu_mib": torch.cuda.max_memory_allocated() // MIB} if options.device == "cuda" else {}
    rate = round(options.pairs * steps / seconds, 2)
    return {"pairs_per_s": rate, "steps": steps, "peak_mib": peak() // MIB, **gpu, "size": size, "loss": round(loss, 4)}


def peak() -> int:
    """Largest resident size of this process so far, in bytes; of this program alone, not of what started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("bench_train needs VmHWM in /proc/self/status (Linux)")


def free() -> int:
    """Bytes that a process may still take: what the machine has left, or its container, whichever is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    left = [int(lines["MemAvailable"].split()[0]) * 1024]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        left.append(int(limit.read_text()) - int(used.read_text()))
    return min(left)


def run(options: argparse.Namespace, *, pairs: int, cached: bool, seconds: float) -> dict[str, Any]:
    """`one` in a fresh process; {"skipped": why} when it ran out of memory."""
    wanted = {**vars(options), "pairs": pairs, "cached": cached, "seconds": seconds}
    command = [sys.executable, __file__, "--one", json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    words = done.stderr.lower()
    if done.returncode == -signal.SIGKILL or "out of memory" in words or "can't allocate memory" in words:
        return {"skipped": "ran out of memory"}
    raise SystemExit(done.stderr)


def needs(options: argparse.Namespace) -> Any:
    """A function (pairs, cached) -> bytes of resident memory that a row will about need, from two small batches."""
    small, large = (run(options, pairs=pairs, cached=False, seconds=0.0) for pairs in PROBES)
    if "skipped" in small or "skipped" in large:
        raise SystemExit(f"Not even {PROBES[1]} pairs fit into {free() / GIB:.1f} GiB.")
    each = max(large["peak_mib"] - small["peak_mib"], 0) * MIB / (PROBES[1] - PROBES[0])
    pixels = small["size"] ** 2 * 3

    def estimate(pairs: int, cached: bool) -> float:
        if options.device == "cuda":  # there it is tried: running out kills nothing but the row
            return float(small["peak_mib"] * MIB + pairs * pixels)
        at_once = min(pairs, options.chunk) if cached else pairs
        return float(small["peak_mib"] * MIB + (at_once - PROBES[0]) * each + pairs * pixels)

    return estimate


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch, plain and cached."""
    estimate, out = needs(options), []
    for pairs in options.batches:
        for cached in (False, True):
            asked, here = estimate(pairs, cached), free()
            if asked > HEADROOM * here:
                row: dict[str, Any] = {"skipped": f"needs about {asked / GIB:.0f} GiB, {here / GIB:.0f} are free"}
            else:
                row = run(options, pairs=pairs, cached=cached, seconds=options.seconds)
            out.append({"batch": pairs, "cached": cached, **row})
            print(line(out[-1]), flush=True)
    return out


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{row['batch']:>6}  {'cached' if row['cached'] else 'plain':<7}"
    if "skipped" in row:
        return f"{start}  {row['skipped']}"
    gpu = f"{row['gpu_mib']:>8} MiB" if "gpu_mib" in row else f"{'-':>12}"
    return f"{start}{row['pairs_per_s']:>9.1f}{row['peak_mib']:>8} MiB{gpu}{row['steps']:>7}"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "commit": commit}


def main() -> None:
    """Parse, run, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the bundled model without it")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512, 4096], help="pairs of a batch")
    parser.add_argument("--chunk", type=int, default=32, help="pairs that are encoded at once with caching")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seconds", type=float, default=20.0, help="a row goes on for so long, at least one step")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(argparse.Namespace(**json.loads(options.one)))))
        return
    print(f"{'batch':>6}  {'way':<7}{'pairs/s':>9}{'peak':>12}{'gpu':>12}{'steps':>7}")
    asked = {name: getattr(options, name) for name in ("chunk", "device", "precision")}
    print(json.dumps({"bench": "train", **asked, "rows": rows(options), **machine()}))


if __name__ == "__main__":
    main()

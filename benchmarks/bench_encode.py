"""Images per second: the pipeline end to end, its two halves alone, and what people write by hand.

    python benchmarks/bench_encode.py                          # made photos: small ones and 12-megapixel JPEGs
    python benchmarks/bench_encode.py --folder ./photos        # your own, as they are
    python benchmarks/bench_encode.py --peer                   # beside sentence-transformers (pip install it first)

Rows, all in one run on one machine, in images per second of wall time:
  decode      the loader alone: read, decode at reduced scale, rotate, resize (all cores)
  model       the image tower alone, pixels ready in memory (all cores)
  pipeline    both, overlapped, as `build` runs them
  index       `mmsearch.build` into a fresh directory, everything included
  loop 1/32   PIL open, convert, resize, torch forward in float32, one by one and in batches of 32
  pil decode  PIL's full decode and bicubic resize on one core, beside `decode one`, ours on one core
On a machine without a GPU both halves want the same cores: the best a pipeline can do is
1 / (1 / decode + 1 / model), printed as `bound`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmsearch import Encoder, build
from mmsearch.data.images import open_image, prepare
from mmsearch.data.loading import Loaded, Loader


def made_photo(width: int, height: int, *, seed: int) -> Image.Image:
    """A picture with the detail of a photo: smooth structure at many scales and a little noise."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.float32)
    for cells in (4, 12, 40, 120, 400):
        grid = rng.normal(0, 90 / cells**0.45, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            out[..., channel] += np.asarray(layer)
    out += rng.normal(0, 3, out.shape).astype(np.float32)
    return Image.fromarray(np.clip(out + 120, 0, 255).astype(np.uint8))


def made_folder(folder: Path, *, count: int, width: int, height: int) -> list[str]:
    """`count` JPEGs; a few different pictures, each stored under several names with another quality."""
    folder.mkdir(parents=True)
    originals = [made_photo(width, height, seed=seed) for seed in range(min(count, 6))]
    for i in range(count):
        originals[i % len(originals)].save(folder / f"{i:05d}.jpg", quality=88 + i // len(originals) % 6)
    return [str(path) for path in sorted(folder.iterdir())]


def rate(count: int, work: Callable[[], object]) -> float:
    """Images per second of one run."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def decode_all(paths: list[str], encoder: Encoder) -> Iterator[np.ndarray]:
    """Every picture through the loader."""
    with Loader(preprocessing=encoder.preprocessing) as loader:
        for one in loader.load(enumerate(paths)):
            if isinstance(one, Loaded):
                yield one.pixels


def pipeline(paths: list[str], encoder: Encoder, *, batch: int = 32) -> int:
    """Decode ahead, encode in batches, keep nothing."""
    waiting: list[np.ndarray] = []
    done = 0
    for pixels in decode_all(paths, encoder):
        waiting.append(pixels)
        if len(waiting) == batch:
            done += len(encoder.encode_pixels(np.stack(waiting))[0])
            waiting = []
    return done + (len(encoder.encode_pixels(np.stack(waiting))[0]) if waiting else 0)


def by_us(path: str, encoder: Encoder) -> np.ndarray:
    """What a decoding worker does."""
    return prepare(open_image(path, target=encoder.preprocessing.size)[0], encoder.preprocessing)


def by_pil(path: str, size: int) -> Image.Image:
    """Open, decode in full, resize."""
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def plain_loop(paths: list[str], model: Any, *, size: int, batch: int) -> None:
    """What a notebook does."""
    import torch

    with torch.inference_mode():
        for start in range(0, len(paths), batch):
            images = [np.asarray(by_pil(path, size)) for path in paths[start : start + batch]]
            model.encode_images(torch.from_numpy(np.stack(images)))


def bench(paths: list[str], encoder: Encoder, *, loops: int) -> dict[str, float]:
    """All rows for one set of files."""
    from mmsearch.towers.checkpoint import load_dual_encoder
    from mmsearch.towers.locate import locate

    size = encoder.preprocessing.size
    few = paths[: min(64, len(paths))]
    ready = np.stack([by_us(path, encoder) for path in few])
    encoder.encode_pixels(ready[:8])  # loads the tower
    rows: dict[str, float] = {}
    rows["decode"] = rate(len(paths), lambda: sum(1 for _ in decode_all(paths, encoder)))
    rows["model"] = rate(4 * len(ready), lambda: [encoder.encode_pixels(ready) for _ in range(4)])
    rows["bound"] = 1 / (1 / rows["decode"] + 1 / rows["model"])
    rows["pipeline"] = rate(len(paths), lambda: pipeline(paths, encoder))
    with tempfile.TemporaryDirectory() as scratch:
        rows["index"] = rate(len(paths), lambda: build(paths, Path(scratch) / "index", encoder=encoder))
    model = load_dual_encoder(locate(None)[0])
    for batch in (1, 32):
        some = paths[:loops]
        rows[f"loop {batch}"] = rate(len(some), lambda b=batch, s=some: plain_loop(s, model, size=size, batch=b))
    rows["decode one"] = rate(len(few), lambda: [by_us(path, encoder) for path in few])
    rows["pil decode"] = rate(len(few), lambda: [by_pil(path, size) for path in few])
    rows["index / loop 1"] = rows["index"] / rows["loop 1"]
    rows["index / loop 32"] = rows["index"] / rows["loop 32"]
    rows["decode / pil"] = rows["decode one"] / rows["pil decode"]
    rows["pipeline / bound"] = rows["pipeline"] / rows["bound"]
    return {name: round(value, 2) for name, value in rows.items()}


def random_clip(directory: Path) -> Path:
    """CLIP ViT-B/32 with random weights, as transformers saves it: speed does not depend on what it knows."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from mmsearch.testing import tiny_tokenizer_json

    CLIPModel(CLIPConfig()).save_pretrained(directory)
    CLIPImageProcessor().save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json())
    return directory


def peer(paths: list[str]) -> dict[str, float]:
    """sentence-transformers and mmsearch with the same randomly initialised CLIP ViT-B/32, saved to disk."""
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as scratch:
        directory = random_clip(Path(scratch) / "clip")
        theirs = SentenceTransformer(str(directory))
        images = lambda: [Image.open(p) for p in paths]  # noqa: E731 - read anew in each run
        ours = Encoder.load(directory)
        ours.encode_images([Path(paths[0])])
        theirs.encode(images()[:2])
        rows = {
            "sentence-transformers": rate(len(paths), lambda: theirs.encode(images(), batch_size=32)),
            "mmsearch": rate(len(paths), lambda: pipeline(paths, ours)),
        }
    return {name: round(value, 2) for name, value in rows.items()}


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": commit}


def main() -> None:
    """Parse, run, print one JSON line a set of photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="pictures to use as they are")
    parser.add_argument("--small", type=int, default=480, help="how many 500 x 375 JPEGs")
    parser.add_argument("--large", type=int, default=120, help="how many 4032 x 3024 JPEGs")
    parser.add_argument("--loops", type=int, default=96, help="how many pictures the plain loops get")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    encoder = Encoder.load()
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder:
            sets = {"folder": sorted(str(p) for p in Path(options.folder).rglob("*") if p.is_file())}
        else:
            sets = {
                "small": made_folder(Path(scratch) / "small", count=options.small, width=500, height=375),
                "12 MP": made_folder(Path(scratch) / "large", count=options.large, width=4032, height=3024),
            }
        for name, paths in sets.items():
            if not paths:
                continue
            rows = bench(paths, encoder, loops=options.loops)
            print(json.dumps({"photos": name, "count": len(paths), **rows, **machine()}), flush=True)
            if options.peer:
                print(json.dumps({"photos": name, "peer": peer(paths[: options.loops])}), flush=True)


if __name__ == "__main__":
    main()

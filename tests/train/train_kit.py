"""A tiny run: pictures of two colours with captions that say them, a tiny start, and settings that end in a second."""

import csv
import itertools
import json
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from mmsearch.testing import COLORS, TINY_CONFIG, tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.encoding import TowerPass
from mmsearch.train.settings import TrainSettings, settings_from

CPU = torch.device("cpu")
PAIRS = [(inner, outer) for inner, outer in itertools.product(COLORS, COLORS) if inner != outer]
_WORDS = ["red", "green", "blue", "a", "photo", "of", "dog", "cat"]


# Towers


def tokeniser() -> Tokeniser:
    return Tokeniser(Tokenizer.from_str(tiny_tokenizer_json()), max_tokens=12)


def tokens(texts) -> tuple[torch.Tensor, torch.Tensor]:
    made = tokeniser()(texts)
    return torch.from_numpy(made.ids), torch.from_numpy(made.mask)


def passes(model=None, *, dtype=torch.float32, **options) -> TowerPass:
    return TowerPass(model or tiny_dual_encoder(), dtype=dtype, device=CPU, **options)


def some_captions(count: int) -> list[str]:
    """Of one to eight words."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(_WORDS, draw.integers(1, 9))) for _ in range(count)]


def pixels(count: int, *, seed: int = 0) -> torch.Tensor:
    """(count, 32, 32, 3) noise."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw)


# Runs


def picture(path: Path, inner: str, outer: str, *, seed: int) -> str:
    """A square of one colour in a frame of another, with noise."""
    draw = np.random.default_rng(seed)
    pixels = np.empty((40, 40, 3), np.float64)
    pixels[:] = COLORS[outer]
    pixels[8:32, 8:32] = COLORS[inner]
    pixels += draw.normal(scale=12.0, size=pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def table(folder: Path, count: int = 16, *, captions: int = 2, val: int = 4, broken: int = 0) -> str:
    """A CSV of `count` pictures, the last `val` of them for validation and the first `broken` no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, place in enumerate(np.random.default_rng(1).permutation(len(PAIRS))[:count]):
        inner, outer = PAIRS[place]
        path = picture(folder / f"{i:02d}.png", inner, outer, seed=i)
        if i < broken:
            Path(path).write_bytes(b"\x89PNG\r\n\x1a\n but no more")
        texts = [f"a {inner} car on the {outer} beach", f"the {inner} dog on {outer}", f"photo of a {inner} cat"]
        rows += [(path, text, "val" if i >= count - val else "train") for text in texts[:captions]]
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image", "caption", "split"), *rows])
    return str(folder / "pairs.csv")


def anew(folder: Path, **config) -> dict:
    """`[start]` of towers from random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    return {"model": "", "config": {**TINY_CONFIG, **config}, "tokenizer": str(folder / "tokenizer.json")}


def settings(pairs: str, **sections) -> TrainSettings:
    """Three epochs in batches of four, decoded in this process; sections as in a recipe replace single values."""
    run = {"epochs": 3, "batch_size": 4, "lr": 1e-3, "views": 0, "graphs": False, "wise": False,
           "device": "cpu", "precision": "fp32"}  # fmt: skip
    values = {"source": [{"path": pairs}], "data": {"workers": 0}, "run": run, "image": {"train": "all"}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return settings_from(values)


def journal(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in lines]


def losses(out: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in journal(out) if "loss" in line]


class Stop(Exception):  # noqa: N818 - not an error: somebody pressed Ctrl-C
    """A run was interrupted on purpose."""


class Watch:
    """Follows a run and remembers its notes; raises `Stop` at step `stop`, or at a note that begins with `at`."""

    def __init__(self, stop: int | None = None, *, at: str | None = None) -> None:
        self.stop, self.at, self.notes, self.steps = stop, at, [], 0

    def start(self, total, *, what="", unit=""):
        self.steps = 0

    def advance(self, n, *, note=""):
        if note:  # a step, not a picture
            self.steps += n
            if self.steps == self.stop:
                raise Stop

    def note(self, text):
        self.notes.append(text)
        if self.at is not None and text.startswith(self.at):
            raise Stop


def as_rank(rank: int, port: int, values: list[dict], out: str) -> None:
    """The body of one of two processes that train together, run after run; the last one is interrupted once."""
    from mmsearch.train.run import train

    torch.set_num_threads(1)
    plan = [(number, None) for number in range(len(values))]
    plan.insert(-1, (len(values) - 1, 4))
    for turn, (number, stop) in enumerate(plan):
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port + turn)}  # fmt: skip
        try:
            train(settings_from(values[number]), f"{out}/{number}", environ=environ, watcher=Watch(stop=stop))
        except (Stop, RuntimeError):  # the main rank was stopped, and the other one was left alone
            if stop is None:
                raise


def free_port() -> int:
    """The first of some ports that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

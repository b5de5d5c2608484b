"""A GPU trains and encodes as a CPU does; skipped without one."""

import random

import numpy as np
import pytest
import torch
from train_kit import Watch, anew, journal, losses, settings, table

from mmsearch.encoder import Encoder
from mmsearch.rerank.checkpoint import RerankCheckpoint
from mmsearch.testing import TINY_CONFIG
from mmsearch.train.augment import Augmentation, draw_view
from mmsearch.train.rerank_run import train_reranker
from mmsearch.train.resident import make_views
from mmsearch.train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAIN = {"crop": 1.0, "ratio": 1.0, "flip": 0.0, "colour": 0.0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return table(tmp_path_factory.mktemp("pictures"), 30, val=10, broken=1)


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Devices draw other random numbers."""


def run(pairs, folder, *, device, captions, resident=True):
    """Losses and notes of a short run in full precision, of plain pictures and without dropout."""
    watch, out = Watch(), folder / f"{device} {resident}"
    text = {**TINY_CONFIG["text"], "backbone": {**TINY_CONFIG["text"]["backbone"], **STILL}}
    chosen = settings(
        pairs, start=anew(folder, text=text), data={"captions": captions}, augment=PLAIN,
        run={"device": device, "ema": 0.9, "epochs": 2, "precision": "fp32", "resident": resident},
    )  # fmt: skip
    train(chosen, out, watcher=watch)
    return losses(out), watch.notes


@pytest.mark.parametrize("captions", [1, 2])
def test_a_run_takes_the_steps_of_one_on_a_cpu(captions, pairs, tmp_path):
    """Pictures that the GPU holds give the losses that decoded ones give, there and on a CPU."""
    held, notes = run(pairs, tmp_path, device="cuda", captions=captions)
    assert any("in the GPU's memory" in note for note in notes)
    assert held == pytest.approx(run(pairs, tmp_path, device="cuda", captions=captions, resident=False)[0], rel=0.01)
    assert held == pytest.approx(run(pairs, tmp_path, device="cpu", captions=captions)[0], rel=0.02)


def test_random_views_and_bfloat16_run(pairs, plain_checkpoint, tmp_path):
    """Crops, mirror images and colours made on the device; the losses are numbers and the checkpoint is there."""
    chosen = settings(
        pairs, start={"model": str(plain_checkpoint.directory)}, augment={"crop": 0.3, "word_drop": 0.2},
        run={"device": "cuda", "precision": "bf16", "epochs": 2}, data={"captions": 2},
    )  # fmt: skip
    report = train(chosen, tmp_path / "out")
    assert np.isfinite(losses(tmp_path / "out")).all() and (report.checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize("fusion", ["late-interaction", "cross-attention"])
def test_a_second_stage_trains(fusion, pairs, plain_checkpoint, tmp_path):
    """With an image backbone of its own and without; its probabilities are fitted and stored."""
    tiny = {"patch_dim": 8, "grid": 2, "hidden": 8, "bank": 16, "val_pictures": 8, "val_texts": 12, "depth": 8}
    own = 2 if fusion == "late-interaction" else 0
    chosen = settings(
        pairs, start={"model": str(plain_checkpoint.directory)}, rerank={**tiny, "fusion": fusion, "image_train": own},
        run={"device": "cuda", "precision": "bf16", "epochs": 2}, data={"captions": 2},
    )  # fmt: skip
    train_reranker(chosen, tmp_path / "out")
    assert np.isfinite([line["loss"] for line in journal(tmp_path / "out") if "loss" in line]).all()
    assert RerankCheckpoint.open((tmp_path / "out" / "best").resolve()).config.fusion == fusion


def test_rows_are_those_of_a_cpu(graph_checkpoint):
    """Pictures and texts by a model on the GPU against the same model on the CPU."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    texts = ["a red dog", "the blue cat on the beach", "a"]
    gpu, cpu = (Encoder.load(graph_checkpoint.directory, device=device) for device in ("cuda", "cpu"))
    for own, other in (
        (gpu.encode_pixels(pictures)[0], cpu.encode_pixels(pictures)[0]),
        (gpu.encode_texts(texts), cpu.encode_texts(texts)),
    ):
        assert np.einsum("nd,nd->n", own, other).min() > 0.99


def test_views_are_those_of_a_cpu():
    """Crops, mirror images and colours, but for rounding."""
    canvases = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8))
    chosen = Augmentation(crop=0.3, colour=0.4)
    views = [draw_view((40, 40), chosen, random.Random(seed)) for seed in range(6)]
    gpu, cpu = (make_views(canvases.to(device), views, size=32).cpu().int() for device in ("cuda", "cpu"))
    assert (gpu - cpu).abs().max() <= 1

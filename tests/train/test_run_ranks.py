"""Two processes that train together: the losses and the model of one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from train_kit import anew, as_rank, free_port, losses, settings, table

from mmsearch.testing import TINY_CONFIG
from mmsearch.train.run import train

pytestmark = pytest.mark.slow

NO_DROPOUT = {**TINY_CONFIG["text"]["backbone"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def cases(folder: Path):
    """What must be alike: plain; everything at once, with shares of unlike length; and a run that is interrupted."""
    names = folder / "names.txt"
    names.write_text("dog\ncat\ncar\nbeach\nred\n")
    start = anew(folder, text={**TINY_CONFIG["text"], "backbone": NO_DROPOUT})
    pairs = table(folder / "pictures", 12, captions=3)
    broken = table(folder / "broken", 20, captions=3, broken=3)
    run = {"epochs": 2, "save_seconds": 0.0}
    yield settings(pairs, start=start, run=run, objective={"keep_classes": 0.0})
    yield settings(
        broken, start={**start, "anchor_prompts": str(names), "item": "gated"},
        run={**run, "epochs": 4, "chunk": 1, "accumulate": 2, "ema": 0.0, "batch_size": 6, "anchor_refresh": 3},
        objective={"name": "sigmoid", "hard_negatives": 2, "mine_from": 0, "keep_classes": 0.0},
    )  # fmt: skip
    yield settings(pairs, start=start, run={**run, "epochs": 3}, objective={"keep_classes": 0.0})


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(the folder of one process, the folder of two); the last run of two was stopped and gone on with."""
    folder = tmp_path_factory.mktemp("ranks")
    chosen = list(cases(folder))
    for number, one in enumerate(chosen):
        train(one, folder / "one" / str(number))
    values = [one.to_json() for one in chosen]
    torch.multiprocessing.spawn(as_rank, args=(free_port(), values, str(folder / "two")), nprocs=2)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_processes_take_the_steps_of_one(number, together):
    """The same losses to rounding: negatives of both, averaged gradients, mined rows, names, items; also resumed."""
    one, two = together
    expected = losses(one / str(number))
    assert len(expected) >= 4
    assert losses(two / str(number)) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_processes_end_with_the_model_of_one(number, together):
    """One checkpoint, written by the first of them, near to the other's in every weight."""
    one, two = together
    first, second = (load_file(folder / str(number) / "best" / "model.safetensors") for folder in (one, two))
    for name in first:
        if not name.endswith(".q8"):
            gap = np.abs(first[name].astype(np.float32) - second[name].astype(np.float32)).max()
            assert gap < 0.02, name
    assert (two / str(number) / "report.json").exists()

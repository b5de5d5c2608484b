"""The course of a run: the same numbers whether it was interrupted or not, and from the seed alone."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from train_kit import Stop, Watch, anew, journal, losses, settings, table

from mmsearch.testing import tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.checkpoint import load_dual_encoder, save_checkpoint
from mmsearch.train.run import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pictures to train on, three captions each, and four held out."""
    return table(tmp_path_factory.mktemp("pictures"), 16, captions=3)


@pytest.fixture(scope="module")
def start(plain_checkpoint):
    return {"model": str(plain_checkpoint.directory)}


def everything(pairs: str, start: dict, **sections):
    """Average, word drop, hard negatives from the second epoch on, dropout of features, accumulation; saved always."""
    run = {"ema": 0.9, "feature_dropout": 0.2, "batch_size": 2, "accumulate": 2, "save_seconds": 0.0, "lr": 0.02,
           "anchor_refresh": 2, "seed": 2, **sections.pop("run", {})}  # fmt: skip
    objective = {"hard_negatives": 2, "mine_from": 1, "name": "info_nce+max_hinge"}
    return settings(
        pairs, start=start, run=run, objective=objective, augment={"word_drop": 0.3},
        image={"train": "all"}, text={"train": "all"}, **sections,
    )  # fmt: skip


def weights(out: Path) -> dict:
    return load_file(out / "best" / "model.safetensors")


def same_end(one: Path, other: Path) -> None:
    """The same journal, line by line, and bit-equal weights of the best checkpoint."""
    assert journal(one) == journal(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.fixture(scope="module")
def undisturbed(pairs, start, tmp_path_factory):
    """Three epochs of three steps that nothing came between."""
    out = tmp_path_factory.mktemp("undisturbed") / "o"
    train(everything(pairs, start), out)
    assert len(losses(out)) == 9
    return out


@pytest.mark.parametrize(
    ("stop", "at", "save_seconds"),
    [
        (1, None, 0.0),  # before anything was saved
        (5, None, 0.0),  # in the middle of the second epoch, with its mined negatives
        (6, None, 0.0),  # at its last step
        (8, None, 1e6),  # saved at the border before it alone: the lines of two steps are written again
        (None, "epoch 2: text", 0.0),  # measured, kept as the best and told, but not saved
        (None, "epoch 3: mining", 0.0),  # saved at the border, nothing of the epoch done
        (None, "writing the checkpoint", 0.0),  # all steps done
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(stop, at, save_seconds, pairs, start, undisturbed, tmp_path):
    """Wherever it stopped: the same losses, scores and bits."""
    chosen = everything(pairs, start, run={"save_seconds": save_seconds})
    with pytest.raises(Stop):
        train(chosen, tmp_path / "o", watcher=Watch(stop=stop, at=at))
    train(chosen, tmp_path / "o")
    same_end(tmp_path / "o", undisturbed)


def test_a_run_may_be_interrupted_again_and_again(start, tmp_path):
    """After each step, in a process that has done other things between; without held-out pairs the last is the best."""
    pairs = table(tmp_path / "d", 12, captions=3, val=0)
    chosen = everything(pairs, start, data={"val_share": 0})
    train(chosen, tmp_path / "undisturbed")
    for _ in range(20):
        try:
            train(chosen, tmp_path / "o", watcher=Watch(stop=2))
        except Stop:
            continue
        break
    else:
        pytest.fail("it did not end")
    same_end(tmp_path / "o", tmp_path / "undisturbed")


def test_a_run_from_nothing_with_frozen_backbones_goes_on_too(pairs, tmp_path):
    """Random towers with the sigmoid's own parameter, kept captions, backbones that start late, bfloat16, chunks."""
    chosen = settings(
        pairs, start=anew(tmp_path), objective={"name": "sigmoid"}, text={"train": "head"}, image={"train": 1},
        run={"precision": "bf16", "chunk": 3, "backbone_start": 0.4, "save_seconds": 0.0, "epochs": 2},
    )  # fmt: skip
    train(chosen, tmp_path / "a")
    with pytest.raises(Stop):
        train(chosen, tmp_path / "b", watcher=Watch(stop=4))
    train(chosen, tmp_path / "b")
    same_end(tmp_path / "a", tmp_path / "b")


_RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from train_kit import settings_from
from mmsearch.train.run import train
train(settings_from(json.loads(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(pairs, start, tmp_path):
    """SIGKILL of a process at a random moment of its steps, with kept views; then the same command."""
    chosen = settings(
        pairs, start=start, image={"train": 1}, augment={"word_drop": 0.3},
        run={"views": 2, "ema": 0.9, "batch_size": 3, "save_seconds": 0.0, "epochs": 8, "patience": 0},
    )  # fmt: skip
    train(chosen, tmp_path / "a")
    command = [sys.executable, "-c", _RUN, str(HERE), json.dumps(chosen.to_json()), str(tmp_path / "b")]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, stderr=subprocess.DEVNULL
    )
    wanted, lines, deadline = random.randrange(2, 16), tmp_path / "b" / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") > wanted:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    watch = Watch()
    train(chosen, tmp_path / "b", watcher=watch)
    assert any(note.startswith("going on at epoch") for note in watch.notes)
    same_end(tmp_path / "b", tmp_path / "a")


# From the seed alone


def short(pairs, start, **sections):
    return everything(pairs, start, **{"run": {"epochs": 2, "seed": sections.pop("seed", 0)}, **sections})


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(pairs, start, tmp_path):
    """Losses and weights, to the bit."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(short(pairs, start, seed=seed), tmp_path / name)
    same_end(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_the_number_of_workers_changes_nothing(pairs, start, tmp_path):
    """Decoded here or in two processes; none of them is left behind."""
    for name, workers in (("a", 0), ("b", 2)):
        train(short(pairs, start, data={"workers": workers}), tmp_path / name)
    same_end(tmp_path / "a", tmp_path / "b")
    assert not _children()


def test_an_error_in_a_step_leaves_no_worker_behind(pairs, start, tmp_path):
    """Also while the traceback is held, as it is here."""
    with pytest.raises(Stop) as caught:
        train(short(pairs, start, data={"workers": 1}), tmp_path / "a", watcher=Watch(stop=1))
    assert not _children()
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]
    assert caught.value is not None


def _children() -> list[str]:
    """Decode workers of this process."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[1]
            command = (place / "cmdline").read_text()
        except OSError:  # it ended meanwhile
            continue
        if parent == str(os.getpid()) and "mmsearch" in command:
            found.append(command)
    return found


# When to stop


def test_a_run_ends_early_when_it_gets_no_better(pairs, start, tmp_path):
    """Two epochs without a better score; the best epoch's model is what is kept."""
    chosen = settings(pairs, start=start, run={"epochs": 30, "patience": 2, "lr": 1e-9, "ema": 0.0})
    report = train(chosen, tmp_path / "o")
    assert (report.epochs, report.best_epoch) == (3, 1)
    assert report.steps == 9


def test_a_number_of_steps_ends_a_run_in_the_middle_of_an_epoch(pairs, start, tmp_path):
    """`run.max_steps` measures and keeps what there is; the schedule knows of it."""
    report = train(settings(pairs, start=start, run={"max_steps": 4, "warmup": 0.0}), tmp_path / "o")
    assert (report.steps, report.epochs) == (4, 2)
    rates = [line["learning_rate"] for line in journal(tmp_path / "o") if "loss" in line]
    assert rates[0] > rates[-1] * 4


def test_weights_between_before_and_after_are_weighed_on_the_held_out_pairs(pairs, start, tmp_path):
    """A run that ruins the model ends with the model as it was, says so, and nothing got worse."""
    watch = Watch()
    chosen = settings(pairs, start=start, run={"wise": True, "lr": 1.0, "warmup": 0.0, "epochs": 1, "ema": 0.0})
    report = train(chosen, tmp_path / "o", watcher=watch)
    assert any(note.startswith("share of the new weights") for note in watch.notes)
    found = report.comparison
    assert found.after.text_to_image.values["hit@5"] >= found.before.text_to_image.values["hit@5"] - 0.3
    assert 0.0 <= report.share <= 1.0


def test_a_temperature_past_its_bound_comes_back(pairs, tmp_path):
    """There it would have no gradient, and never learn again."""
    model = tiny_dual_encoder()
    with torch.no_grad():
        model.log_logit_scale.fill_(10.0)
    save_checkpoint(model, tmp_path / "hot", tokenizer_json=tiny_tokenizer_json(), name="hot", card="", graphs=False)
    train(settings(pairs, start={"model": str(tmp_path / "hot")}, run={"epochs": 1, "ema": 0.0}), tmp_path / "o")
    found = float(load_dual_encoder(tmp_path / "o" / "best").log_logit_scale.detach())
    assert math.log(50) < found <= math.log(100) + 1e-4


class Keeping(Watch):
    """Remembers the weights behind `best` each time there are better ones."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out, self.best = out, []

    def note(self, text):
        super().note(text)
        if "best so far" in text:
            self.best.append(load_file(self.out / "best" / "model.safetensors"))


def test_the_model_of_the_best_epoch_is_what_a_run_ends_with(pairs, start, tmp_path):
    """Not that of the last one, which a rate that is far too high has ruined."""
    chosen = settings(pairs, start=start, run={"epochs": 6, "lr": 1.0, "ema": 0.0, "patience": 0, "schedule": "linear"})
    watch = Keeping(tmp_path / "o")
    report = train(chosen, tmp_path / "o", watcher=watch)
    assert (report.best_epoch < report.epochs, report.share) == (True, 1.0)
    found, kept = weights(tmp_path / "o"), watch.best[-1]
    assert all(found[name].tobytes() == kept[name].tobytes() for name in kept)

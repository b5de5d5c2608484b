"""`train`: from pairs and a start to a checkpoint, a report and a picture; and how it says no."""

import json
import os
import stat
from dataclasses import replace

import filelock
import pytest
from PIL import Image
from train_kit import Stop, Watch, anew, losses, settings, table

from mmsearch.encoder import Encoder
from mmsearch.errors import InputError, ModelError, ResourceError, UsageError
from mmsearch.evaluate.comparison import Verdict
from mmsearch.towers.checkpoint import Checkpoint, load_dual_encoder
from mmsearch.train.card import card_of
from mmsearch.train.examples import Examples, read_examples
from mmsearch.train.run import _check_ranks, train
from mmsearch.train.settings import settings_from
from mmsearch.types import Pair, SkipReason

LINEAR = {"backbone": "plain_cnn:8,16", "projection": {"kind": "linear"}}
PLAIN = {"crop": 1.0, "flip": 0, "colour": 0}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(folder, report, notes) of a run from random numbers that has something to learn; graphs are written."""
    home = tmp_path_factory.mktemp("learned")
    pairs = table(home / "pictures", 56, val=16, broken=1)
    chosen = settings(
        pairs, start=anew(home, image=LINEAR), text={"rate": 1.0}, image={"rate": 1.0}, augment=PLAIN,
        run={"epochs": 6, "batch_size": 10, "lr": 3e-3, "ema": 0.0, "graphs": True},
    )  # fmt: skip
    watch = Watch()
    return home / "mine", train(chosen, home / "mine", watcher=watch), watch.notes


def test_a_run_learns_what_there_is_to_learn(learned):
    """From random numbers: the loss falls to a third, and held-out captions find their pictures, beyond chance."""
    out, report, _ = learned
    found = losses(out)
    assert len(found) == report.steps == 24
    assert sum(found[-4:]) < sum(found[:4]) / 2
    change = report.comparison.differences["text_to_image"]["hit@5"]
    assert change.before < 0.5 < 0.6 < change.after
    assert change.verdict is Verdict.RISES


def test_its_folder_stands_for_the_best_checkpoint(learned):
    """By the folder's name or the link's, with graphs; texts and pictures come out as unit rows."""
    out, report, _ = learned
    assert report.checkpoint == out / "best"
    opened = Checkpoint.open(out / "best")
    assert (opened.name, opened.has_graphs) == ("mine", True)
    encoder = Encoder.load(str(out), backend="onnx")
    assert encoder.identity == Encoder.load(out / "best").identity
    assert encoder.encode_texts(["a red car"]).shape == (1, 8)
    assert encoder.encode_images([Image.new("RGB", (40, 40), (255, 0, 0))]).shape == (1, 8)


def test_it_leaves_what_the_manual_says_and_nothing_else(learned):
    """One checkpoint, the journal, the picture, settings and report; the state of the run is gone."""
    out, _, _ = learned
    names = {path.name for path in out.iterdir()} - {"tensorboard"}  # an extra
    (kept,) = [name for name in names if name.startswith("epoch-")]
    assert names == {"best", kept, "metrics.jsonl", "curves.png", "settings.json", "report.json", "held_out.jsonl",
                     ".lock"}  # fmt: skip
    with Image.open(out / "curves.png") as drawn:
        assert min(drawn.size) > 200


def test_the_report_on_disk_is_the_one_that_is_returned(learned):
    """As JSON; pictures that were left out are counted once, whoever met them."""
    out, report, notes = learned
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert (report.pairs, report.held_out, report.epochs) == (40, 16, 6)
    assert [(one.path.rpartition("/")[2], one.reason) for one in report.skipped] == [("00.png", SkipReason.TRUNCATED)]
    assert sum(note.startswith("skipped") for note in notes) == 1
    assert any("coarse" in warning for warning in report.warnings)


def test_the_journal_has_every_step_and_every_validation(learned):
    """The first line is the model before; loss, rate, temperature, speed; hit@k both ways."""
    out, report, _ = learned
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert steps[0].keys() >= {"loss", "logit_scale", "learning_rate", "pairs_per_s", "epoch"}
    measured = [line for line in lines if "val/text_to_image/hit@5" in line]
    assert [line["step"] for line in measured] == [0, 4, 8, 12, 16, 20, 24]
    before = report.comparison.before.text_to_image.values["hit@5"]
    assert measured[0]["val/text_to_image/hit@5"] == before


def test_anchors_are_set_after_the_model_before_was_measured(plain_checkpoint, tmp_path):
    """What the settings make of them is part of what the run did, and of what it stores."""
    pairs, reports = table(tmp_path / "pictures", 16, val=8), []
    for name, wanted in (("plain", {}), ("peaked", {"anchor_peak": 0.5, "anchor_boost": 50.0})):
        chosen = settings(
            pairs, start={"model": str(plain_checkpoint.directory), **wanted}, run={"epochs": 1, "lr": 1e-9},
        )  # fmt: skip
        reports.append(train(chosen, tmp_path / name).comparison)
    plain, peaked = reports
    stored, given = (
        float(load_dual_encoder(one).image.anchors.scale.detach())
        for one in (tmp_path / "peaked" / "best", plain_checkpoint)
    )
    assert stored == pytest.approx(50.0 * given, rel=1e-3)  # also in the average of the steps
    assert peaked.before.figures() == plain.before.figures() != peaked.after.figures()
    assert Checkpoint.open(tmp_path / "peaked" / "best").config.image.anchors.peak == 0.5


def test_curves_are_drawn_while_a_run_goes_on(plain_checkpoint, tmp_path, monkeypatch):
    """After an epoch, not only at the end."""
    monkeypatch.setattr("mmsearch.train.curves.SELDOM_S", 0.0)
    chosen = settings(table(tmp_path / "pictures", 12), start={"model": str(plain_checkpoint.directory)})
    with pytest.raises(Stop):
        train(chosen, tmp_path / "mine", watcher=Watch(at="epoch 2"))
    assert (tmp_path / "mine" / "curves.png").exists()


def test_the_figures_are_those_of_the_checkpoint_as_it_is_stored(learned):
    """Half precision and the 8-bit table included: the card shows them, and `eval` finds the same."""
    from mmsearch.evaluate.evaluator import evaluate_file

    out, report, _ = learned
    settings_of = json.loads((out / "settings.json").read_text())
    found = evaluate_file(settings_of["source"][0]["path"], encoder=Encoder.load(str(out)), split="val", workers=1)
    after = report.comparison.after
    assert found.text_to_image.values == pytest.approx(after.text_to_image.values, abs=0.07)  # a rank may tip over
    card = (out / "best" / "README.md").read_text()
    assert all(line in card for line in report.comparison.lines())
    assert settings_from(settings_of).run.epochs == 6


def test_a_run_that_has_ended_is_left_alone_unless_forced(learned, plain_checkpoint, tmp_path):
    """Nothing is written into it; with `force` it begins anew and the old best stays until there is a new one."""
    out, _, _ = learned
    before = (out / "report.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"has ended.*--force"):
        train(settings("no such file.csv"), out)
    assert (out / "report.json").stat().st_mtime_ns == before
    chosen = settings(
        table(tmp_path, 6, val=0), start={"model": str(plain_checkpoint.directory)}, data={"val_share": 0},
                      run={"epochs": 1})  # fmt: skip
    train(chosen, tmp_path / "a")
    with pytest.raises(UsageError):
        train(chosen, tmp_path / "a")
    assert train(chosen, tmp_path / "a", force=True).steps == 1
    assert len(losses(tmp_path / "a")) == 1


# Saying no, before any training


def chosen_for(pairs, checkpoint, **sections):
    run = {"epochs": 1, **sections.pop("run", {})}
    return settings(str(pairs), start={"model": str(checkpoint.directory)}, run=run, **sections)


def rows(folder, *entries) -> str:
    """A table of (picture's number, caption, split)."""
    folder.mkdir(exist_ok=True)
    lines = ["image,caption,split"]
    for number, caption, split in entries:
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{folder / f'{number}.png'},{caption},{split}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([(1, "one", "train"), (1, "one again", "val"), (2, "two", "train")], "both to train on and to measure on"),
        ([(1, "a photo", "train"), (2, "a photo", "train"), (3, "a photo", "train")], "captions that differ"),
        ([(1, "one", "train"), (1, "another", "train")], "at least two groups"),
        ([(1, "one", "test"), (2, "two", "test")], "split train"),
        ([], "no pairs at all"),
    ],
)
def test_data_that_cannot_teach_is_refused_in_one_line(entries, words, plain_checkpoint, tmp_path):
    """A leak, captions all alike, one picture, another split only, nothing: no step is made, the exit code is 1."""
    pairs = rows(tmp_path / "d", *entries)
    with pytest.raises(InputError, match=words) as caught:
        train(chosen_for(pairs, plain_checkpoint), tmp_path / "o")
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


def test_pictures_none_of_which_can_be_read_are_an_error(plain_checkpoint, tmp_path):
    """Not a run of zeros that ends well; each of them was told of."""
    watch = Watch()
    pairs = table(tmp_path / "d", 6, val=0, broken=6)
    chosen = chosen_for(pairs, plain_checkpoint, data={"val_share": 0}, run={"batch_size": 3})
    with pytest.raises(InputError, match="some that can be read"):
        train(chosen, tmp_path / "o", watcher=watch)
    assert sum(note.startswith("skipped") for note in watch.notes) == 6


def test_a_small_table_is_one_smaller_batch_and_says_so(plain_checkpoint, tmp_path):
    """A batch beyond the data is a warning, not an empty epoch."""
    chosen = chosen_for(table(tmp_path, 6, val=0), plain_checkpoint, data={"val_share": 0}, run={"batch_size": 64})
    report = train(chosen, tmp_path / "o")
    assert (report.steps, report.comparison) == (1, None)
    assert any("more than the 6 training pairs" in warning for warning in report.warnings)
    assert any("no pairs are held out" in warning for warning in report.warnings)


@pytest.mark.parametrize(("stages", "warned"), [("all", False), (1, True)])
def test_a_backbone_that_stays_random_is_warned_about(stages, warned, tmp_path):
    """The default learns the last stages only, which suits trained ones."""
    chosen = settings(table(tmp_path / "d", 8), start=anew(tmp_path), image={"train": stages}, run={"epochs": 1})
    assert any("random numbers" in one for one in train(chosen, tmp_path / "o").warnings) is warned


def test_more_processes_than_pictures_in_a_batch_are_refused(plain_checkpoint, tmp_path):
    """Every step would be dropped, and the run would end as if it had learned."""
    chosen = settings(table(tmp_path / "d", 8), start={"model": str(plain_checkpoint.directory)})
    examples = read_examples(chosen.sources)
    _check_ranks(chosen, examples, world=4)
    with pytest.raises(UsageError, match="at most 4 processes for batches of 4, got 5"):
        _check_ranks(chosen, examples, world=5)
    apart = settings(table(tmp_path / "d", 8), run={"batch_size": 8}, data={"mixed": False})
    two = replace(examples, origins=(0,) * (len(examples.train) - 2) + (1, 1))
    with pytest.raises(UsageError, match="at most 2 processes for batches of 2"):
        _check_ranks(apart, two, world=3)


def test_another_run_in_the_same_folder_is_refused(plain_checkpoint, tmp_path):
    """While it is written to; a lock that is left behind by a dead process holds nobody up."""
    pairs = table(tmp_path / "d", 6, val=0)
    chosen = chosen_for(pairs, plain_checkpoint, data={"val_share": 0})
    (tmp_path / "o").mkdir()
    with filelock.FileLock(tmp_path / "o" / ".lock"), pytest.raises(InputError, match="another run"):
        train(chosen, tmp_path / "o")
    assert (tmp_path / "o" / ".lock").exists()
    assert train(chosen, tmp_path / "o").steps == 1


def test_a_folder_that_cannot_be_written_is_an_input_error(plain_checkpoint, tmp_path):
    """A file in its place, or (for those who are not root) no right to write."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a folder to write to"):
        train(chosen_for("x.csv", plain_checkpoint), tmp_path / "file")
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(InputError, match="a folder to write to"):
            train(chosen_for("x.csv", plain_checkpoint), tmp_path / "locked")


def test_a_start_that_is_not_there_is_said_before_pictures_are_decoded(plain_checkpoint, tmp_path):
    """A model, a teacher, an unknown loss dimension, names of anchors."""
    pairs = table(tmp_path / "d", 6, val=0)
    for sections, kind in [
        ({"start": {"model": "./nowhere"}}, ModelError),
        ({"objective": {"teacher": "./nowhere"}}, ModelError),
        ({"objective": {"matryoshka": [16]}}, UsageError),
        ({"start": {"anchor_prompts": "nowhere.txt"}}, InputError),
        ({"run": {"device": "gpu"}}, UsageError),
        ({"image": {"train": 9}}, UsageError),
    ]:  # fmt: skip
        base = {"start": {"model": str(plain_checkpoint.directory)}, "data": {"val_share": 0}, "run": {"epochs": 1}}
        merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
        with pytest.raises(kind):
            train(settings(pairs, **merged), tmp_path / "o")
        assert not (tmp_path / "o" / "metrics.jsonl").exists()
    assert train(settings(pairs, **base), tmp_path / "o").steps == 1  # none of them stands in the way of the right one


# Ending badly


@pytest.mark.parametrize("val", [0, 4])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_best(val, tmp_path):
    """The step and what to do are named, whoever meets the numbers first; the last best checkpoint is whole."""
    chosen = settings(
        table(tmp_path / "d", 8 + val, val=val), start=anew(tmp_path), data={"val_share": 0},
        run={"lr": 10.0, "warmup": 0.0, "epochs": 60, "clip": 0.0, "weight_decay": 10.0, "ema": 0.0, "patience": 0},
        text={"rate": 1.0}, image={"rate": 1.0},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"training, .*finite.*run\.lr") as caught:
        train(chosen, tmp_path / "o")
    assert caught.value.exit_code == 1
    Checkpoint.open(tmp_path / "o" / "best").verify()


def test_memory_and_disk_that_run_out_are_resource_errors(plain_checkpoint, tmp_path):
    """Wherever in a run they are met, with what to do about it and exit code 5."""
    pairs = table(tmp_path / "d", 6, val=0)
    chosen = chosen_for(pairs, plain_checkpoint, data={"val_share": 0})
    for error, words in ((OSError(28, "No space left"), "Free space"), (MemoryError("9 GB"), r"run\.chunk")):
        with pytest.raises(ResourceError, match=words) as caught:
            train(chosen, tmp_path / "o", watcher=Failing(error))
        assert caught.value.exit_code == 5
    with pytest.raises(PermissionError):  # whatever else an operating system says is no matter of space
        train(chosen, tmp_path / "o", watcher=Failing(PermissionError(13, "no")))


class Failing(Watch):
    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    def advance(self, n, *, note=""):
        raise self.error


def test_an_interrupted_run_of_other_settings_is_not_gone_on_with(plain_checkpoint, tmp_path):
    """It says so at once, and leaves settings, state and journal of the other run as they are."""
    pairs = table(tmp_path / "d", 12, val=4)
    base = {"run": {"epochs": 2, "save_seconds": 0.0}}
    with pytest.raises(Stop):
        train(chosen_for(pairs, plain_checkpoint, **base), tmp_path / "o", watcher=Watch(stop=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*") if path.name != ".lock"}
    other = chosen_for(pairs, plain_checkpoint, run={"epochs": 2, "save_seconds": 0.0, "lr": 0.5})
    with pytest.raises(InputError, match=r"another run.*--force"):
        train(other, tmp_path / "o")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert train(other, tmp_path / "o", force=True).steps == 4


def test_a_card_says_where_a_model_comes_from():
    """Its start, its data and its share; without held-out pairs there is no table."""
    pair = Pair("a.png", ("a", "b"), "g")
    card = card_of(settings("x.csv"), Examples((pair, pair), (1, 1), (pair,)), None, start="tiny", share=0.75)
    for words in ("Started from: tiny", "2 training pictures with 4 captions, 1 pictures held out", "0.75", "licences"):
        assert words in card
    assert "```" not in card

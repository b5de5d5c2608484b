"""`train --stage rerank`: from towers and pairs to a model directory with a re-ranker, and how it says no."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import Stop, Watch, journal, losses, settings, table

from mmsearch.errors import InputError, ModelError, UsageError
from mmsearch.rerank.checkpoint import RerankCheckpoint, load_rerank_model
from mmsearch.rerank.reranker import Reranker
from mmsearch.towers.checkpoint import CARD, CONFIG
from mmsearch.towers.stages import stages
from mmsearch.train.rerank_run import train_reranker
from mmsearch.train.run import train
from mmsearch.types import SkipReason

TINY = {"patch_dim": 8, "grid": 2, "hidden": 8, "bank": 16, "val_pictures": 8, "val_texts": 12, "depth": 8}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sixteen pictures to train on, one of them broken, and ten held out; two captions each."""
    return table(tmp_path_factory.mktemp("pictures"), 26, val=10, broken=1)


def chosen(pairs, checkpoint, **sections):
    run = {"epochs": 2, "batch_size": 5, "lr": 3e-3, "ema": 0.9, "save_seconds": 0.0, **sections.pop("run", {})}
    rerank = {**TINY, **sections.pop("rerank", {})}
    sections = {"augment": {"word_drop": 0.3}, **sections}
    return settings(pairs, start={"model": str(checkpoint.directory)}, run=run, rerank=rerank, **sections)


def usual(pairs, checkpoint):
    return chosen(pairs, checkpoint, rerank={"fusion": "cross-attention", "mined": 2})


@pytest.fixture(scope="module")
def learned(pairs, plain_checkpoint, tmp_path_factory):
    """(folder, report, notes) of two epochs of three steps that nothing came between."""
    out, watch = tmp_path_factory.mktemp("learned") / "mine", Watch()
    return out, train_reranker(usual(pairs, plain_checkpoint), out, watcher=watch), watch.notes


def test_a_run_leaves_a_model_with_a_re_ranker_that_opens(learned):
    """By the run's folder; logits are numbers, probabilities lie between 0 and 1."""
    out, report, _ = learned
    reranker = Reranker.load(str(out), backend="torch")
    assert (reranker.config.fusion, report.fusion, reranker.name) == ("cross-attention", "cross-attention", "mine")
    words = reranker.read_texts(["a red car", "the blue dog"])
    patches = reranker.read_pixels(np.zeros((3, 32, 32, 3), np.uint8))
    rows = np.eye(8, dtype=np.float32)
    pairs = [(text, picture) for text in range(2) for picture in range(3)]
    assert np.isfinite(reranker.logits(words, rows[:2], patches, rows[:3], pairs=pairs)).all()
    assert reranker.caption_bank.shape == reranker.picture_bank.shape == (16, 8)
    assert np.allclose(np.linalg.norm(reranker.picture_bank, axis=1), 1.0, atol=0.02)
    assert reranker.scoring == report.scoring and report.scoring.cutoff is not None
    assert {"picture", "both", "text", "cosine"} == set(report.scoring.cases)


def test_its_towers_are_byte_for_byte_those_it_started_from(learned, plain_checkpoint):
    """So an index made with them stays valid."""
    out, _, _ = learned
    for name in (*plain_checkpoint.files, CONFIG, CARD):
        assert (out / "best" / name).read_bytes() == (plain_checkpoint.directory / name).read_bytes()
    opened = RerankCheckpoint.open(out / "best")
    assert opened.towers.identity.weights == plain_checkpoint.identity.weights


def test_it_leaves_what_the_manual_says_and_nothing_else(learned):
    """One checkpoint, the journal, both pictures, settings and report; the state of the run is gone."""
    out, _, _ = learned
    names = {path.name for path in out.iterdir()} - {"tensorboard"}  # an extra
    (kept,) = [name for name in names if name.startswith("epoch-")]
    assert names == {"best", kept, "metrics.jsonl", "curves.png", "reliability.png", "settings.json", "report.json",
                     "held_out.jsonl", ".lock"}  # fmt: skip
    for name in ("curves.png", "reliability.png"):
        with Image.open(out / name) as drawn:
            assert min(drawn.size) > 200


def test_the_report_says_what_was_done_and_what_came_of_it(learned):
    """The same on disk; each picture that was left out is told of once, though banks and batches meet it."""
    out, report, notes = learned
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert (report.pairs, report.held_out, report.steps) == (16, 10, 6)
    assert report.comparison.before.model == "first stage" and report.comparison.after.texts == 20
    assert report.matching.pairs == 40 and report.matching.true_pairs == 20
    assert [(one.path.rpartition("/")[2], one.reason) for one in report.skipped] == [("00.png", SkipReason.TRUNCATED)]
    assert sum(note.startswith("skipped") for note in notes) == 1
    card = (out / "best" / "RERANK.md").read_text()
    assert all(line in card for line in (*report.comparison.lines(), *report.matching.lines()))


def test_the_journal_has_the_parts_of_each_loss_and_every_validation(learned):
    """All of them finite; hit@k both ways after each epoch."""
    lines = journal(learned[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite([line["loss"], line["contrast"], line["match"]]).all() for line in steps)
    assert [line["step"] for line in lines if "val/image_to_text/hit@5" in line] == [3, 6]


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        (None, "mining"),  # before anything but the bank of pictures
        (4, None),  # in the middle of the second epoch
        (None, "epoch 1: re-ranked"),  # measured and kept as the best, but not saved
        (None, "measuring the best state"),  # all steps done
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(stop, at, pairs, plain_checkpoint, learned, tmp_path):
    """Wherever it stopped: the same losses, scores and weights, to the bit."""
    out, report, _ = learned
    with pytest.raises(Stop):
        train_reranker(usual(pairs, plain_checkpoint), tmp_path / "mine", watcher=Watch(stop=stop, at=at))
    again = train_reranker(usual(pairs, plain_checkpoint), tmp_path / "mine")
    assert journal(tmp_path / "mine") == journal(out)
    name = "rerank.safetensors"
    assert (tmp_path / "mine" / "best" / name).read_bytes() == (out / "best" / name).read_bytes()
    assert (again.scoring, again.comparison) == (report.scoring, report.comparison)


def test_curves_are_drawn_while_a_run_goes_on(pairs, plain_checkpoint, tmp_path, monkeypatch):
    """After an epoch, not only at the end."""
    monkeypatch.setattr("mmsearch.train.curves.SELDOM_S", 0.0)
    with pytest.raises(Stop):
        train_reranker(usual(pairs, plain_checkpoint), tmp_path / "mine", watcher=Watch(at="epoch 2: re-ranked"))
    assert (tmp_path / "mine" / "curves.png").exists()


# Other fusions


def short(pairs, checkpoint, out, **rerank):
    """Two steps, then the end; pictures are kept on disk."""
    run = {"epochs": 1, "max_steps": 2, "views": 1}
    return train_reranker(chosen(pairs, checkpoint, rerank=rerank, run=run, augment={"enabled": False}), out)


def test_an_image_backbone_of_its_own_learns_in_its_last_stage(pairs, plain_checkpoint, tmp_path):
    """The first one stays the tower's, and so does the tower."""
    report = short(pairs, plain_checkpoint, tmp_path / "o", fusion="late-interaction", image_train=1, image_rate=1.0)
    model = load_rerank_model(RerankCheckpoint.open(tmp_path / "o" / "best"))
    own, tower = stages(model.backbone), stages(model.towers.image.backbone)
    moved = [
        any(not torch.equal(one, other) for one, other in zip(mine.parameters(), its.parameters(), strict=True))
        for mine, its in zip(own, tower, strict=True)
    ]
    assert moved == [False, True]
    assert model.config.own_backbone and float(model.fusion.cosine_scale.detach()) == 0.0  # it sees no rows
    assert report.parameters > sum(value.numel() for value in model.backbone.parameters())


def test_a_student_imitates_a_teacher_over_the_same_towers(pairs, plain_checkpoint, learned, tmp_path):
    """From kept maps; its part of the loss is in the journal, and a teacher over other towers is refused."""
    short(pairs, plain_checkpoint, tmp_path / "o", fusion="late-interaction", teacher=str(learned[0]))
    assert all(line["teacher"] > 0 for line in journal(tmp_path / "o") if "loss" in line)
    with pytest.raises(ModelError, match="grid and text_layer"):
        short(pairs, plain_checkpoint, tmp_path / "p", grid=3, teacher=str(learned[0]))
    with pytest.raises(ModelError, match="with a re-ranker as teacher"):
        short(pairs, plain_checkpoint, tmp_path / "q", teacher=str(plain_checkpoint.directory))


def test_a_fusion_of_rows_alone_starts_from_the_first_stage(pairs, plain_checkpoint, tmp_path):
    """Nothing but its own numbers; a rate of nearly nothing changes no rank."""
    out = tmp_path / "o"
    run = {"epochs": 1, "max_steps": 1, "lr": 1e-9}
    report = train_reranker(chosen(pairs, plain_checkpoint, rerank={"fusion": "gated", "bank": 0}, run=run), out)
    assert len(losses(out)) == 1
    assert report.comparison.after.figures() == report.comparison.before.figures()


def test_no_epoch_fits_scores_alone(pairs, plain_checkpoint, learned, tmp_path):
    """What is gone on with stays as it is; scores and cut-off are there, and nothing was kept or stepped."""
    out = tmp_path / "o"
    start = {"start": str(learned[0])}
    report = train_reranker(chosen(pairs, plain_checkpoint, rerank=start, run={"epochs": 0, "views": 2}), out)
    assert (report.steps, report.best_epoch, report.scoring.cutoff is not None) == (0, 0, True)
    assert not (out / "curves.png").exists() and (out / "reliability.png").exists()
    old, new = (load_rerank_model(RerankCheckpoint.open(one / "best")).state_dict() for one in (learned[0], out))
    assert all(torch.equal(old[name], new[name]) for name in old if not name.endswith("_bank"))
    with pytest.raises(UsageError, match=r"run\.epochs.*rerank\.start"):
        train_reranker(chosen(pairs, plain_checkpoint, run={"epochs": 0}), tmp_path / "p")
    with pytest.raises(UsageError, match=r"run\.epochs"):
        train(chosen(pairs, plain_checkpoint, run={"epochs": 0}), tmp_path / "q")


def test_what_is_gone_on_with_is_kept_where_nothing_better_comes(pairs, plain_checkpoint, learned, tmp_path):
    """It is measured before the first step; a rate that ruins everything leaves it as it was."""
    out, watch = tmp_path / "o", Watch()
    ruin = chosen(pairs, plain_checkpoint, rerank={"start": str(learned[0])}, run={"epochs": 2, "lr": 10.0, "ema": 0.0})
    report = train_reranker(ruin, out, watcher=watch)
    assert (report.steps, report.best_epoch) == (6, 0)
    assert any("as it starts: re-ranked" in note and "best so far" in note for note in watch.notes)
    old, new = (load_rerank_model(RerankCheckpoint.open(one / "best")).state_dict() for one in (learned[0], out))
    assert all(torch.equal(old[name], new[name]) for name in old if not name.endswith("_bank"))


def test_too_few_rows_of_its_own_are_filled_up_with_earlier_ones(pairs, plain_checkpoint, learned, tmp_path):
    """The run's own first, then the banks of what is gone on with, to within their eight bits."""
    before = RerankCheckpoint.open(learned[0] / "best")
    start = {"start": str(learned[0]), "bank": 1000}
    run = {"epochs": 0, "seed": 7}  # another order of its own rows than that of the earlier ones
    train_reranker(chosen(pairs, plain_checkpoint, rerank=start, run=run), tmp_path / "o")
    after = RerankCheckpoint.open(tmp_path / "o" / "best")
    own = after.config.bank - before.config.bank
    assert own >= before.config.bank > 0  # of the same captions
    for which in ("caption", "picture"):
        old, new = before.bank(which), after.bank(which)
        first = own if which == "caption" else learned[1].pairs - 1  # one of them cannot be read
        assert np.allclose(new[first : first + len(old)], old[: len(new) - first], atol=0.02)


# Saying no


def test_a_run_that_has_ended_is_left_alone(learned, pairs, plain_checkpoint):
    """Nothing is written into it without `force`."""
    out, _, _ = learned
    before = (out / "report.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"has ended.*--force"):
        train_reranker(usual(pairs, plain_checkpoint), out)
    assert (out / "report.json").stat().st_mtime_ns == before


def test_several_processes_are_refused_before_the_folder_is_made(pairs, plain_checkpoint, tmp_path):
    """Under torchrun each would write the same files."""
    with pytest.raises(UsageError, match="one process"):
        train_reranker(usual(pairs, plain_checkpoint), tmp_path / "o", environ={"WORLD_SIZE": "2", "RANK": "0"})
    assert not (tmp_path / "o").exists()


def test_held_out_pairs_are_needed(plain_checkpoint, tmp_path):
    """Without any there is no probability, and a few are not enough."""
    none = chosen(table(tmp_path / "a", 8, val=0), plain_checkpoint, data={"val_share": 0})
    with pytest.raises(UsageError, match=r"held-out pairs.*val_share"):
        train_reranker(none, tmp_path / "o")
    with pytest.raises(InputError, match="8 pictures"):
        train_reranker(chosen(table(tmp_path / "b", 12, val=4), plain_checkpoint), tmp_path / "p")


def test_models_and_settings_that_cannot_be_are_refused(pairs, plain_checkpoint, tmp_path):
    """No checkpoint of this package, no model at all, an own backbone under a fusion that reads no patches."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    for model in (str(tmp_path / "clip"), "", "./nowhere"):
        wanted = settings(pairs, start={"model": model}, rerank=TINY)
        with pytest.raises(ModelError):
            train_reranker(wanted, tmp_path / "o")
    own = chosen(pairs, plain_checkpoint, rerank={"fusion": "concat", "image_train": 1})
    with pytest.raises(UsageError, match=r"rerank\.image_train.*reads no patches"):
        train_reranker(own, tmp_path / "o")


def test_pictures_none_of_which_can_be_read_are_an_error(plain_checkpoint, tmp_path):
    """Not a run of zeros that ends well."""
    pairs = table(tmp_path / "d", 18, val=10, broken=8)
    with pytest.raises(InputError, match="some that can be read"):
        train_reranker(chosen(pairs, plain_checkpoint), tmp_path / "o")

"""Every way to train runs to its end, and what should change nothing changes nothing."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from train_kit import Watch, anew, losses, passes, pixels, settings, table, tokens

from mmsearch.errors import ResourceError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_checkpoint, tiny_dual_encoder
from mmsearch.towers.checkpoint import load_dual_encoder
from mmsearch.train.run import train
from mmsearch.train.workshop import _kept, _names, _objective

NO_DROPOUT = {**TINY_CONFIG["text"]["backbone"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CALM = {**TINY_CONFIG, "text": {**TINY_CONFIG["text"], "backbone": NO_DROPOUT}}
PLAIN = {"enabled": False}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pictures with three captions each, none held out."""
    return table(tmp_path_factory.mktemp("pictures"), 12, captions=3, val=0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A start without dropout."""
    return {"model": str(tiny_checkpoint(tmp_path_factory.mktemp("calm") / "calm", config=CALM).directory)}


def ran(folder, pairs, start, **sections):
    """(losses, report, notes) of a run of two epochs of three steps without held-out pairs."""
    watch = Watch()
    run = {"epochs": 2, **sections.pop("run", {})}
    data = {"val_share": 0, **sections.pop("data", {})}
    report = train(settings(pairs, start=start, run=run, data=data, **sections), folder, watcher=watch)
    return losses(folder), report, watch.notes


def finite_rows(model) -> bool:
    with torch.no_grad():
        rows = torch.cat([model.encode_texts(*tokens(["a red car"])), model.encode_images(pixels(2))])
    return bool(rows.isfinite().all())


@pytest.mark.parametrize(
    ("sections", "steps"),
    [
        ({"run": {"precision": "bf16"}}, 6),
        ({"run": {"accumulate": 2}}, 4),
        ({"run": {"checkpointing": True}}, 6),
        ({"run": {"clip": 0.0, "ema": 0.0, "schedule": "linear", "floor": 0.1}}, 6),
        ({"run": {"backbone_start": 0.5}, "text": {"train": 1, "layer_decay": 0.5, "embeddings": False}}, 6),
        ({"objective": {"name": "sigmoid"}}, 6),
        ({"objective": {"name": "info_nce+10*max_hinge", "smoothing": 0.1, "margin": 0.3}}, 6),
        ({"objective": {"matryoshka": [2, 4, 8]}}, 6),
        ({"objective": {"teacher": "TEACHER"}, "run": {"chunk": 3}}, 6),
        ({"objective": {"hard_negatives": 3, "mine_from": 0}, "run": {"chunk": 2}}, 6),
        ({"objective": {"keep_classes": 2.0}, "image": {"train": 1}}, 6),
        ({"objective": {"keep_names": 2.0}, "start": {"anchor_prompts": "NAMES"}}, 6),
        (
            {
                "objective": {"keep_names": 2.0},
                "start": {"anchor_prompts": "NAMES"},
                "image": {"train": "head"},
                "text": {"train": "head"},
                "augment": {"word_drop": 0.0},
                "run": {"views": 1},
            },
            6,
        ),
        ({"start": {"item": "gated"}, "objective": {"modality_dropout": 0.5}, "run": {"chunk": 3}}, 6),
        ({"text": {"lora": 2}, "image": {"lora": 2}}, 6),
        ({"text": {"lora": 2, "train": 1}, "image": {"train": "head"}}, 6),
        ({"text": {"lora": 2}, "image": {"lora": 2, "train": 1}, "run": {"views": 1, "precision": "bf16"}}, 6),
        ({"text": {"train": "none"}, "image": {"train": "head"}}, 6),
        ({"image": {"train": "all", "batch_norm": True}}, 6),
        ({"augment": {"enabled": False}, "data": {"limit": 8}}, 4),
        ({"augment": {"randaugment": 2, "word_drop": 0.5}, "run": {"feature_dropout": 0.5}}, 6),
        ({"start": {"anchor_prompts": "NAMES"}, "run": {"anchor_refresh": 2}}, 6),
    ],
    ids=lambda value: "-".join(f"{k}.{'.'.join(v)}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_it_runs_and_its_checkpoint_loads(sections, steps, pairs, calm, tmp_path):
    """So many steps, losses that are numbers, a model that differs from its start and gives unit rows."""
    if any("lora" in sections.get(side, {}) for side in ("text", "image")):
        pytest.importorskip("peft")
    (tmp_path / "names.txt").write_text("dog\ncat\ncar\nbeach\nred\n")
    start = {**calm, **sections.pop("start", {})}
    if start.get("anchor_prompts"):
        start["anchor_prompts"] = str(tmp_path / "names.txt")
    objective = sections.get("objective", {})
    if objective.get("teacher"):
        objective = {**objective, "teacher": str(tiny_checkpoint(tmp_path / "teacher", seed=9).directory)}
    found, report, _ = ran(tmp_path / "o", pairs, start, **{**sections, "objective": objective})
    assert (len(found), report.steps) == (steps, steps)
    assert all(0 < loss < 100 for loss in found)
    model, before = load_dual_encoder(tmp_path / "o" / "best"), load_dual_encoder(calm["model"])
    assert finite_rows(model)
    state, old = model.state_dict(), before.state_dict()
    assert any(not torch.equal(state[name], old[name]) for name in old)
    for side, frozen in (("text", "text.backbone"), ("image", "image.backbone")):
        if sections.get(side, {}).get("train") in ("head", "none"):
            assert all(torch.equal(state[name], old[name]) for name in old if name.startswith(frozen))


@pytest.mark.parametrize(
    ("objective", "text", "prompts", "kept"),
    [
        ({"keep_classes": 1.0, "keep_names": 0.0}, "all", "NAMES", [False]),
        ({"keep_classes": 0.0, "keep_names": 1.0}, "all", "NAMES", [False]),
        ({"keep_classes": 0.0, "keep_names": 1.0}, "head", "NAMES", [True]),
        ({"keep_classes": 1.0, "keep_names": 1.0}, "none", "NAMES", [False, True]),
        ({"keep_classes": 0.0, "keep_names": 0.0}, "head", "", []),
    ],
)
def test_what_is_kept_is_what_is_asked_for(objective, text, prompts, kept, tmp_path):
    """Of each that is kept, whether the text tower follows it: only names, and only under a frozen backbone."""
    (tmp_path / "names.txt").write_text("dog\ncat\ncar\nbeach\nred\n")
    start = {"anchor_prompts": str(tmp_path / "names.txt") if prompts else ""}
    model = tiny_dual_encoder().eval()
    wanted = settings("unused", objective=objective, text={"train": text}, start=start)
    found = _kept(wanted, passes(model), tokens, names=_names(wanted, model.image))
    follows = []
    for one in found:
        model.zero_grad()
        one.backward(pixels(6))
        follows.append(any(parameter.grad is not None for parameter in model.text.parameters()))
    assert follows == kept


def test_all_pictures_are_taught_names_where_only_heads_learn(tmp_path):
    """Where the backbone learns, an eighth of them: the value is another one."""
    (tmp_path / "names.txt").write_text("dog\ncat\ncar\nbeach\nred\n")
    start, value = {"anchor_prompts": str(tmp_path / "names.txt")}, {}
    for trained in ("head", "all"):
        model = tiny_dual_encoder().eval()
        with torch.no_grad():
            for values in model.image.anchors.classifier.parameters():
                values.copy_(values.roll(1, dims=0))  # a verdict that is not near: there is something to teach
        objective = {"keep_classes": 0.0, "keep_names": 1.0}
        wanted = settings("unused", objective=objective, image={"train": trained}, start=start)
        (kept,) = _kept(wanted, passes(model), tokens, names=_names(wanted, model.image))
        for count in (5, 40):
            torch.manual_seed(0)
            value[trained, count] = kept.backward(pixels(40)[:count])
    assert value["all", 40] == pytest.approx(value["head", 5], rel=1e-4)
    assert value["head", 40] != pytest.approx(value["head", 5], rel=1e-3)


@pytest.mark.parametrize("anchors", [True, False])
def test_names_that_nobody_knows_are_refused_at_once(anchors, pairs, tmp_path):
    """Five classes that no file names, and a model without any; before a picture is opened."""
    image = TINY_CONFIG["image"] if anchors else {k: v for k, v in TINY_CONFIG["image"].items() if k != "anchors"}
    with pytest.raises(UsageError, match=r"keep_names.*(5 classes without names|without anchors)"):
        ran(tmp_path / "o", pairs, anew(tmp_path, image=image), objective={"keep_names": 1.0})
    assert not (tmp_path / "o" / "run").exists()


def test_what_is_kept_is_part_of_the_loss(pairs, calm, tmp_path):
    """The first loss of a run with both is that without any, and both: a verdict that has not moved is 0."""
    (tmp_path / "names.txt").write_text("dog\ncat\ncar\nbeach\nred\n")
    start = {**calm, "anchor_prompts": str(tmp_path / "names.txt")}
    first = {}
    for weight in (0.0, 1.0, 3.0):
        objective = {"keep_classes": 1.0, "keep_names": weight}
        found, _, _ = ran(tmp_path / f"o{weight}", pairs, start, augment=PLAIN, objective=objective)
        first[weight] = found[0]
    names = first[1.0] - first[0.0]
    assert names > 0.003
    assert first[3.0] - first[0.0] == pytest.approx(3 * names, rel=0.01)


def test_gradient_caching_gives_the_losses_of_whole_batches(pairs, calm, tmp_path):
    """Step by step, to rounding; the classifier's verdicts are held in chunks as well."""
    options = {"augment": PLAIN, "objective": {"keep_classes": 1.0}}
    whole, _, _ = ran(tmp_path / "a", pairs, calm, **options, run={"batch_size": 6})
    cut, _, _ = ran(tmp_path / "b", pairs, calm, **options, run={"batch_size": 6, "chunk": 2})
    assert cut == pytest.approx(whole, abs=2e-3)


def test_activation_checkpointing_gives_the_same_losses(pairs, calm, tmp_path):
    """It costs time and nothing else; a backbone that has none is named."""
    plain, _, _ = ran(tmp_path / "a", pairs, calm, augment=PLAIN)
    again, report, _ = ran(tmp_path / "b", pairs, calm, augment=PLAIN, run={"checkpointing": True})
    assert again == pytest.approx(plain, abs=1e-3)
    assert any("not known to the image backbone" in warning for warning in report.warnings)


@pytest.mark.parametrize(("image", "text"), [({"train": 1}, {}), ({"train": "head"}, {"train": "head"})])
def test_kept_views_give_the_losses_of_decoding_anew(image, text, pairs, calm, tmp_path):
    """Behind frozen stages, or the whole frozen backbone with all captions kept: to half precision."""
    options = {"augment": PLAIN, "image": image, "text": text}
    anew_, _, _ = ran(tmp_path / "a", pairs, calm, **options)
    kept, _, notes = ran(tmp_path / "b", pairs, calm, **options, run={"views": 3})
    assert any(note.startswith("keeping 1 views of 12 pictures") for note in notes)
    assert any(note.startswith("keeping 36 captions") for note in notes) == (text == {"train": "head"})
    assert kept == pytest.approx(anew_, abs=5e-3)


def test_captions_that_lose_words_are_not_kept(pairs, calm, tmp_path):
    """Frozen or not, they are other captions each time."""
    options = {"image": {"train": "head"}, "text": {"train": "head"}, "augment": {"word_drop": 0.3}}
    _, _, notes = ran(tmp_path / "b", pairs, calm, **options, run={"views": 2, "epochs": 1})
    assert any("2 views" in note for note in notes)
    assert not any("captions behind" in note for note in notes)


def test_kept_views_are_shared_by_runs_that_name_their_folder(pairs, calm, tmp_path):
    """Another seed and another rate find them there; they stay when the run has ended."""
    for name, run in (("a", {}), ("b", {"seed": 4, "lr": 1e-4})):
        views = {"views": 1, "views_folder": str(tmp_path / "views"), "epochs": 1}
        ran(tmp_path / name, pairs, calm, image={"train": 1}, run={**views, **run})
        (kept,) = (tmp_path / "views").glob("*/view-0.npy")
        if name == "a":
            before = kept.stat().st_mtime_ns
    assert kept.stat().st_mtime_ns == before


def test_a_broken_picture_is_left_out_and_told_once_by_every_run(calm, tmp_path):
    """Also by one that finds the views kept already; the steps are those of the others."""
    pairs = table(tmp_path / "d", 12, val=0, broken=2)
    run = {"views": 2, "views_folder": str(tmp_path / "views"), "epochs": 1}
    for name in ("a", "b"):
        _, report, notes = ran(tmp_path / name, pairs, calm, image={"train": 1}, run=run)
        assert sorted(one.path.rpartition("/")[2] for one in report.skipped) == ["00.png", "01.png"]
        assert sum(note.startswith("skipped") for note in notes) == 2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"run": {"views": 2, "checkpointing": True}, "image": {"train": 1}}, "activation checkpointing is on"),
        ({"run": {"views": 2}, "image": {"train": "all"}}, "no first stage of the image backbone is frozen"),
        ({"run": {"views": -1}, "image": {"train": "all"}}, None),
        ({"run": {"views": 2}, "image": {"train": 1, "batch_norm": True}}, "batch-norm statistics are updated"),
    ],
)
def test_views_are_decoded_anew_where_they_cannot_be_kept(sections, words, pairs, calm, tmp_path):
    """Nobody who left it open hears of it; who asked for views in vain hears why."""
    found, report, notes = ran(tmp_path / "o", pairs, calm, **sections)
    assert len(found) == 6
    assert not any(note.startswith("keeping") and "views" in note for note in notes)
    told = [warning for warning in report.warnings if "decoded anew" in warning]
    assert (words in told[0] and len(told) == 1) if words else not told


def test_a_disk_that_is_too_small_stops_only_those_who_asked_for_views(calm, tmp_path, monkeypatch):
    """By default pictures are then decoded anew, and a warning says why."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    pairs = table(tmp_path / "d", 8, val=0)
    found, report, _ = ran(tmp_path / "a", pairs, calm, image={"train": 1}, run={"views": -1, "epochs": 1})
    assert len(found) == 2
    assert any("decoded anew" in warning and "MB free" in warning for warning in report.warnings)
    with pytest.raises(ResourceError, match=r"run\.views"):
        ran(tmp_path / "b", pairs, calm, image={"train": 1}, run={"views": 1, "epochs": 1})


def test_the_sigmoid_loss_starts_a_new_model_at_its_own_scale(pairs, calm, tmp_path):
    """Ten, as its paper does; a model that was trained before keeps the one it has."""
    sections = {"objective": {"name": "sigmoid"}, "run": {"epochs": 1, "lr": 1e-6}}
    for start, scale in ((anew(tmp_path), 10.0), (calm, 1 / 0.07)):
        out = tmp_path / f"o{scale:.0f}"
        ran(out, pairs, start, **sections)
        assert float(load_dual_encoder(out / "best").logit_scale.detach()) == pytest.approx(scale, rel=1e-3)


def test_the_whole_dimension_is_one_of_the_nested_ones_named_or_not(pairs):
    """8 of [8, 4] is not counted twice."""
    for dims in ([4], [8, 4], [4, 8]):
        assert _objective(settings(pairs, objective={"matryoshka": dims}), dim=8).dims == (4, 8)

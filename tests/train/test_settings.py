"""Settings: from a recipe, options and --set; checked before anything is opened."""

import json

import pytest

from mmsearch.errors import InputError, UsageError
from mmsearch.train.augment import Augmentation
from mmsearch.train.examples import DataSource
from mmsearch.train.parameters import Tuning
from mmsearch.train.settings import TrainSettings, gathered, overridden, read_recipe, settings_from


def chosen(**sections) -> TrainSettings:
    return settings_from(sections)


def test_nothing_said_is_the_defaults():
    """An empty recipe, and a section that is empty, are what `TrainSettings()` is."""
    assert settings_from({}) == settings_from({"run": {}, "augment": {}, "text": {}}) == TrainSettings()


def test_settings_go_through_json_and_come_back():
    """settings.json beside a checkpoint is a recipe of the same run, also without augmentation."""
    first = chosen(
        source=[{"path": "a.csv", "repeat": 3}, {"path": "b", "split": "all"}], augment={"enabled": False},
        image={"train": "head"}, text={"train": 2, "layer_decay": 0.5}, data={"limit": 7},
        objective={"name": "info_nce+10*max_hinge", "matryoshka": [16, 32]}, run={"betas": [0.8, 0.9], "lr": 1},
        start={"model": "", "config": {"dim": 8, "image": {"backbone": "plain_cnn"}}},
    )  # fmt: skip
    assert settings_from(json.loads(json.dumps(first.to_json()))) == first
    assert settings_from(TrainSettings().to_json()) == TrainSettings()
    assert first.augment is None
    assert first.sources[0] == DataSource("a.csv", repeat=3)
    assert isinstance(first.run.lr, float)


def test_a_section_keeps_the_defaults_of_what_it_does_not_name():
    """`[image] rate = 0.5` still trains the last three stages; `[augment] flip = 0` keeps the crop."""
    got = chosen(image={"rate": 0.5}, augment={"flip": 0})
    assert (got.image, got.augment) == (Tuning(train=3, rate=0.5), Augmentation(flip=0.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ruin": {}}, "ruin.*one of augment, data"),
        ({"run": {"epoch": 3}}, r"run\.epoch.*accumulate"),
        ({"source": [{"path": "a", "repeats": 2}]}, r"source\.repeats.*repeat"),
        ({"augment": {"crops": 1}}, r"augment\.crops.*crop"),
        ({"start": {"config.dim": 8}}, r"start\.config\.dim"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known(values, words):
    """A misspelt setting that is ignored costs a night."""
    with pytest.raises(UsageError, match=words):
        settings_from(values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("run", {"epochs": "3"}), ("run", {"epochs": 2.5}), ("run", {"epochs": True}), ("run", {"lr": "1e-3"}),
        ("run", {"wise": 1}), ("run", {"betas": "ab"}), ("run", {"betas": [0.9]}), ("run", {"betas": [0.9, "x"]}),
        ("run", {"precision": 16}), ("run", 3), ("run", [1]), ("data", {"limit": 1.5}), ("data", {"limit": True}),
        ("data", {"workers": "two"}), ("objective", {"matryoshka": 16}), ("objective", {"matryoshka": ["a"]}),
        ("start", {"config": "plain"}), ("start", {"model": 1}), ("text", {"train": 1.5}), ("text", {"train": True}),
        ("image", {"lora": "4"}), ("augment", False), ("augment", {"enabled": "no"}), ("augment", {"flip": True}),
        ("source", "pairs.csv"), ("source", {"path": "pairs.csv"}), ("source", ["pairs.csv"]),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_an_error_that_names_it(section, values):
    """Never a traceback from somewhere inside, and never a string that counts as true."""
    with pytest.raises(UsageError, match=section):
        settings_from({section: values})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("run", {"epochs": -1}), ("run", {"lr": 0}), ("run", {"lr": -1}), ("run", {"lr": float("nan")}),
        ("run", {"warmup": 2}), ("run", {"ema": 1}), ("run", {"schedule": "cosin"}), ("run", {"precision": "int8"}),
        ("run", {"betas": [0.9, 1.0]}), ("run", {"views": -2}), ("run", {"accumulate": 0}), ("run", {"seed": 2**63}),
        ("run", {"clip": -1}), ("run", {"feature_dropout": 1}), ("objective", {"name": "info_nc"}),
        ("objective", {"smoothing": 1.0}), ("objective", {"name": "sigmoid", "smoothing": 0.1}),
        ("objective", {"hard_share": 1.5}), ("objective", {"hard_negatives": -1}), ("objective", {"mine_from": -1}),
        ("objective", {"name": "hinge", "margin": 0}), ("objective", {"teacher_scale": 0}),
        ("objective", {"teacher_weight": -1}), ("objective", {"matryoshka": [8, 8]}),
        ("objective", {"matryoshka": [0]}),
        ("objective", {"keep_names": 1001}),
        ("objective", {"modality_dropout": 2}), ("objective", {"keep_classes": -1}), ("data", {"workers": -1}),
        ("data", {"captions": 0}), ("start", {"anchor_peak": 1.5}), ("start", {"anchor_boost": -1}),
        ("text", {"train": 0}), ("text", {"train": "some"}), ("text", {"rate": 0}), ("image", {"lora": -1}),
        ("image", {"lora": 2, "train": "head"}), ("source", [{"repeat": 2}]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_mean_anything_is_refused_at_once(section, values):
    """Before data or weights are touched, also what only the loss or the schedule would notice."""
    with pytest.raises(UsageError):
        settings_from({section: values})


def test_a_whole_number_is_the_same_setting_as_a_fraction():
    """Also where there may be none: `1` in a recipe goes on with a run of `1.0`."""
    one, other = (settings_from({"start": {"anchor_peak": value}}) for value in (1, 1.0))
    assert type(one.start.anchor_peak) is float and one.digest() == other.digest()


def test_a_range_without_an_end_is_called_so():
    """A large number means never; one below is refused with what may be."""
    assert settings_from({"objective": {"mine_from": 10**9}}).objective.mine_from == 10**9
    with pytest.raises(UsageError, match="expected 0 or more"):
        settings_from({"objective": {"mine_from": -1}})


def test_a_batch_of_one_has_nothing_to_contrast():
    """It says so."""
    with pytest.raises(UsageError, match="nothing to contrast") as caught:
        chosen(run={"batch_size": 1})
    assert caught.value.exit_code == 2


def test_set_reads_values_as_toml_and_else_as_text():
    """Numbers, booleans and lists as TOML has them; a bare word needs no quotes."""
    values = overridden(
        {"run": {"lr": 1.0, "epochs": 2}},
        ["run.lr=1e-4", "run.wise=false", "run.betas=[0.8, 0.9]", "text.train=head", "image.train= 2",
         'start.item="gated"'],
    )  # fmt: skip
    assert values["run"] == {"lr": 1e-4, "epochs": 2, "wise": False, "betas": [0.8, 0.9]}
    got = settings_from(values)
    assert (got.text.train, got.image.train, got.start.item, got.run.betas) == ("head", 2, "gated", (0.8, 0.9))


def test_set_changes_nothing_that_it_was_given():
    """The recipe's own values stay as they were."""
    values = {"run": {"lr": 1.0}}
    overridden(values, ["run.lr=2"])
    assert values == {"run": {"lr": 1.0}}


@pytest.mark.parametrize("text", ["run.lr", "lr=3", "=3", "run.=3", ".lr=3", ""])
def test_an_assignment_without_its_parts_is_refused(text):
    """It takes SECTION.NAME=VALUE."""
    with pytest.raises(UsageError):
        settings_from(overridden({}, [text]))


@pytest.mark.parametrize("text", ["run.lr=3", "source.path=x"])
def test_an_assignment_into_what_is_no_table_is_refused(text):
    """`run = 3` in a recipe, or a list of sources, has no names to set."""
    with pytest.raises(UsageError, match="table of settings"):
        overridden({"run": 3, "source": [{"path": "a"}]}, [text])


def test_options_go_over_the_recipe_and_set_over_options(tmp_path):
    """Recipe, then options of the command line, then --set; paths of the command line replace the recipe's."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[source]]\npath = "old.csv"\n[run]\nlr = 1.0\nepochs = 5\nseed = 1\n')
    given = {"run.lr": 2.0, "run.epochs": 6, "augment.enabled": False}
    got = gathered(["new.csv"], recipe=recipe, given=given, assignments=["run.lr=3"])
    assert (got.run.lr, got.run.epochs, got.run.seed, got.augment) == (3.0, 6, 1, None)
    assert got.sources == (DataSource("new.csv"),)
    assert gathered([], recipe=recipe, given={}, assignments=[]).sources == (DataSource("old.csv"),)


def test_a_run_without_data_is_refused():
    """No paths and no sources in a recipe."""
    with pytest.raises(UsageError, match="pictures with captions"):
        gathered([], recipe=None, given={}, assignments=[])


def test_an_option_for_a_section_that_is_no_table_is_refused(tmp_path):
    """Rather than a traceback."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text("run = 3\n")
    with pytest.raises(UsageError, match="table of settings"):
        gathered(["a"], recipe=recipe, given={"run.lr": 1.0}, assignments=[])


@pytest.mark.parametrize("content", [None, b"[run\n", b"\xff\xfe", b"# " + b"x" * (1 << 20)])
def test_a_recipe_that_cannot_be_read_is_an_input_error(content, tmp_path):
    """Missing, no TOML, no UTF-8, too large: one line each."""
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"r\.toml"):
        read_recipe(path)


def test_a_digest_changes_with_what_steps_depend_on_and_with_nothing_else():
    """Threads, workers, the folder of views, graphs and the seconds between saves do not count."""
    digest = chosen(source=[{"path": "a"}]).digest()
    free = {"threads": 3, "save_seconds": 1.0, "views_folder": "/x", "graphs": False}
    assert chosen(source=[{"path": "a"}], run=free, data={"workers": 2}).digest() == digest
    for other in (
        {"run": {"seed": 1}}, {"run": {"lr": 1e-4}}, {"run": {"views": 2}}, {"data": {"limit": 9}},
        {"augment": {"enabled": False}}, {"objective": {"margin": 0.3}}, {"text": {"rate": 0.2}},
    ):  # fmt: skip
        assert chosen(source=[{"path": "a"}], **other).digest() != digest
    assert chosen(source=[{"path": "b"}]).digest() != digest

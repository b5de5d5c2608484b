"""`mmsearch train`: what reaches the library, what is said at the end, and how it ends when it does not go well."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_fakes import FakeLibrary
from PIL import Image

from mmsearch.cli.library import Library
from mmsearch.cli.train import RESUME
from mmsearch.errors import InputError, ModelError, ResourceError
from mmsearch.evaluate.comparison import compare
from mmsearch.evaluate.matching import evaluate_matching
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.testing import COLORS, ColorReranker
from mmsearch.train.rerank_report import RerankReport
from mmsearch.train.run import TrainReport


class TrainLibrary(FakeLibrary):
    """Remembers what a run was told and returns a report."""

    def __init__(self, *, trained=None, **options):
        super().__init__(**options)
        self.trained = trained or report()

    def train(self, pairs, out, **options):
        self._called("train", pairs=pairs, out=out, **options)
        return self.trained


def report(**values) -> TrainReport:
    plain = {"checkpoint": Path("c/mine/best"), "pairs": 90, "held_out": 10, "steps": 30, "epochs": 3, "best_epoch": 2}
    return TrainReport(**{**plain, "share": 1.0, "comparison": None, **values})


def measured(name: str, *, right: int):
    """Six pictures with a caption each, the first `right` of them found."""
    eye = np.eye(6, dtype=np.float32)
    texts = np.roll(eye, 1, axis=0) if not right else np.concatenate([eye[:right], np.roll(eye[right:], 1, axis=0)])
    return evaluate_rows(texts, eye, text_groups=np.arange(6), image_groups=np.arange(6), model=name)


def rerank_report(**values) -> RerankReport:
    plain = {"checkpoint": Path("c/mine/best"), "fusion": "gated", "parameters": 1_250_000, "pairs": 90,
             "held_out": 10, "steps": 1, "best_epoch": 2, "comparison": None, "matching": None,
             "scoring": ColorReranker(cutoff=False).scoring, "seconds": 12.0}  # fmt: skip
    return RerankReport(**{**plain, **values})


def given(library) -> dict:
    return dict(library.calls)["train"]


def test_only_what_was_said_is_passed_on(mmsearch):
    """Everything else is left to the recipe and to the defaults of the library."""
    library = TrainLibrary()
    assert mmsearch("train", "pairs.csv", "more.csv", "--out", "c/mine", library=library).code == 0
    call = given(library)
    assert (call["pairs"], call["out"], call["recipe"]) == (["pairs.csv", "more.csv"], Path("c/mine"), None)
    assert (call["given"], call["assignments"], call["force"]) == ({}, [], False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--lora 4", {"text.lora": 4, "image.lora": 4, "text.rate": 1.0, "image.rate": 1.0}),
        ("--lora 4 --tune-image head", {"image.train": "head", "text.lora": 4, "text.rate": 1.0}),
        ("--lora 4 --tune-text none --recipe r.toml", {"text.train": "none", "image.lora": 4}),
    ],
)
def test_adapters_go_where_a_backbone_learns(mmsearch, line, expected):
    """As fast as heads, unless a recipe says how fast; a tower of which the head alone learns has none."""
    library = TrainLibrary()
    assert mmsearch("train", "pairs.csv", "--out", "o", *line.split(), library=library).code == 0
    assert given(library)["given"] == expected
    ended = mmsearch("train", "p.csv", "--out", "o", "--lora", "4", "--tune-text", "head", "--tune-image", "none")
    assert ended.code == 2 and "a backbone that learns" in ended.err


def test_every_option_reaches_the_settings(mmsearch):
    """By the name that a recipe has for it, as numbers where they are numbers."""
    library = TrainLibrary()
    mmsearch(
        "train", "--recipe", "r.toml", "--out", "o",
        "--model", "m", "--epochs", "3", "--batch-size", "16", "--lr", "1e-4",
        "--loss", "sigmoid", "--tune-text", "head", "--tune-image", "2", "--lora", "4", "--no-augment", "--chunk", "8",
        "--teacher", "big", "--val-share", "0.2", "--limit", "500", "--patience", "0", "--seed", "7", "--precision",
        "bf16", "--workers", "1", "--device", "cpu", "--set", "run.clip=2", "--set", "text.rate=0.5", "--force",
        library=library,
    )  # fmt: skip
    call = given(library)
    assert call["given"] == {
        "start.model": "m", "run.epochs": 3, "run.batch_size": 16, "run.lr": 1e-4, "objective.name": "sigmoid",
        "text.train": "head", "image.train": 2, "image.lora": 4, "augment.enabled": False,
        "run.chunk": 8, "objective.teacher": "big", "data.val_share": 0.2, "data.limit": 500, "run.patience": 0,
        "run.seed": 7, "run.precision": "bf16", "data.workers": 1, "run.device": "cpu",
    }  # fmt: skip
    assert (call["recipe"], call["force"]) == (Path("r.toml"), True)
    assert call["assignments"] == ["run.clip=2", "text.rate=0.5"]
    from mmsearch.train.settings import gathered

    wanted = {**call["given"], "text.train": "all", "image.train": 2}  # adapters need a backbone that learns
    assert gathered(["a"], recipe=None, given=wanted, assignments=call["assignments"]).run.clip == 2.0


def test_without_a_folder_to_write_to_nothing_begins(mmsearch):
    """Exit code 2, one line that names the option."""
    library = TrainLibrary()
    ended = mmsearch("train", "pairs.csv", library=library)
    assert (ended.code, ended.out, library.calls) == (2, "", [])
    assert ended.err_lines == ["mmsearch: error: --out: expected a folder, got nothing. Add --out checkpoints/NAME."]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "-1"],
        ["--batch-size", "1"],
        ["--lr", "fast"],
        ["--device", "tpu"],
        ["--no-such-option"],
        ["--lora", "0"],
    ],
)
def test_options_that_cannot_be_are_usage_errors(mmsearch, arguments):
    """Exit code 2 and where the help is; a batch of one among them."""
    ended = mmsearch("train", "pairs.csv", "--out", "o", *arguments, library=TrainLibrary())
    assert (ended.code, len(ended.err_lines)) == (2, 1)
    assert "mmsearch train --help" in ended.err


def test_the_help_names_every_option_and_its_default(mmsearch):
    """What somebody sees who has never trained anything."""
    ended = mmsearch("train", "--help")
    assert ended.code == 0
    for words in (
        "--out",
        "--recipe",
        "--set",
        "--force",
        "--json",
        "[default: 10]",
        "[default: 128]",
        "the same command",
    ):
        assert words in ended.out


def test_the_end_is_a_table_of_before_and_after(mmsearch):
    """What was done, hit@k both ways with intervals, and where the model is; on stdout, for people."""
    found = compare(measured("tiny", right=0), measured("mine", right=6))
    ended = mmsearch("train", "p.csv", "--out", "o", library=TrainLibrary(trained=report(comparison=found, share=0.75)))
    lines = ended.out.splitlines()
    assert lines[0] == "90 pictures trained on, 10 held out, 30 steps in 3 epochs (best: 2), 0 s"
    assert lines[1:-2] == list(found.lines())
    assert any("hit@1" in line and "rises" in line for line in lines)
    assert "75 % of the new weights" in lines[-2]
    assert lines[-1].startswith("checkpoint: c/mine  (curves: c/mine/curves.png")


def test_json_is_one_object_on_stdout(mmsearch):
    """The same that is in report.json."""
    found = compare(measured("tiny", right=0), measured("mine", right=6))
    trained = report(comparison=found, warnings=("coarse",))
    ended = mmsearch("train", "p.csv", "--out", "o", "--json", library=TrainLibrary(trained=trained))
    assert json.loads(ended.out) == json.loads(json.dumps(trained.to_json()))
    assert json.loads(ended.out)["comparison"]["differences"]["text_to_image"]["hit@1"]["verdict"] == "rises"


def test_under_torchrun_the_first_process_speaks_for_all(mmsearch, monkeypatch):
    """Two tables would be one too many."""
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        library = TrainLibrary()
        assert len(mmsearch("train", "p.csv", "--out", "o", library=library).out.splitlines()) == lines
        assert given(library)["environ"]["RANK"] == rank


# The second stage


def test_the_second_stage_reaches_the_library_by_name(mmsearch):
    """With its fusion; a teacher is then one that has a re-ranker."""
    library = TrainLibrary(trained=rerank_report())
    command = ["train", "p.csv", "--out", "o", "--stage", "rerank", "--fusion", "gated", "--teacher", "big"]
    assert mmsearch(*command, library=library).code == 0
    assert given(library)["stage"] == "rerank"
    assert given(library)["given"] == {"rerank.fusion": "gated", "rerank.teacher": "big"}
    library = TrainLibrary()
    mmsearch("train", "p.csv", "--out", "o", library=library)
    assert given(library)["stage"] == "towers"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stage", "third"], "--stage: expected towers or rerank, got 'third'"),
        (["--fusion", "gated"], "--fusion: expected --stage rerank beside it, got --stage towers"),
    ],
)
def test_a_stage_that_is_none_is_a_usage_error(mmsearch, options, words):
    """Exit code 2 and one line, before the library is asked."""
    library = TrainLibrary()
    ended = mmsearch("train", "p.csv", "--out", "o", *options, library=library)
    assert (ended.code, ended.out, library.calls) == (2, "", [])
    assert words in ended.err and len(ended.err_lines) == 1


def test_the_end_of_a_second_stage_says_both_stages_and_how_honest_it_is(mmsearch):
    """What was trained, before and after, yes/no, the cut-off, and where it is; no more than there is."""
    found = compare(measured("first stage", right=0), measured("re-ranked", right=6))
    match = evaluate_matching([0.9, 0.2, 0.8, 0.1], [1, 0, 1, 0], clusters=[0, 0, 1, 1], model="re-ranked")
    trained = rerank_report(comparison=found, matching=match, scoring=ColorReranker().scoring)
    lines = mmsearch("train", "p.csv", "--out", "o", "--stage", "rerank", library=TrainLibrary(trained=trained)).out
    lines = lines.splitlines()
    assert lines[0] == ("gated, 1.2 M parameters: 90 pictures trained on, 10 held out, 1 step (best epoch: 2), 12 s")
    assert lines[1:-2] == [*found.lines(), *match.lines()]
    assert lines[-2].startswith("nothing found: 100 % of the held-out captions are answered")
    assert lines[-1] == "checkpoint: c/mine  (curves: c/mine/curves.png, probabilities: c/mine/reliability.png)"
    bare = mmsearch("train", "p.csv", "--out", "o", "--stage", "rerank", library=TrainLibrary(trained=rerank_report()))
    assert len(bare.out.splitlines()) == 2
    ended = mmsearch(
        "train", "p.csv", "--out", "o", "--stage", "rerank", "--json", library=TrainLibrary(trained=trained)
    )
    assert json.loads(ended.out) == json.loads(json.dumps(trained.to_json()))


@pytest.mark.parametrize(
    ("fails", "code"),
    [
        (InputError("pairs.csv", expected="pairs", got="none"), 1),
        (ModelError("training, step 3", expected="a finite loss", got="nan"), 1),
        (ResourceError("o/run", got="No space left", do="Free space."), 5),
    ],
)
def test_an_expected_error_is_one_line_and_its_own_exit_code(mmsearch, fails, code):
    """No traceback, and nothing on stdout."""
    ended = mmsearch("train", "pairs.csv", "--out", "o", library=TrainLibrary(fails=fails))
    assert (ended.code, ended.out, ended.err_lines) == (code, "", [f"mmsearch: error: {fails}"])


def test_ctrl_c_says_how_to_go_on(mmsearch):
    """Exit code 130, as of every program that an interrupt ended."""
    ended = mmsearch("train", "pairs.csv", "--out", "o", library=TrainLibrary(fails=KeyboardInterrupt()))
    assert (ended.code, ended.out, ended.err_lines) == (130, "", [f"mmsearch: {RESUME}"])
    assert "same command again" in RESUME


def pictures(folder: Path) -> Path:
    """Eight pictures of one colour each with captions, two of them held out."""
    folder.mkdir()
    lines = ["image,caption,split"]
    for number, (name, colour) in enumerate(COLORS.items()):
        Image.new("RGB", (24, 24), colour).save(folder / f"{name}.png")
        lines += [f"{name}.png,a {name} car,{'val' if number > 5 else 'train'}"]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def test_pairs_become_a_model_that_the_other_commands_take(mmsearch, plain_checkpoint, tmp_path):
    """The whole way once, from a table to a checkpoint by its run's folder; a second time is refused."""
    pairs = pictures(tmp_path / "d")
    command = ["train", pairs, "--out", tmp_path / "mine", "--model", str(plain_checkpoint.directory), "--epochs", "1",
               "--batch-size", "4", "--workers", "1", "--tune-image", "all", "--set", "run.graphs=false"]  # fmt: skip
    ended = mmsearch(*command, "--json", library=Library())
    assert (ended.code, json.loads(ended.out)["steps"]) == (0, 1)
    assert any("groups are held out" in line for line in ended.err_lines)
    held_out = tmp_path / "mine" / "held_out.jsonl"
    assert mmsearch("eval", held_out, "--model", str(tmp_path / "mine"), library=Library()).code == 0
    again = mmsearch(*command, library=Library())
    assert (again.code, again.out) == (2, "")
    assert "--force" in again.err


def test_a_table_without_pictures_ends_in_one_line(mmsearch, plain_checkpoint, tmp_path):
    """Before any training; nothing but the folder is made."""
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.png,a red car\n")
    model = str(plain_checkpoint.directory)
    ended = mmsearch("train", tmp_path / "pairs.csv", "--out", tmp_path / "o", "--model", model, library=Library())
    assert (ended.code, ended.out, len(ended.err_lines)) == (1, "", 1)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {".lock"}

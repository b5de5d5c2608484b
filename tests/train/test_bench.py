"""Keeping a checkpoint: the best one is whole at any moment, whatever happens while another is written."""

import pytest
import torch
from train_kit import Watch, settings

from mmsearch.errors import ResourceError
from mmsearch.testing import tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.checkpoint import Checkpoint, load_dual_encoder
from mmsearch.towers.locate import locate
from mmsearch.train.bench import Bench, Silent, keep, keep_final
from mmsearch.train.distributed import Ranks
from mmsearch.train.examples import Examples
from mmsearch.train.lora import add_lora, has_lora
from mmsearch.train.setup import Beginning
from mmsearch.types import Skipped, SkipReason


def bench_of(folder, *, model=None, watcher=None, **sections) -> Bench:
    start = Beginning(model or tiny_dual_encoder(), tiny_tokenizer_json(), "tiny", known=True)
    return Bench(settings("pairs.csv", **sections), folder, watcher or Silent(), Ranks(), Examples((), (), ()), start)


def test_the_best_is_a_link_to_the_last_that_was_kept(tmp_path):
    """The run's folder stands for it; the one before is removed."""
    bench = bench_of(tmp_path)
    keep(bench, "epoch-0001", graphs=False, card="")
    keep(bench, "epoch-0003", graphs=False, card="# mine\n")
    assert (tmp_path / "best").readlink().name == "epoch-0003"
    assert {path.name for path in tmp_path.iterdir()} == {"best", "epoch-0003"}
    assert locate(str(tmp_path))[0] == tmp_path / "best"
    assert (tmp_path / "best" / "README.md").read_text() == "# mine\n"
    assert Checkpoint.open(tmp_path / "best").name == tmp_path.name


def test_a_name_that_is_there_is_not_written_to(tmp_path):
    """After an interruption the same epoch is kept again: `best` may point to the first, whole till then."""
    bench = bench_of(tmp_path)
    keep(bench, "epoch-0001", graphs=False, card="")
    first = (tmp_path / "best").resolve()
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    config, bench.start.model.config = bench.start.model.config, None  # the second one fails half way
    with pytest.raises(AttributeError):
        keep(bench, "epoch-0001", graphs=False, card="")
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    bench.start.model.config = config
    keep(bench, "epoch-0001", graphs=False, card="")
    assert (tmp_path / "best").resolve() != first
    assert not first.exists()
    Checkpoint.open(tmp_path / "best").verify()


def test_adapters_are_merged_into_what_is_kept_and_stay_in_the_model(tmp_path):
    """A checkpoint is of plain towers at any time; training goes on with the adapters."""
    pytest.importorskip("peft")
    model = tiny_dual_encoder()
    add_lora(model, side="text", rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    bench = bench_of(tmp_path, model=model)
    keep(bench, "epoch-0001", graphs=False, card="")
    assert has_lora(model)
    ids = torch.tensor([[2, 4, 5, 3]])
    with torch.no_grad():
        kept = load_dual_encoder(tmp_path / "best").encode_texts(ids, torch.ones_like(ids))
        assert (kept - model.encode_texts(ids, torch.ones_like(ids))).abs().max() < 0.05


def test_a_best_that_is_a_folder_is_said_and_left_alone(tmp_path):
    """Somebody's copy without links: the error names it."""
    (tmp_path / "best").mkdir()
    with pytest.raises(ResourceError, match="remove best if it is a folder"):
        keep(bench_of(tmp_path), "epoch-0001", graphs=False, card="")
    assert (tmp_path / "best").is_dir()


def test_towers_that_cannot_be_exported_end_a_run_without_graphs(tmp_path):
    """Hours of training are not lost for them: a warning says that queries need torch."""

    def store(bench, name, *, graphs, card):
        if graphs:
            raise torch.onnx.errors.OnnxExporterError("no such operator\nand so on")
        keep(bench, name, graphs=graphs, card=card)

    watch = Watch()
    bench = bench_of(tmp_path, watcher=watch, run={"graphs": True})
    keep_final(bench, "epoch-0002-final", store=store)
    assert not Checkpoint.open(tmp_path / "best").has_graphs
    assert watch.notes == ["warning: no graphs beside the checkpoint, a query will need torch: no such operator"]


def test_graphs_are_left_out_where_nobody_wants_them(tmp_path):
    """`run.graphs = false`: no warning, since nothing went wrong."""
    bench = bench_of(tmp_path)
    keep_final(bench, "epoch-0002-final")
    assert not Checkpoint.open(tmp_path / "best").has_graphs
    assert bench.warnings == []


def test_what_was_left_out_is_told_and_remembered(tmp_path):
    """For the report."""
    watch = Watch()
    bench = bench_of(tmp_path, watcher=watch)
    bench.skip(Skipped("a.png", SkipReason.EMPTY, "0 bytes"))
    bench.warn("coarse")
    assert [one.path for one in bench.skipped] == ["a.png"]
    assert watch.notes == ["skipped a.png: empty file 0 bytes", "warning: coarse"]

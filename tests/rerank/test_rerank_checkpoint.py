"""A re-ranker's files: round trip, identities, what is refused, and towers that stay as they are."""

import json
import shutil

import numpy as np
import pytest
import torch

from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.rerank.checkpoint import (
    RERANK,
    RERANK_WEIGHTS,
    RerankCheckpoint,
    copy_towers,
    has_reranker,
    load_rerank_model,
    save_reranker,
)
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.scores import Scoring
from mmsearch.testing import TINY_CONFIG, TINY_RERANK, tiny_checkpoint, tiny_dual_encoder, tiny_reranker
from mmsearch.towers.checkpoint import Checkpoint, load_dual_encoder, save_checkpoint


@pytest.fixture
def copied(plain_reranker, tmp_path):
    return shutil.copytree(plain_reranker.directory, tmp_path / "copied")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, **changes):
    values = json.loads((folder / RERANK).read_text())
    (folder / RERANK).write_text(json.dumps({**values, **changes}))


def saved(model, folder, **given):
    return save_reranker(model, folder, **{"name": "t", "scoring_json": {}, "graphs": False, **given})


def changed(opened, *names):
    """The model of a checkpoint with something added to the parameters whose names start with one of `names`."""
    model = load_rerank_model(opened)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(names):
                parameter.add_(0.25)
    return model


def test_a_reranker_loads_as_the_model_that_was_saved(plain_reranker):
    """Exactly as stored, in eval mode; its banks, kept in 8 bits, can be read without torch."""
    model = load_rerank_model(plain_reranker)
    assert not model.training
    assert not model.towers.training
    assert model.config == RerankConfig(**TINY_RERANK, bank=4)
    again = load_rerank_model(RerankCheckpoint.open(plain_reranker.directory))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for of in ("caption", "picture"):
        bank = plain_reranker.bank(of)
        assert bank.shape == (4, 8)
        assert np.allclose(bank, model.state_dict()[f"{of}_bank"].numpy())
        assert np.allclose(np.linalg.norm(bank, axis=1), 1.0, atol=1e-2)


def test_saving_what_was_loaded_changes_nothing(plain_reranker, copied):
    """Half precision is a fixed point: same weights, same identities."""
    again = saved(load_rerank_model(plain_reranker), copied, scoring_json=plain_reranker.scoring_json)
    assert again.files == plain_reranker.files
    assert (again.identity, again.tokens_identity) == (plain_reranker.identity, plain_reranker.tokens_identity)


def test_the_towers_own_files_stay_as_they_are(tmp_path):
    """Byte for byte, the card too; an index made with them stays valid."""
    towers = tiny_checkpoint(tmp_path)
    before = contents(tmp_path)
    opened = saved(RerankModel(RerankConfig(**TINY_RERANK), load_dual_encoder(towers)), tmp_path, card="# a card")
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {RERANK, RERANK_WEIGHTS, "RERANK.md"}
    assert Checkpoint.open(tmp_path).identity == towers.identity == opened.towers.identity


def test_a_scoring_comes_back_as_it_was_saved(plain_reranker):
    """And is one that scores."""
    assert Scoring.from_json(plain_reranker.scoring_json).to_json() == plain_reranker.scoring_json


def test_what_is_no_json_is_refused_before_anything_is_written(plain_reranker, copied):
    """The re-ranker that was there is still there."""
    for scoring in ({"a": np.float32(1)}, {"a": float("nan")}):
        with pytest.raises(UsageError, match="plain JSON"):
            saved(load_rerank_model(plain_reranker), copied, scoring_json=scoring)
    assert RerankCheckpoint.open(copied).identity == plain_reranker.identity


def test_towers_are_copied_without_their_reranker(copied, tmp_path):
    """Same identity, no rerank.json; into itself nothing is done."""
    before = contents(copied)
    target = tmp_path / "deep" / "target"
    assert copy_towers(copied, target).identity == Checkpoint.open(copied).identity
    assert not has_reranker(target)
    assert {name: before[name] for name in contents(target)} == contents(target)
    assert "README.md" in contents(target)
    copy_towers(copied, copied)
    assert contents(copied) == before


def test_a_copy_that_cannot_be_written_is_a_resource_error(plain_reranker, tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        copy_towers(plain_reranker.directory, tmp_path / "file" / "below")


def test_other_fusion_weights_leave_stored_patches_valid(plain_reranker, copied):
    """The tokens' identity covers what makes a picture's patches and nothing else; the re-ranker's covers all."""
    base = plain_reranker
    again = saved(changed(base, "fusion."), copied)
    assert again.tokens_identity == base.tokens_identity
    assert again.identity != base.identity
    again = saved(changed(base, "patch_projection."), copied)
    assert again.tokens_identity != base.tokens_identity
    fusions = [RerankConfig(**{**TINY_RERANK, "fusion": name}) for name in ("late-interaction", "single-stream")]
    projection = load_rerank_model(base).patch_projection.state_dict()
    for config in fusions:
        model = RerankModel(config, load_dual_encoder(base.towers))
        model.patch_projection.load_state_dict(projection)
        again = saved(model, copied)
        assert again.tokens_identity == base.tokens_identity
        assert again.identity != base.identity


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"grid": 2},
        {"own_backbone": True},
        {"config": {**TINY_CONFIG, "preprocessing": {"size": 32, "fit": "crop"}}},
    ],
    ids=["towers", "grid", "backbone", "preprocessing"],
)
def test_what_changes_a_pictures_patches_changes_the_tokens_identity(change, tmp_path):
    """Other towers, another grid, a backbone of its own, another way to prepare pictures."""
    base, other = tiny_reranker(tmp_path / "a"), tiny_reranker(tmp_path / "b", **change)
    assert other.tokens_identity != base.tokens_identity
    assert other.identity != base.identity
    assert tiny_reranker(tmp_path / "c").tokens_identity == base.tokens_identity


def test_a_text_tower_that_changes_leaves_stored_patches_valid(tmp_path):
    """Only the image backbone's weights count, not those of the heads and of the other tower."""
    base = tiny_reranker(tmp_path / "a")
    model = changed(base, "nothing")
    with torch.no_grad():
        for part in (model.towers.text, model.towers.image.projection):
            for parameter in part.parameters():
                parameter.mul_(1.5)
    folder = tmp_path / "b"
    tiny_checkpoint(folder)  # for its tokenizer
    tokenizer = folder / "tokenizer.json"
    save_checkpoint(model.towers, folder, tokenizer_json=tokenizer, name="b", card="", graphs=False)
    model.towers.load_state_dict(load_dual_encoder(folder).state_dict())
    again = saved(model, folder)
    assert again.tokens_identity == base.tokens_identity
    assert again.identity != base.identity


def test_towers_other_than_those_recorded_are_refused(copied, tmp_path):
    """Both checksums are named, or nobody could tell which directory to fix."""
    other = tiny_checkpoint(tmp_path / "other", seed=3)
    recorded = Checkpoint.open(copied).files["model.safetensors"]
    copy_towers(other.directory, copied)
    with pytest.raises(ModelError, match=rf"{recorded[:12]}.*{other.files['model.safetensors'][:12]}"):
        RerankCheckpoint.open(copied)


def test_a_model_is_not_saved_beside_towers_it_does_not_read(copied):
    """The tensor that differs is named, and the re-ranker there is left alone."""
    before = contents(copied)
    with pytest.raises(ModelError, match=r"model\.safetensors: expected the towers that the re-ranker reads.*differs"):
        saved(RerankModel(RerankConfig(**TINY_RERANK), tiny_dual_encoder(seed=5)), copied)
    assert contents(copied) == before


@pytest.mark.parametrize("name", [RERANK_WEIGHTS, "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_on_opening_and_named(copied, name, damage):
    """The re-ranker's files and those of the towers it reads."""
    path = copied / name
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-10])
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        RerankCheckpoint.open(copied)


def test_a_directory_without_a_reranker_says_how_to_get_one(plain_checkpoint):
    """Towers alone are whole, and no re-ranker."""
    assert not has_reranker(plain_checkpoint.directory)
    with pytest.raises(ModelError, match=r"no rerank\.json.*--stage rerank"):
        RerankCheckpoint.open(plain_checkpoint.directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"mmsearch_rerank_format": 2},
        {"mmsearch_rerank_format": None},
        {"config": None},
        {"config": {"fusion": "magic"}},
        {"config": {"colour": "red"}},
        {"config": {"layers": 10**9}},
        {"scoring": 3},
        {"files": []},
        {"files": {}},
        {"files": {RERANK_WEIGHTS: 3}},
        {"towers": None},
    ],
    ids=str,
)
def test_a_rerank_json_that_is_not_ours_is_a_model_error(copied, changes):
    """A newer format, missing parts, unknown settings."""
    edit(copied, **changes)
    with pytest.raises(ModelError):
        RerankCheckpoint.open(copied)


def test_a_file_list_that_points_out_of_the_folder_is_refused(copied):
    """Before that file is opened."""
    files = json.loads((copied / RERANK).read_text())["files"]
    edit(copied, files={**files, "../../etc/passwd": "0"})
    with pytest.raises(ModelError, match=r"expected files of a re-ranker, got \.\./\.\./etc"):
        RerankCheckpoint.open(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000])
def test_a_rerank_json_that_is_no_object_is_named(copied, content):
    """Empty, cut, of another type, nested without end."""
    (copied / RERANK).write_text(content)
    with pytest.raises(ModelError, match=r"rerank\.json"):
        RerankCheckpoint.open(copied)


def test_weights_that_do_not_fit_are_named_before_memory_is_taken(copied):
    """Settings that ask for terabytes over a file of kilobytes cost a sentence."""
    config = {**json.loads((copied / RERANK).read_text())["config"], "width": 4096, "layers": 48, "heads": 16}
    edit(copied, config=config)
    with pytest.raises(ModelError, match=r"rerank\.safetensors, .*do not fit"):
        load_rerank_model(RerankCheckpoint.open(copied))


def test_a_save_that_fails_midway_leaves_no_reranker_rather_than_a_mixture(copied, plain_reranker):
    """rerank.json goes first and comes last; the towers are whole all the time."""
    (copied / "RERANK.md.draft").mkdir()  # the card cannot be written, after the new weights were
    with pytest.raises(ResourceError):
        saved(changed(plain_reranker, "fusion."), copied, card="# card")
    assert not has_reranker(copied)
    Checkpoint.open(copied)


def test_stale_graphs_go_when_new_weights_come(graph_reranker, tmp_path):
    """They would point into the old ones."""
    folder = shutil.copytree(graph_reranker.directory, tmp_path / "copied")
    again = saved(load_rerank_model(graph_reranker), folder)
    assert set(again.files) == {RERANK_WEIGHTS}
    assert not any(folder.glob("*.onnx"))
    assert not again.has_graphs
    assert graph_reranker.has_graphs

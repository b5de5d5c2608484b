"""A checkpoint directory: round trip, 8-bit table, and everything that is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from mmsearch.errors import ModelError, ResourceError
from mmsearch.testing import TINY_CONFIG, tiny_checkpoint, tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.checkpoint import TOKEN_TABLE, Checkpoint, load_dual_encoder, save_checkpoint
from mmsearch.towers.tensors import from_stored, quantise_rows, read_layout, to_stored
from mmsearch.types import Preprocessing


@pytest.fixture
def copied(plain_checkpoint, tmp_path):
    return shutil.copytree(plain_checkpoint.directory, tmp_path / "copied")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, content):
    """Change the weights and their checksum: what only the reader of the file itself can find."""
    from mmsearch.towers.checkpoint import file_checksum

    (folder / "model.safetensors").write_bytes(content)
    files = json.loads((folder / "config.json").read_text())["files"]
    edit_config(folder, files={**files, "model.safetensors": file_checksum(folder / "model.safetensors")})


@pytest.mark.parametrize("quantise", [False, True])
def test_a_checkpoint_loads_as_the_model_that_was_saved(quantise, tmp_path):
    """Vectors are exact, matrices to half precision, the 8-bit table to half a step of each row."""
    model = tiny_dual_encoder(seed=3)
    tiny_checkpoint(tmp_path, quantise=quantise, seed=3)
    loaded = load_dual_encoder(tmp_path)
    assert not loaded.training
    for name, value in model.state_dict().items():
        got = loaded.state_dict()[name]
        if name == TOKEN_TABLE and quantise:
            assert ((got - value).abs() <= value.abs().amax(dim=1, keepdim=True) / 127 * 0.51).all()
        elif value.ndim >= 2:
            assert torch.allclose(got, value, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(got, value)


def test_saving_what_was_loaded_changes_no_byte(tmp_path):
    """Half precision and the 8-bit table are fixed points, so a model can be saved again and stays itself."""
    first = tiny_checkpoint(tmp_path / "a")
    arguments = {"tokenizer_json": tiny_tokenizer_json(), "name": "tiny", "card": "", "graphs": False}
    again = save_checkpoint(load_dual_encoder(first), tmp_path / "b", **arguments)
    assert again.identity == first.identity


def test_rows_in_eight_bits_have_known_values():
    """Largest number -> 127; zeros stay zeros; every row has its own scale."""
    table = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 1e-3, -1e-3]])
    q8, scale = quantise_rows(table)
    assert q8.dtype == torch.int8
    assert scale.shape == (3, 1)
    assert q8[0].tolist() == [64, -127, 32]
    assert not q8[1].any()
    assert torch.allclose(q8 * scale.float(), table, atol=2 / 127 / 2, rtol=0.01)


def test_what_half_precision_cannot_hold_stays_single():
    """A matrix with 1e6 in it would become infinite."""
    state = {"big": torch.full((2, 2), 1e6), "small": torch.ones(2, 2), "vector": torch.ones(2)}
    state["count"] = torch.tensor(3)
    stored = to_stored(state, quantise=())
    assert stored["big"].dtype == stored["vector"].dtype == torch.float32
    assert stored["small"].dtype == torch.float16
    assert stored["count"].dtype == torch.int64
    assert all(torch.equal(from_stored(stored)[name], state[name]) for name in state)


def test_the_layout_says_where_each_tensor_lies(plain_checkpoint):
    """Bytes at the offsets are the tensors."""
    path = plain_checkpoint.directory / "model.safetensors"
    place = read_layout(path)["image.projection.straight.weight"]
    got = np.frombuffer(path.read_bytes()[place.offset : place.offset + place.length], np.float16).reshape(place.shape)
    wanted = load_dual_encoder(plain_checkpoint.directory).image.projection.straight.weight
    assert np.array_equal(got.astype(np.float32), wanted.detach().numpy())


def test_identity_follows_weights_tokenizer_architecture_and_preprocessing(tmp_path):
    """Two models whose vectors cannot be compared never look alike; the name does not count."""
    base = tiny_checkpoint(tmp_path / "base").identity
    assert tiny_checkpoint(tmp_path / "again").identity == base
    changes = [
        {"max_tokens": 9},
        {"image": {**TINY_CONFIG["image"], "pooling": "max"}},
        {"preprocessing": {"size": 32, "fit": "crop"}},
    ]
    others = [
        tiny_checkpoint(tmp_path / str(i), config={**TINY_CONFIG, **change}).identity
        for i, change in enumerate(changes)
    ]
    others.append(tiny_checkpoint(tmp_path / "seed", seed=1).identity)
    assert not any(other.same_space(base) for other in others)
    edit_config(tmp_path / "again", name="other")
    assert Checkpoint.open(tmp_path / "again").identity.same_space(base)


def test_preprocessing_may_be_given_if_the_model_sees_the_same_numbers(tmp_path):
    """Another fit is taken over, another size is refused."""
    arguments = {"tokenizer_json": tiny_tokenizer_json(), "name": "t", "card": "", "graphs": False}
    fit = Preprocessing(size=32, fit="crop")
    assert save_checkpoint(tiny_dual_encoder(), tmp_path, preprocessing=fit, **arguments).config.preprocessing == fit
    with pytest.raises(ModelError, match="preprocessing"):
        save_checkpoint(tiny_dual_encoder(), tmp_path, preprocessing=Preprocessing(size=64), **arguments)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_on_opening_and_named(copied, name, damage):
    """One flipped bit, a missing end, a missing file: the error says which file."""
    path = copied / name
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-10])
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Checkpoint.open(copied)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        (10**15).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (50).to_bytes(8, "little") + b'{"a":{"dtype":"F16","shape":[9999999999],"data_off',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_a_safetensors_file_with_a_broken_header_is_a_model_error(copied, content):
    """Also when its checksum is the right one for the broken file."""
    edit_weights(copied, content)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_dual_encoder(copied)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_layout(copied / "model.safetensors")


def test_weights_that_do_not_fit_the_config_are_named_before_memory_is_taken(copied):
    """A config that asks for 20 GB over a file of kilobytes costs a sentence."""
    text = {"backbone": {**TINY_CONFIG["text"]["backbone"], "hidden_size": 8192, "vocab_size": 600_000}}
    edit_config(copied, text={**text, "projection": {"kind": "linear"}})
    with pytest.raises(ModelError, match="do not fit"):
        load_dual_encoder(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "3", '{"a": 1}', '{"mmsearch_format": 2}'])
def test_a_config_that_is_not_ours_is_a_model_error(copied, content):
    """Empty, cut, another type, nested without end, somebody else's, a newer format."""
    (copied / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.open(copied)


@pytest.mark.parametrize(
    "files", [None, [], {}, {"model.safetensors": "0"}, {"../../etc/passwd": "0"}, {"tokenizer.json": 3}]
)
def test_a_file_list_that_is_not_one_is_a_model_error(copied, files):
    """Among them one that points out of the folder."""
    edit_config(copied, files=files)
    with pytest.raises(ModelError):
        Checkpoint.open(copied)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran')",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, name):
    """Alone in a folder or named itself."""
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match=r"safetensors.*[Cc]onvert"):
            Checkpoint.open(path)


def test_a_save_that_fails_midway_leaves_no_model_rather_than_a_mixture(tmp_path):
    """config.json goes first and comes last."""
    tiny_checkpoint(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()  # the card cannot be written, after the new weights were
    with pytest.raises(ResourceError, match=r"README|directory"):
        tiny_checkpoint(tmp_path, seed=5)
    with pytest.raises(ModelError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)


def test_a_saved_file_can_be_read_by_others(plain_checkpoint):
    """Modes follow the umask: a model that only its maker can read is no use to a server."""
    modes = {path.stat().st_mode & 0o777 for path in plain_checkpoint.directory.iterdir()}
    assert len(modes) == 1

"""CLIP, SigLIP and VisionTextDualEncoder directories of transformers, tiny and random."""

import json
import shutil

import numpy as np
import pytest
import torch

from mmsearch.encoder import Encoder
from mmsearch.errors import ModelError
from mmsearch.testing import tiny_transformers_directory
from mmsearch.towers.pretrained import read_preprocessing

KINDS = ["clip", "siglip", "vision-text-dual-encoder"]
TEXTS = ["a red dog", "", "a photo of the cat on the beach", "dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("transformers")
    return {kind: tiny_transformers_directory(root / kind, kind=kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_directory_loads_through_the_same_door(folders, kind):
    """Unit rows of one dimension for both sides; one at a time equals a batch."""
    encoder = Encoder.load(folders[kind], device="cpu", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    texts, (images, ok) = encoder.encode_texts(TEXTS), encoder.encode_pixels(pixels)
    assert ok.all()
    assert texts.shape == (4, encoder.dim)
    assert images.shape == (3, encoder.dim)
    single = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
    assert ((single * texts).sum(axis=1) > 0.99999).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_transformers_itself(folders, kind):
    """The model called by hand, on the same pixels scaled by hand."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    scaled = (pixels / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    with torch.no_grad():
        found = model.get_image_features(pixel_values=torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32))
    rows = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
    got, _ = Encoder.load(folders[kind], device="cpu", precision="fp32").encode_pixels(pixels)
    assert ((rows * got).sum(axis=1) > 0.99999).all()


def test_preprocessing_is_read_from_the_image_processor(folders):
    """CLIP cuts the middle, SigLIP squashes; mean and deviation are the file's."""
    clip, siglip = read_preprocessing(folders["clip"]), read_preprocessing(folders["siglip"])
    assert (clip.size, clip.fit, clip.mean, clip.std) == (32, "crop", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (siglip.size, siglip.fit, siglip.interpolation) == (32, "squash", "bicubic")


@pytest.mark.parametrize(
    "values",
    [{}, {"size": {"height": 3, "width": 4}}, {"size": 10**9}, {"size": "big"}, {"size": 32, "image_std": [0, 0, 0]}],
)
def test_preprocessing_that_cannot_be_followed_is_a_model_error(tmp_path, values):
    """No size, not square, absurd, no deviation."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError):
        read_preprocessing(tmp_path)


def test_a_missing_weight_is_an_error_not_a_random_number(folders, tmp_path):
    """transformers would fill it in and go on."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folders["clip"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"visual_projection\.weight"):
        Encoder.load(broken)


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors", b"\xff" * 64), ("tokenizer.json", b"{}"), ("config.json", b"{")]
)
def test_a_damaged_file_is_a_model_error(folders, tmp_path, file, content):
    """One sentence, no traceback."""
    broken = shutil.copytree(folders["clip"], tmp_path / "broken")
    (broken / file).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Encoder.load(broken)
    assert "\n" not in str(caught.value)


def test_code_in_a_model_folder_never_runs(folders, tmp_path):
    """auto_map names a module in the folder; another family is refused, ours ignores it."""
    folder = shutil.copytree(folders["clip"], tmp_path / "remote")
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    assert Encoder.load(folder).dim == 8
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ModelError, match="evil"):
        Encoder.load(folder)


def test_identity_follows_the_weights_of_the_folder(folders, tmp_path):
    """A copy is the same model; a changed file is another."""
    copy = shutil.copytree(folders["clip"], tmp_path / "copy")
    first, second = Encoder.load(folders["clip"]).identity, Encoder.load(copy).identity
    assert first.same_space(second)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert not first.same_space(Encoder.load(copy).identity)

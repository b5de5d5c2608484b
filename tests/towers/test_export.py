"""ONNX graphs that hold no weights: where they point, and that they answer as torch does."""

import numpy as np
import onnx
import pytest
import torch

from mmsearch.backends.onnx import OnnxBackend
from mmsearch.testing import TINY_CONFIG, tiny_checkpoint
from mmsearch.towers.checkpoint import TOKEN_TABLE, Checkpoint, load_dual_encoder
from mmsearch.towers.tensors import read_layout


def initialisers(graph_checkpoint, name):
    model = onnx.load(graph_checkpoint.directory / name, load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def cosine(a, b):
    return (np.asarray(a) * np.asarray(b)).sum(axis=1)


@pytest.mark.parametrize("name", ["text.onnx", "image.onnx"])
def test_a_graph_points_into_the_weights_file_and_stores_nothing_twice(graph_checkpoint, name):
    """Each reference names model.safetensors and the very bytes of one stored tensor."""
    places = {(s.offset, s.length) for s in read_layout(graph_checkpoint.directory / "model.safetensors").values()}
    outside = [t for t in initialisers(graph_checkpoint, name).values() if t.external_data]
    assert outside
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "model.safetensors"
        assert (int(entries["offset"]), int(entries["length"])) in places
    inside = sum(len(t.raw_data) for t in initialisers(graph_checkpoint, name).values())
    assert inside < 20_000


def test_the_token_table_stays_in_eight_bits(graph_checkpoint):
    """It is gathered first and widened after: no float table is ever made."""
    tensors = initialisers(graph_checkpoint, "text.onnx")
    assert tensors[TOKEN_TABLE + ".q8"].data_type == onnx.TensorProto.INT8
    assert tensors[TOKEN_TABLE + ".scale"].data_type == onnx.TensorProto.FLOAT16
    assert not any(t.name in (TOKEN_TABLE, TOKEN_TABLE + ".stored") for t in tensors.values())


def test_a_graph_tells_nothing_of_the_machine_that_made_it(graph_checkpoint):
    """No source paths of the exporter."""
    for name in ("text.onnx", "image.onnx"):
        content = (graph_checkpoint.directory / name).read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 5), (4, 9), (3, 12), (2, 64)])
def test_texts_through_the_graph_equal_torch(graph_checkpoint, b, t):
    """Any batch and length, with padding: cosine above 0.9999."""
    rng = np.random.default_rng(b * 100 + t)
    ids, mask = rng.integers(0, 21, (b, t)), (np.arange(t)[None] < rng.integers(1, t + 1, (b, 1))).astype(np.int64)
    got = OnnxBackend(graph_checkpoint.directory).encode_tokens(ids, mask)
    with torch.no_grad():
        wanted = load_dual_encoder(graph_checkpoint).encode_texts(torch.from_numpy(ids), torch.from_numpy(mask))
    assert got.dtype == np.float32
    assert (cosine(got, wanted) > 0.99999).all()


@pytest.mark.parametrize("b", [1, 2, 7])
def test_pictures_through_the_graph_equal_torch(graph_checkpoint, b):
    """uint8 in, scaling and anchors included: cosine above 0.9999."""
    pixels = np.random.default_rng(b).integers(0, 256, (b, 32, 32, 3), dtype=np.uint8)
    got = OnnxBackend(graph_checkpoint.directory, threads=1).encode_pixels(pixels)
    with torch.no_grad():
        wanted = load_dual_encoder(graph_checkpoint).encode_images(torch.from_numpy(pixels))
    assert (cosine(got, wanted) > 0.99999).all()


def test_both_mirror_images_are_in_the_graph(tmp_path):
    """For any batch, and with the weights stored once."""
    mirrored = {**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "mirror": True}}
    checkpoint = tiny_checkpoint(tmp_path / "mirrored", config=mirrored, graphs=True)
    backend, model = OnnxBackend(checkpoint.directory), load_dual_encoder(checkpoint)
    for b in (1, 3):
        pixels = np.random.default_rng(b).integers(0, 256, (b, 32, 32, 3), np.uint8)
        with torch.no_grad():
            wanted = model.encode_images(torch.from_numpy(pixels))
        assert (cosine(backend.encode_pixels(pixels), wanted) > 0.9999).all()
        assert (cosine(backend.encode_pixels(pixels[:, :, ::-1].copy()), wanted) > 0.9999).all()


def test_anchors_with_a_peak_are_in_the_graph(tmp_path):
    """Both verdicts; the model without the peak is another one."""
    peaked = {**TINY_CONFIG, "image": {**TINY_CONFIG["image"], "anchors": {"classes": 5, "scale": 3.0, "peak": 0.5}}}
    checkpoint = tiny_checkpoint(tmp_path / "peaked", config=peaked, graphs=True)
    pixels, model = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8), load_dual_encoder(checkpoint)
    with torch.no_grad():
        wanted = model.encode_images(torch.from_numpy(pixels))
        model.image.anchors.peak = 0.0
        other = model.encode_images(torch.from_numpy(pixels))
    got = OnnxBackend(checkpoint.directory).encode_pixels(pixels)
    assert (cosine(got, wanted) > 0.99999).all() and (cosine(got, other) < 0.9999).all()


def test_graphs_are_covered_by_checksums(graph_checkpoint):
    """A changed graph would be a changed model."""
    assert {"text.onnx", "image.onnx"} <= set(Checkpoint.open(graph_checkpoint.directory).files)

"""A re-ranker's graphs: where they point, that they answer as torch does, and what happens without one."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from mmsearch.backends.choice import Choice
from mmsearch.backends.onnx import Sessions
from mmsearch.errors import ModelError
from mmsearch.rerank.base import Fusion, ImageSide, TextSide
from mmsearch.rerank.checkpoint import (
    GRAPHS,
    MATCH_GRAPH,
    MATCH_ONE_GRAPH,
    RerankCheckpoint,
    load_rerank_model,
    save_reranker,
)
from mmsearch.rerank.config import FUSIONS
from mmsearch.rerank.export import match_graph, patches_graph
from mmsearch.rerank.reranker import Reranker, Words
from mmsearch.rerank.run_onnx import OnnxRun
from mmsearch.rerank.tokens import quantise
from mmsearch.testing import tiny_reranker
from mmsearch.towers.tensors import read_layout

HOMES = {
    "words.onnx": {"model.safetensors"},
    "patches.onnx": {"model.safetensors", "rerank.safetensors"},
    "match.onnx": {"rerank.safetensors"},
    "match_one.onnx": {"rerank.safetensors"},
}


def unit(*shape, seed):
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sides(b, t, *, texts=None):
    """Random sides of `b` pairs, texts of 1 to t words; `texts`: another batch on their side."""
    rng, n = np.random.default_rng(100 * b + t), texts or b
    mask = torch.from_numpy((np.arange(t)[None] < rng.integers(1, t + 1, (n, 1))).astype(np.int64))
    text = TextSide(unit(n, 8, seed=1), torch.randn(n, t, 16, generator=torch.Generator().manual_seed(2)), mask)
    return text, ImageSide(unit(b, 8, seed=3), torch.randn(b, 9, 8, generator=torch.Generator().manual_seed(4)))


def named(text, image):
    """Both sides as `sides.Sides.gather` gives them."""
    tensors = {"text_rows": text.rows, "tokens": text.tokens, "mask": text.mask}
    tensors |= {"image_rows": image.rows, "patches": image.patches}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def run(folder, name, text, image):
    wanted = {entry.name for entry in onnx.load(folder / name, load_external_data=False).graph.input}
    feeds = {name: side for name, side in named(text, image).items() if name in wanted}
    return Sessions(folder).run(name, feeds, threads=1)


def agree(found, model, text, image):
    with torch.no_grad():
        logits, attention = model.fusion.read(text, image)
    assert found[0].dtype == np.float32
    assert np.allclose(found[0], logits.numpy(), atol=1e-4)
    assert (attention is None) == (len(found) == 1)
    if attention is not None:
        assert np.allclose(found[1], attention.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_points_into_the_weights_files_and_stores_nothing_twice(graph_reranker, name):
    """Each reference names a file that has the tensor, and the very bytes of it; patches.onnx names both files."""
    folder = graph_reranker.directory
    places = {
        file: {(s.offset, s.length) for s in read_layout(folder / file).values()}
        for file in ("model.safetensors", "rerank.safetensors")
    }
    tensors = onnx.load(folder / name, load_external_data=False).graph.initializer
    homes = set()
    for tensor in tensors:
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            homes.add(entries["location"])
            assert (int(entries["offset"]), int(entries["length"])) in places[entries["location"]]
    assert homes == HOMES[name]
    assert sum(len(tensor.raw_data) for tensor in tensors) < 20_000


def test_only_the_lower_layers_are_in_the_words_graph(graph_reranker):
    """`text_layer` is 1: nothing of the second layer is read."""
    names = {
        tensor.name
        for tensor in onnx.load(graph_reranker.directory / "words.onnx", load_external_data=False).graph.initializer
    }
    assert any("encoder.layer.0." in name for name in names)
    assert not any("encoder.layer.1." in name or "projection" in name for name in names)


def test_a_graph_tells_nothing_of_the_machine_that_made_it(graph_reranker):
    """No source paths of the exporter."""
    for name in GRAPHS:
        content = (graph_reranker.directory / name).read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 5), (4, 9), (3, 12), (2, 64)])
def test_words_through_the_graph_equal_torch(graph_reranker, b, t):
    """Any batch and length, with padding."""
    rng = np.random.default_rng(b * 100 + t)
    ids, mask = rng.integers(0, 21, (b, t)), (np.arange(t)[None] < rng.integers(1, t + 1, (b, 1))).astype(np.int64)
    found = Sessions(graph_reranker.directory).run("words.onnx", {"ids": ids, "mask": mask}, threads=1)[0]
    with torch.no_grad():
        wanted = load_rerank_model(graph_reranker).words(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert np.allclose(found[mask > 0], wanted[mask > 0], atol=1e-4)


@pytest.mark.parametrize("b", [1, 5])
def test_patches_through_the_graph_equal_torch(graph_reranker, b):
    """uint8 in, scaling, averaging to the grid and projection included."""
    pixels = np.random.default_rng(b).integers(0, 256, (b, 32, 32, 3), dtype=np.uint8)
    found = Sessions(graph_reranker.directory).run("patches.onnx", {"pixels": pixels}, threads=1)[0]
    with torch.no_grad():
        wanted = load_rerank_model(graph_reranker).patches(torch.from_numpy(pixels)).numpy()
    assert found.shape == (b, 9, 8)
    assert np.allclose(found, wanted, atol=1e-4)


def test_patches_of_a_backbone_of_its_own_point_into_its_own_weights(tmp_path):
    """The tower's backbone has nothing to do with them."""
    opened = tiny_reranker(tmp_path, own_backbone=True, fusion="gated")
    model = load_rerank_model(opened)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
    opened = save_reranker(model, tmp_path, name="own", scoring_json={}, graphs=False)
    model = load_rerank_model(opened)
    (tmp_path / "patches.onnx").write_bytes(patches_graph(model, tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = Sessions(tmp_path).run("patches.onnx", {"pixels": pixels}, threads=1)[0]
    with torch.no_grad():
        assert np.allclose(found, model.patches(torch.from_numpy(pixels)).numpy(), atol=1e-4)


def exported(folder, fusion, *, graph):
    """The model of one layer, its `graph` written beside it."""
    model = load_rerank_model(tiny_reranker(folder, fusion=fusion, layers=1))
    (folder / graph).write_bytes(match_graph(model, folder, one_text=graph == MATCH_ONE_GRAPH))
    return model


ONE_OF_BOTH = {
    "concat": MATCH_ONE_GRAPH,
    "weighted": MATCH_GRAPH,
    "gated": MATCH_GRAPH,
    "bilinear": MATCH_ONE_GRAPH,
    "late-interaction": MATCH_ONE_GRAPH,
    "single-stream": MATCH_GRAPH,
}
"""Graphs take seconds to make: here one of each fusion, both of cross-attention below."""


def test_no_fusion_is_forgotten():
    """A new one is exported here too."""
    assert {*ONE_OF_BOTH, "cross-attention"} == set(FUSIONS)


@pytest.mark.parametrize("fusion", ONE_OF_BOTH)
def test_every_fusion_has_a_graph_that_answers_as_torch_does(fusion, tmp_path):
    """Any number of pairs and words; attention where there is one, rows alone where nothing else is read."""
    graph = ONE_OF_BOTH[fusion]
    model = exported(tmp_path, fusion, graph=graph)
    for b, t in ((1, 1), (1, 6), (5, 1), (4, 9)):
        text, image = sides(b, t, texts=1 if graph == MATCH_ONE_GRAPH else b)
        agree(run(tmp_path, graph, text, image), model, text, image)
    logits, attention = OnnxRun(tmp_path, reads_tokens=model.fusion.reads_tokens).match(named(text, image))
    agree((logits,) if attention is None else (logits, attention), model, text, image)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 7), (6, 4)])
def test_the_graphs_of_a_checkpoint_answer_as_torch_does(graph_reranker, b, t):
    """Cross-attention of two layers, both ways."""
    model, folder = load_rerank_model(graph_reranker), graph_reranker.directory
    agree(run(folder, MATCH_GRAPH, *sides(b, t)), model, *sides(b, t))
    agree(run(folder, MATCH_ONE_GRAPH, *sides(b, t, texts=1)), model, *sides(b, t, texts=1))


class Stubborn(Fusion):
    """Its result depends on data in a way that no graph can say."""

    def match(self, text, image):
        logits = (text.rows * image.rows).sum(dim=-1)
        return (logits if float(logits.sum()) > 0 else -logits), None


def test_what_cannot_be_exported_has_no_graph(tmp_path):
    """None, not an error: torch will run it."""
    model = load_rerank_model(tiny_reranker(tmp_path))
    model.fusion = Stubborn(model.config, dim=8, text_width=16)
    assert match_graph(model, tmp_path) is None


def test_a_part_without_a_graph_is_run_by_torch(graph_reranker, tmp_path):
    """The others are still run by onnxruntime; who asks for onnxruntime alone is told what is missing."""
    folder = shutil.copytree(graph_reranker.directory, tmp_path / "copied")
    values = json.loads((folder / "rerank.json").read_text())
    del values["files"][MATCH_GRAPH]
    (folder / "rerank.json").write_text(json.dumps(values))
    (folder / MATCH_GRAPH).unlink()
    (folder / "rerank.safetensors").with_name(MATCH_ONE_GRAPH).write_bytes(b"never opened")
    opened = RerankCheckpoint.open(folder, verify=False)
    assert not opened.has_graphs
    with pytest.raises(ModelError, match=r"no match\.onnx"):
        Reranker(opened, choice=Choice(backend="onnx"))
    (text, image), reranker = sides(3, 4), Reranker(opened, choice=Choice(device="cpu"))
    words = Words(text.tokens.numpy(), text.mask.numpy())
    given = (words, text.rows.numpy(), quantise(image.patches.numpy()), image.rows.numpy())
    whole = Reranker(graph_reranker, choice=Choice(backend="onnx"))
    pairs = [(0, 0), (0, 1), (2, 1)]
    assert np.allclose(reranker.logits(*given, pairs=pairs), whole.logits(*given, pairs=pairs), atol=1e-4)

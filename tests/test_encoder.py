"""The encoder: cold path, batching, memory, bad rows, threads, names of models."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from mmsearch.backends.choice import Backends, Choice
from mmsearch.encoder import Encoder, fastest_backend
from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_checkpoint, tiny_tokenizer_json
from mmsearch.towers.locate import locate
from mmsearch.types import ModelIdentity, Preprocessing

TEXTS = ["a red dog", "", "the cat on the beach", "dog", "a photo of a photo of a photo of a photo of a dog", "x\0y"]
SIZE = 32


class Fake:
    """A backend with known rows: the first pixel, or sums of tokens. `room`: the largest batch that fits."""

    name, device, precision = "fake", "cpu", "fp32"

    def __init__(self, *, room=10**9, bad=None):
        self.room, self.bad, self.batches = room, bad, []

    def _fit(self, count):
        if count > self.room:
            raise MemoryError("too big")
        self.batches.append(count)

    def encode_tokens(self, ids, mask):
        self._fit(len(ids))
        rows = np.stack([ids.sum(axis=1), mask.sum(axis=1), np.ones(len(ids))], axis=1).astype(np.float32)
        return np.where(ids[:, 1:2] == 8, np.nan, rows) if self.bad else rows

    def encode_pixels(self, pixels):
        self._fit(len(pixels))
        rows = pixels[:, 0, 0].astype(np.float32)
        return np.where(rows == 7, np.float32(self.bad or 0), rows)


def fake_encoder(backend, *, dim=3):
    from tokenizers import Tokenizer

    from mmsearch.towers.tokenise import Tokeniser

    return Encoder(
        identity=ModelIdentity("fake", "0", "0", dim),
        preprocessing=Preprocessing(size=4),
        tokeniser=Tokeniser(Tokenizer.from_str(tiny_tokenizer_json()), max_tokens=12),
        text_backend=lambda: backend,
        image_backend=lambda: backend,
    )


def numbered(count):
    pixels = np.ones((count, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count) + 10
    return pixels


def pixels_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_a_cold_query_imports_no_torch(graph_checkpoint):
    """Load and encode a text in a fresh interpreter: neither torch nor transformers, torchvision, timm, Pillow."""
    code = (
        "import sys; from pathlib import Path; from mmsearch.encoder import Encoder\n"
        f"rows = Encoder.load(Path({str(graph_checkpoint.directory)!r})).encode_texts(['a red dog'])\n"
        "assert rows.shape == (1, 8)\n"
        "heavy = 'torch transformers torchvision timm PIL faiss onnx scipy huggingface_hub'.split()\n"
        "print(sorted({*heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_onnx_and_torch_answer_alike(graph_checkpoint):
    """Whichever backend encoded an index, the other can query it."""
    onnx = Encoder.load(graph_checkpoint.directory, backend="onnx")
    torch = Encoder.load(graph_checkpoint.directory, backend="torch", device="cpu", precision="fp32")
    assert onnx.identity == torch.identity
    assert ((onnx.encode_texts(TEXTS) * torch.encode_texts(TEXTS)).sum(axis=1) > 0.9999).all()
    pairs = [encoder.encode_pixels(pixels_of(5))[0] for encoder in (onnx, torch)]
    assert ((pairs[0] * pairs[1]).sum(axis=1) > 0.9999).all()


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_batch_size_and_neighbours_change_no_row(graph_checkpoint, backend):
    """One at a time, in twos, all at once, in another order: cosine above 0.99999."""
    encoder = Encoder.load(graph_checkpoint.directory, backend=backend, precision="fp32", device="cpu")
    pixels = pixels_of(7)
    texts, (images, _) = encoder.encode_texts(TEXTS), encoder.encode_pixels(pixels)
    for size in (1, 2, 5):
        assert ((encoder.encode_texts(TEXTS, batch_size=size) * texts).sum(axis=1) > 0.99999).all()
        assert ((encoder.encode_pixels(pixels, batch_size=size)[0] * images).sum(axis=1) > 0.99999).all()
    assert ((encoder.encode_texts(TEXTS[::-1])[::-1] * texts).sum(axis=1) > 0.99999).all()


def test_bf16_on_the_cpu_stays_close_to_fp32(graph_checkpoint):
    """Cosine above 0.99: one index may be built in bf16 and queried in fp32."""
    rows = [
        Encoder.load(graph_checkpoint.directory, backend="torch", device="cpu", precision=p).encode_pixels(
            pixels_of(4)
        )[0]
        for p in ("fp32", "bf16")
    ]
    assert ((rows[0] * rows[1]).sum(axis=1) > 0.99).all()


def test_texts_come_back_in_the_order_they_were_given():
    """They are sorted by length inside; the rows must not be."""
    encoder = fake_encoder(Fake())
    texts = ["dog " * n for n in (5, 1, 3, 2, 4)]
    rows = encoder.encode_texts(texts, batch_size=2)
    single = np.concatenate([encoder.encode_texts([text]) for text in texts])
    assert np.allclose(rows[:, 1] / rows[:, 2], [7, 3, 5, 4, 6])
    assert np.allclose(single[:, 1] / single[:, 2], [7, 3, 5, 4, 6])


@pytest.mark.parametrize("room", [1, 2, 3, 7, 8])
def test_out_of_memory_halves_the_batch_and_loses_nothing(room):
    """Every row is there, its own, whatever the room; the size that fits is kept."""
    backend = Fake(room=room)
    rows, ok = fake_encoder(backend).encode_pixels(numbered(19), batch_size=8)
    assert ok.all()
    assert np.allclose(rows[:, 0] / rows[:, 1], np.arange(19) + 10)
    assert sum(backend.batches) == 19
    assert room / 2 < max(backend.batches) <= room


def test_a_single_picture_that_does_not_fit_is_a_resource_error():
    """Down to one and no further: exit code 5, not a loop."""
    with pytest.raises(ResourceError, match="batch of one"):
        fake_encoder(Fake(room=0)).encode_pixels(numbered(3))
    with pytest.raises(ResourceError):
        fake_encoder(Fake(room=0)).encode_texts(["dog"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_row_without_direction_is_marked_and_never_leaves_as_nan(bad):
    """Its neighbours keep their rows; the bad one is zeros with ok False."""
    pixels = numbered(5)
    pixels[2, 0, 0] = 7
    rows, ok = fake_encoder(Fake(bad=bad)).encode_pixels(pixels)
    assert ok.tolist() == [True, True, False, True, True]
    assert np.isfinite(rows).all()
    assert not rows[2].any()
    assert np.allclose(np.linalg.norm(rows[ok], axis=1), 1)


def test_bad_rows_of_texts_and_pictures_are_errors_that_name_them():
    """The text's number is that of the caller's list, not of the sorted one."""
    encoder = fake_encoder(Fake(bad=np.nan))
    with pytest.raises(ModelError, match="text 1"):
        encoder.encode_texts(["cat cat cat", "dog", "cat"])
    with pytest.raises(ModelError, match="picture 1"):
        encoder.encode_images([np.full((4, 4, 3), value, np.uint8) for value in (9, 7, 9)], batch_size=1)


def test_nothing_in_nothing_out():
    """(0, d), for every door."""
    encoder = fake_encoder(Fake())
    assert encoder.encode_texts([]).shape == (0, 3)
    assert encoder.encode_images([]).shape == (0, 3)
    assert encoder.encode_pixels(numbered(0))[0].shape == (0, 3)
    assert encoder.truncated([]) == []


def test_a_picture_is_an_image_pixels_or_a_path_and_nothing_else(graph_checkpoint, tmp_path):
    """All three give the same row; a str is not guessed to be a path."""
    encoder = Encoder.load(graph_checkpoint.directory)
    pixels = np.full((48, 64, 3), (200, 30, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "red.png")
    rows = encoder.encode_images([pixels, Image.fromarray(pixels), tmp_path / "red.png"])
    assert ((rows @ rows.T) > 0.99999).all()
    transparent = Image.fromarray(np.dstack([pixels, np.zeros((48, 64), np.uint8)]))
    white = encoder.encode_images([transparent, np.full((48, 64, 3), 255, np.uint8)])
    assert white[0] @ white[1] > 0.99999
    for wrong in (str(tmp_path / "red.png"), pixels.astype(np.float32), pixels[..., 0], None):
        with pytest.raises(UsageError, match="picture"):
            encoder.encode_images([wrong])


def test_arguments_that_cannot_mean_anything_are_usage_errors(graph_checkpoint):
    """One str for a list, float pixels, another size, no batch, unknown names."""
    encoder = fake_encoder(Fake())
    for call in (
        lambda: encoder.encode_texts("dog"),
        lambda: encoder.encode_pixels(numbered(2).astype(np.float32)),
        lambda: encoder.encode_pixels(np.zeros((2, 8, 8, 3), np.uint8)),
        lambda: encoder.encode_pixels(numbered(2), batch_size=0),
        lambda: Encoder.load(graph_checkpoint.directory, backend="keras"),
        lambda: Encoder.load(graph_checkpoint.directory, precision="int3"),
        lambda: Encoder.load(graph_checkpoint.directory, device="toaster"),
        lambda: Encoder.load(graph_checkpoint.directory, backend="onnx", precision="bf16"),
        lambda: Encoder.load(graph_checkpoint.directory, threads=0),
    ):
        with pytest.raises(UsageError):
            call()


def test_a_model_whose_output_has_another_dimension_is_refused():
    """Rows of three for a model that says eight."""
    with pytest.raises(ModelError, match="output"):
        fake_encoder(Fake(), dim=8).encode_pixels(numbered(2))


def test_many_threads_get_the_rows_of_one(graph_checkpoint):
    """Loading included: eight threads ask a fresh encoder at once."""
    encoder, wanted = (Encoder.load(graph_checkpoint.directory) for _ in range(2))
    texts, results = wanted.encode_texts(TEXTS), {}
    barrier = threading.Barrier(8)

    def ask(number):
        barrier.wait()
        results[number] = [encoder.encode_texts(TEXTS), encoder.encode_pixels(pixels_of(3))[0]]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(np.allclose(rows, texts, atol=1e-5) for rows, _ in results.values())
    assert all(np.allclose(images, results[0][1], atol=1e-5) for _, images in results.values())


def test_truncated_says_what_the_model_did_not_read(graph_checkpoint):
    """max_tokens 12: eleven words do not fit between the special tokens."""
    encoder = Encoder.load(graph_checkpoint.directory)
    assert encoder.max_tokens == 12
    assert encoder.truncated(["dog " * 10, "dog " * 11]) == [False, True]


def test_a_gpu_is_used_for_pictures_only_when_nobody_chose_otherwise(graph_checkpoint):
    """Graphs and the CPU: onnx for both sides. No graphs, or another precision: torch."""
    made = []
    graphs = graph_checkpoint.directory
    assert Backends(Choice(device="cpu"), graphs=graphs, towers=made.append).text().name == "onnx"
    assert Backends(Choice(device="cpu"), graphs=graphs, towers=made.append).image().name == "onnx"
    assert Encoder.load(graphs, precision="bf16", device="cpu").backend("image").name == "torch"
    with pytest.raises(ModelError, match="graphs"):
        Backends(Choice(backend="onnx"), graphs=None, towers=made.append)


def test_a_checkpoint_without_graphs_runs_on_torch(plain_checkpoint):
    """And says so when onnx is asked for."""
    assert Encoder.load(plain_checkpoint.directory).backend("text").name == "torch"
    with pytest.raises(ModelError, match="graphs"):
        Encoder.load(plain_checkpoint.directory, backend="onnx")
    assert fastest_backend(plain_checkpoint.directory) == "torch"


def test_fastest_backend_names_one_of_the_two(graph_checkpoint):
    """A short race with real batches."""
    assert fastest_backend(graph_checkpoint.directory, seconds=0.1, batch_size=2) in ("onnx", "torch")


def test_a_str_is_a_directory_only_if_it_is_one_or_looks_like_a_path(graph_checkpoint, tmp_path, monkeypatch):
    """./x, /x and ~ are paths, x is one if it is there; the bundled model has a name; the rest goes to the hub."""
    bundled = tiny_checkpoint(tmp_path / "bundled").directory
    assert locate(None, bundled=bundled) == (bundled, "tiny")
    assert locate("tiny", bundled=bundled) == (bundled, "tiny")
    assert locate(str(graph_checkpoint.directory), bundled=bundled)[0] == graph_checkpoint.directory
    monkeypatch.chdir(bundled.parent)
    assert locate("bundled", bundled=tmp_path / "none")[0].resolve() == bundled
    for missing in ("./none", "/no/such/folder", "~/no such folder here"):
        with pytest.raises(ModelError, match="nothing there"):
            locate(missing, bundled=bundled)
    for nonsense in ("none", "", "a/b/c", "no such model", "x\0y", "../x/y.pt", "https://example.org/model"):
        with pytest.raises(ModelError):
            locate(nonsense, bundled=bundled)


def test_a_hub_name_without_a_network_is_one_sentence(graph_checkpoint):
    """In a fresh interpreter told to be offline: quick, one line, no traceback."""
    code = (
        "from mmsearch.encoder import Encoder; from mmsearch.errors import ModelError\n"
        "try: Encoder.load('somebody/some-model')\n"
        "except ModelError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert len(done.stdout.strip().splitlines()) == 1
    assert "somebody/some-model" in done.stdout
    assert "network" in done.stdout


def test_a_bundled_model_that_is_not_there_is_one_sentence(tmp_path):
    """A checkout without weights."""
    with pytest.raises(ModelError, match=r"config\.json"):
        locate(None, bundled=tmp_path)


def test_two_models_of_other_sizes_never_share_an_identity(tmp_path):
    """What an index compares before it answers."""
    a = tiny_checkpoint(tmp_path / "a").identity
    b = tiny_checkpoint(tmp_path / "b", config={**TINY_CONFIG, "dim": 6}).identity
    assert not a.same_space(b)


@pytest.fixture(scope="module")
def joining_checkpoint(tmp_path_factory):
    """A tiny model with an item head; its towers are those of `plain_checkpoint`."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models"), config={**TINY_CONFIG, "item": {"kind": "gated"}})


def test_an_item_may_have_a_picture_a_text_or_both(joining_checkpoint):
    """One side alone is that side's row; both make another one, the same in company and alone."""
    encoder = Encoder.load(joining_checkpoint.directory, backend="torch", device="cpu", precision="fp32")
    picture, text = pixels_of(1)[0], "a red dog"
    rows = encoder.encode_items([picture, None, picture], [None, text, text])
    assert np.allclose(rows[0], encoder.encode_images([picture])[0], atol=1e-6)
    assert np.allclose(rows[1], encoder.encode_texts([text])[0], atol=1e-6)
    assert np.abs(rows[2] - rows[0]).max() > 0.05 < np.abs(rows[2] - rows[1]).max()
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    assert np.allclose(rows[2:], encoder.encode_items([picture], [text]), atol=1e-6)


def test_the_item_head_is_the_models(joining_checkpoint):
    """Arrays through the encoder are tensors through the dual encoder; NaN in an absent row changes nothing."""
    import torch

    from mmsearch.towers.checkpoint import load_dual_encoder

    rng = np.random.default_rng(0)
    sides = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in rng.normal(size=(2, 3, 8))]
    sides = [side.astype(np.float32) for side in sides]
    masks = {"has_image": np.array([True, False, True]), "has_text": np.array([True, True, False])}
    sides[0][1] = sides[1][2] = np.nan
    got = Encoder.load(joining_checkpoint.directory).item_rows(*sides, **masks)
    with torch.no_grad():
        model = load_dual_encoder(joining_checkpoint)
        wanted = model.item_rows(*map(torch.tensor, sides), **{k: torch.tensor(v) for k, v in masks.items()})
    assert np.allclose(got, wanted.numpy(), atol=1e-6)


def test_a_model_without_an_item_head_says_so_before_it_encodes():
    """The pictures are not even looked at."""
    backend = Fake()
    with pytest.raises(ModelError, match="joins an item's picture and text"):
        fake_encoder(backend).encode_items(list(numbered(2)), ["a dog", None])
    assert backend.batches == []


@pytest.mark.parametrize(
    ("images", "texts", "says"),
    [
        ([None], "a dog", "one str"),
        ([None], ["a", "b"], "1 pictures and 2 texts"),
        ([None, None], ["a", None], "item 1"),
    ],
)
def test_items_that_are_none_are_one_usage_error(joining_checkpoint, images, texts, says):
    """A text where a list belongs, lists of two lengths, an item with nothing."""
    with pytest.raises(UsageError, match=says):
        Encoder.load(joining_checkpoint.directory).encode_items(images, texts)


def test_no_items_are_no_rows(joining_checkpoint):
    """(0, d), not an error from below."""
    assert Encoder.load(joining_checkpoint.directory).encode_items([], []).shape == (0, 8)


def test_a_cold_query_of_a_model_with_an_item_head_imports_no_torch(graph_checkpoint, tmp_path):
    """The head is for items: it is not loaded for a text."""
    directory = shutil.copytree(graph_checkpoint.directory, tmp_path / "joins")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "item": {"kind": "concat"}}))
    code = (
        "import sys; from pathlib import Path; from mmsearch.encoder import Encoder\n"
        f"encoder = Encoder.load(Path({str(directory)!r}))\n"
        "assert encoder.joins_items and encoder.encode_texts(['a red dog']).shape == (1, 8)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"

"""The checkpoint that comes with the package: small, offline, and right about plain things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsearch import Encoder
from mmsearch.cli.demo import sample_photos
from mmsearch.data.images import open_image, prepare
from mmsearch.rerank.checkpoint import GRAPHS, RERANK_CARD, RERANK_WEIGHTS
from mmsearch.rerank.present import RERANK
from mmsearch.towers.locate import BUNDLED

pytestmark = pytest.mark.skipif(not (BUNDLED / "config.json").exists(), reason="no bundled checkpoint in this tree")

KNOWN = {
    "a cat": "chelsea.png",
    "a cup of coffee": "coffee.png",
    "a rocket": "rocket.jpg",
    "a motorcycle": "motorcycle_left.png",
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load()


def photo(name: str) -> Path:
    return next(Path(path) for path in sample_photos() if path.endswith(name))


def test_it_fits_into_its_budget():
    """64 MB for both towers, tokenizer and graphs included, 32 MB for the re-ranker; no pickle among them."""
    files = [path for path in BUNDLED.iterdir() if path.is_file()]
    own = {*GRAPHS, RERANK, RERANK_WEIGHTS, RERANK_CARD}
    assert sum(path.stat().st_size for path in files if path.name not in own) <= 64_000_000
    assert sum(path.stat().st_size for path in files if path.name in own) <= 32_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".onnx", ".md"}


def test_plain_words_find_plain_things(encoder):
    """Each word's photo is first among all sample photos."""
    photos = [Path(path) for path in sample_photos()]
    scores = encoder.encode_texts(list(KNOWN)) @ encoder.encode_images(photos).T
    found = {text: photos[int(best)].name for text, best in zip(KNOWN, scores.argmax(axis=1), strict=True)}
    assert found == KNOWN


def test_scaled_decode_moves_the_embedding_by_less_than_a_hundredth(encoder, tmp_path):
    """A 12-megapixel JPEG decoded at reduced scale means what it means decoded in full: cosine above 0.99."""
    for name in ("chelsea.png", "motorcycle_left.png", "coffee.png"):
        with Image.open(photo(name)) as small:
            small.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "big.jpg", quality=90)
        with Image.open(tmp_path / "big.jpg") as big:
            full = big.convert("RGB")
        fast, _ = open_image(tmp_path / "big.jpg", target=encoder.preprocessing.size)
        assert fast.size < full.size, "decoded at reduced scale"
        rows, ok = encoder.encode_pixels(np.stack([prepare(i, encoder.preprocessing) for i in (full, fast)]))
        assert ok.all() and float(rows[0] @ rows[1]) > 0.99


def test_both_backends_give_the_same_rows(encoder):
    """onnxruntime and torch run the same weights: cosine above 0.9999 for texts and pictures."""
    torch_encoder = Encoder.load(backend="torch", precision="fp32", device="cpu")
    texts = ["a dog on a beach", "x", "two people in front of a very large red building on a rainy day"]
    photos = [photo("chelsea.png"), photo("coffee.png")]
    for ours, theirs in (
        (encoder.encode_texts(texts), torch_encoder.encode_texts(texts)),
        (encoder.encode_images(photos), torch_encoder.encode_images(photos)),
    ):
        assert (ours * theirs).sum(axis=1).min() > 0.9999


def test_batch_size_and_neighbours_change_nothing(encoder):
    """A text or picture has one vector, whatever it is encoded with."""
    texts = ["a cat", "a very long text about a cat that sleeps on a sofa in the sun", "dog"]
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    assert (alone * encoder.encode_texts(texts)).sum(axis=1).min() > 0.99999
    photos = [photo(name) for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    alone = np.concatenate([encoder.encode_images([path]) for path in photos])
    assert (alone * encoder.encode_images(photos)).sum(axis=1).min() > 0.99999


def test_a_cold_query_imports_no_torch(tmp_path):
    """The whole command, with the real model: none of the heavy packages is imported."""
    photos = [str(photo("chelsea.png")), str(photo("coffee.png"))]
    script = (
        "import sys, json\n"
        "from mmsearch.cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = [m for m in ('torch', 'transformers', 'torchvision', 'timm') if m in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)\n"
    )
    out = str(tmp_path / "index")
    for arguments in (["index", *photos, "--out", out], ["query", "a cat", "--index", out, "-k", "1", "-f"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    assert done.stdout.strip() == photos[0]


def test_force_mends_what_damage_took(tmp_path):
    """One flipped byte: verify names it (exit 4), `index --force` follows the advice, and all is well again."""
    photos = [str(photo("chelsea.png")), str(photo("coffee.png"))]
    out = tmp_path / "index"

    def mmsearch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmsearch", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert mmsearch("index", *photos, "--out", str(out)).returncode == 0
    content = bytearray((out / "vectors.f16").read_bytes())
    content[10] ^= 0xFF
    (out / "vectors.f16").write_bytes(content)
    assert mmsearch("verify", "--index", str(out)).returncode == 4
    refused = mmsearch("query", "a cat", "--index", str(out))
    assert (refused.returncode, refused.stderr.count("\n")) == (4, 1) and "--force" in refused.stderr
    assert mmsearch("index", *photos, "--out", str(out), "--force").returncode == 0
    assert mmsearch("verify", "--index", str(out)).returncode == 0
    found = mmsearch("query", "a cat", "--index", str(out), "-f", "-k", "1")
    assert found.stdout.strip() == photos[0]

"""Right answers known in advance: an encoder that sees only colours, and tiny models for tests.

`ColorEncoder` needs no weights and no torch: a picture is where its mean colour lies among eight named colours,
a text is the colour words in it. "a red car" finds red pictures, exactly and at once.
The builders below it write tiny models to disk, with random weights of a fixed seed; they import torch when called.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.rerank.calibration import Temperature
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.cutoff import Cutoff
from mmsearch.rerank.scores import CASES, Case, Scoring
from mmsearch.rerank.tokens import Patches, dequantise, quantise
from mmsearch.similarity import normalise
from mmsearch.types import Embeddings, ModelIdentity, Pixels, Preprocessing

if TYPE_CHECKING:
    from mmsearch.rerank.checkpoint import RerankCheckpoint
    from mmsearch.towers.checkpoint import Checkpoint
    from mmsearch.towers.dual_encoder import DualEncoder

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
_SHARPNESS = 6.0
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "the", "dog", "cat", "on", "beach", "car", *COLORS]
TINY_TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TINY_CONFIG: dict[str, Any] = {
    "dim": 8,
    "max_tokens": 12,
    "preprocessing": {"size": 32},
    "text": {"backbone": TINY_TEXT, "projection": {"kind": "residual"}},
    "image": {"backbone": "plain_cnn:8,16", "projection": {"kind": "residual"}, "anchors": {"classes": 5}},
}

TINY_RERANK: dict[str, Any] = {
    "patch_dim": 8,
    "grid": 3,
    "text_layer": 1,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "hidden": 8,
}


class ColorEncoder:
    """Looks like `Encoder`; d = 8, one axis a colour of `COLORS`. `size`: side of the input in pixels.

    A picture whose mean colour is one of the eight has its largest number on that axis. A text without a
    colour word lies in the middle of all axes. `name`: two of them with other names count as two models.
    """

    def __init__(self, *, size: int = 16, name: str = "colors") -> None:
        self.preprocessing = Preprocessing(size=size)
        self.max_tokens = 16
        self.source: str | None = name
        weights = "0" * 32 if name == "colors" else name.encode().hex()
        self.identity = ModelIdentity(name, weights, self.preprocessing.digest(), len(COLORS))

    @property
    def dim(self) -> int:
        """d = 8."""
        return self.identity.dim

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Embeddings:
        """(n) texts -> (n, 8): the colour words of each, normalised; known value: "red" -> the first axis."""
        if isinstance(texts, str):
            raise UsageError("texts", expected="a list of texts", got="one str")
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"[a-z]+", text.lower())[: self.max_tokens]
            row[:] = [words.count(color) for color in COLORS]
            if not row.any():
                row[:] = 1.0
        return normalise(rows) if len(rows) else rows

    def encode_images(self, images: Sequence[Any], *, batch_size: int = 32) -> Embeddings:
        """(n) PIL images, (h, w, 3) pixels or paths -> (n, 8)."""
        means = np.array([_mean_color(image) for image in images]).reshape(-1, 3)
        return _place(means)

    def encode_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> tuple[Embeddings, NDArray[np.bool_]]:
        """(n, s, s, 3) uint8 -> ((n, 8), all True)."""
        if pixels.ndim != 4 or pixels.shape[1:] != (self.preprocessing.size, self.preprocessing.size, 3):
            raise UsageError("pixels", expected=f"(n, {self.preprocessing.size}, ...)", got=str(pixels.shape))
        return _place(pixels.reshape(len(pixels), -1, 3).mean(axis=1)), np.ones(len(pixels), dtype=bool)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """True for texts of more than `max_tokens` words."""
        return [len(re.findall(r"[a-z]+", text.lower())) > self.max_tokens for text in texts]


class GridPatches:
    """Looks like the part of `Reranker` that reads pictures: a patch token is the mean colour of a cell, 0 to 1.

    `grid` cells a side, p = grid², c = 3. `size`: side of the input in pixels. `name`: another one, another identity.
    """

    def __init__(self, *, size: int = 16, grid: int = 2, name: str = "grid") -> None:
        self.preprocessing = Preprocessing(size=size)
        self.config = RerankConfig(patch_dim=3, grid=grid)
        self.tokens_identity = f"{name}-{size}-{grid}"

    def read_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> Patches:
        """(n, s, s, 3) uint8 -> the tokens of n pictures. A red one's are all (1, 0, 0), up to rounding."""
        grid, n = self.config.grid, len(pixels)
        side = self.preprocessing.size // grid
        cells = pixels[:, : side * grid, : side * grid].reshape(n, grid, side, grid, side, 3)
        means = cells.mean(axis=(2, 4), dtype=np.float64).reshape(n, grid * grid, 3)  # (n, p, 3)
        return quantise((means / 255.0).astype(np.float32))


class ColorWords(NamedTuple):
    """Texts as `ColorReranker` reads them: `tokens` (n, t, 8), one axis a colour; `mask` (n, t) int64, 1 for words."""

    tokens: NDArray[np.float32]
    mask: NDArray[np.int64]


class ColorReranker(GridPatches):
    """Looks like `Reranker`, beside `ColorEncoder`: a text matches a picture that has every colour it names somewhere.

    What a mean colour cannot tell, it can: "red and blue" is the picture with a red and a blue half. Logits run from
    -8 (a colour is missing, or the text names none) to 8. `cutoff=False`: a re-ranker that was fitted without one.
    """

    def __init__(self, *, size: int = 16, grid: int = 2, name: str = "color-reranker", cutoff: bool = True) -> None:
        super().__init__(size=size, grid=grid, name=name)
        self.identity = self.name = name
        self.reads_tokens = True
        self.towers = ColorEncoder(size=size).identity
        self.scoring = _color_scoring(cutoff=cutoff)
        self.caption_bank = self.picture_bank = np.empty((0, len(COLORS)), np.float32)
        self.read = 0

    def read_texts(self, texts: Sequence[str]) -> ColorWords:
        """(n) texts -> their words, those that name a colour on its axis."""
        words = [self.words_of(text) for text in texts]
        longest = max((len(row) for row in words), default=1)
        tokens, mask = (
            np.zeros((len(texts), longest, len(COLORS)), np.float32),
            np.zeros((len(texts), longest), np.int64),
        )
        for row, text in enumerate(words):
            mask[row, : len(text)] = 1
            for place, word in enumerate(text):
                tokens[row, place] = [word == color for color in COLORS]
        return ColorWords(tokens, mask)

    def words_of(self, text: str) -> list[str]:
        """The words of a text; known value: "A red car" -> a, red, car."""
        return re.findall(r"[a-z]+", text.lower())[:16] or ["?"]

    def read_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> Patches:
        """As `GridPatches`; `read` counts the pictures."""
        self.read += len(pixels)
        return super().read_pixels(pixels, batch_size=batch_size)

    def logits(
        self,
        words: ColorWords,
        text_rows: Embeddings,
        patches: Patches,
        image_rows: Embeddings,
        *,
        pairs: NDArray[np.int64],
        batch_size: int = 64,
    ) -> NDArray[np.float32]:
        """(m, 2) pairs of (text, picture) -> (m,): 16 times the least seen of the colours named, less 8."""
        seen = _seen(patches).max(axis=1)  # (n, p, 8) -> (n, 8)
        found = np.full(len(pairs), -8.0, np.float32)
        for row, (text, picture) in enumerate(pairs.tolist()):
            named = words.tokens[text].any(axis=0)  # (8,)
            if named.any():
                found[row] = 16.0 * seen[picture][named].min() - 8.0
        return found

    def attention(
        self, words: ColorWords, text_rows: Embeddings, patches: Patches, image_rows: Embeddings
    ) -> NDArray[np.float32]:
        """(t, p): a colour looks at the patches that have it, another word at all of them alike."""
        looks = words.tokens[0] @ _seen(patches)[0].T + 1e-4  # (t, 8) x (8, p)
        shares: NDArray[np.float32] = (looks / looks.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares


def _seen(patches: Patches) -> NDArray[np.float32]:
    """(n, p, 3) mean colours, 0 to 1 -> (n, p, 8) nearness to each named colour, 1 for the colour itself."""
    named = np.array(list(COLORS.values()), np.float32) / 255.0
    distance = np.linalg.norm(dequantise(patches)[:, :, None] - named, axis=3)
    seen: NDArray[np.float32] = np.exp(-_SHARPNESS * distance)
    return seen


def _color_scoring(*, cutoff: bool) -> Scoring:
    """Evenly odd at logit + cosine = 0.5, or at half a cosine with a text; present: the best hit is even or better."""
    even = Temperature(1.0)
    return Scoring(
        {
            "both": Case((0.0,) * 4, (1.0,) * 4, (1.0, 1.0, 4.0, 0.0), -2.0, even, None),
            "picture": Case((0.0,) * 3, (1.0,) * 3, (1.0, 1.0, 0.0), -0.5, even, None),
            "text": Case((0.5,), (1.0,), (8.0,), 0.0, even, None),
            "cosine": Case((0.5, 0.0), (1.0, 1.0), (8.0, 0.0), 0.0, even, None),
        },
        Cutoff((0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0), 0.0, 4.0, 64, 1.0, 1.0) if cutoff else None,
    )


def _mean_color(image: Any) -> NDArray[np.float64]:  # noqa: ANN401 - picture, pixels or path
    if isinstance(image, os.PathLike):
        from PIL import Image

        with Image.open(image) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    else:
        pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    mean: NDArray[np.float64] = pixels.astype(np.float64).mean(axis=(0, 1))
    return mean


def _place(means: NDArray[np.float64]) -> Embeddings:
    """(n, 3) mean colours, 0..255 -> (n, 8) unit rows, the nearest named colour's axis the largest."""
    named = np.array(list(COLORS.values()), np.float64)
    distance = np.linalg.norm(means[:, None] - named[None], axis=2) / 255.0  # (n, 8)
    return normalise(np.exp(-_SHARPNESS * distance)) if len(means) else np.empty((0, len(COLORS)), np.float32)


def color_image(color: str, *, size: tuple[int, int] = (20, 16)) -> Pixels:
    """(h, w, 3) pixels of one named colour; `size` is (width, height)."""
    return np.full((size[1], size[0], 3), COLORS[color], np.uint8)


def tiny_tokenizer_json() -> str:
    """A tokenizer.json of twenty-one whole words, [CLS] and [SEP] around them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    text: str = tokenizer.to_str()
    return text


def tiny_dual_encoder(config: dict[str, Any] | None = None, *, seed: int = 0) -> DualEncoder:
    """A dual encoder of a few thousand numbers, in eval mode, its anchors and residual branches not at zero."""
    import torch

    from mmsearch.towers.dual_encoder import build_dual_encoder

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_dual_encoder(config or TINY_CONFIG).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.05)
        if model.image.anchors is not None:
            model.image.anchors.set_names(torch.randn_like(model.image.anchors.names))
    return model


def tiny_checkpoint(
    directory: Path, *, config: dict[str, Any] | None = None, graphs: bool = False, quantise: bool = True, seed: int = 0
) -> Checkpoint:
    """Write a tiny checkpoint; `graphs=True` takes a few seconds more."""
    from mmsearch.towers.checkpoint import save_checkpoint

    return save_checkpoint(
        tiny_dual_encoder(config, seed=seed),
        directory,
        tokenizer_json=tiny_tokenizer_json(),
        name="tiny",
        card="# tiny\n\nRandom weights, for tests.\n",
        quantise_embeddings=quantise,
        graphs=graphs,
    )


def tiny_reranker(
    directory: Path,
    *,
    fusion: str = "cross-attention",
    config: dict[str, Any] | None = None,
    graphs: bool = False,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401 - of a RerankConfig
) -> RerankCheckpoint:
    """Write a tiny checkpoint with a re-ranker beside its towers; `graphs=True` takes some seconds more.

    `config`: of the towers, as for `tiny_checkpoint`; `settings`: instead of those of `TINY_RERANK`. Random weights
    whose logits differ from pair to pair. The final score of a picture is 4 · cosine + logit, of a text 4 · cosine.
    """
    import torch

    from mmsearch.rerank.checkpoint import save_reranker
    from mmsearch.rerank.model import RerankModel
    from mmsearch.towers.checkpoint import load_dual_encoder

    towers = load_dual_encoder(tiny_checkpoint(directory, config=config, graphs=graphs, seed=seed))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = RerankModel(RerankConfig(**{**TINY_RERANK, "fusion": fusion, **settings}), towers).eval()
        for parameter in model.parameters():
            if not parameter.any():  # what starts at zero would say the same of every pair
                parameter.normal_(std=0.3)
        for bank in (model.caption_bank, model.picture_bank):
            bank.copy_(torch.nn.functional.normalize(torch.randn_like(bank), dim=-1))
    weights, even = {"cosine": 4.0, "text_cosine": 4.0, "logit": 1.0}, Temperature(1.0)
    cases = {
        name: Case(
            (0.0,) * len(parts), (1.0,) * len(parts), tuple(weights.get(part, 0.0) for part in parts), 0.0, even, None
        )
        for name, parts in CASES.items()
    }
    return save_reranker(model, directory, name="tiny", scoring_json=Scoring(cases).to_json(), graphs=graphs)


def tiny_transformers_directory(directory: Path, *, kind: str) -> Path:
    """Write a tiny random "clip", "siglip" or "vision-text-dual-encoder" model as transformers would."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _tiny_transformers_model(kind).save_pretrained(directory, safe_serialization=True)
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json())
    size: dict[str, Any] = {"shortest_edge": 32} if kind == "clip" else {"height": 32, "width": 32}
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}} if kind == "clip" else {}
    processor = {"size": size, "resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **crop}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def _tiny_transformers_model(kind: str) -> Any:  # noqa: ANN401 - classes of transformers
    import transformers as hf

    width: dict[str, Any] = {k: TINY_TEXT[k] for k in TINY_TEXT if k not in ("vocab_size", "max_position_embeddings")}
    vision = {**width, "image_size": 32, "patch_size": 16}
    words = {**width, "vocab_size": 32, "max_position_embeddings": 16}
    text = {**words, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    if kind == "siglip":
        return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
    if kind == "vision-text-dual-encoder":
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**vision), hf.BertConfig(**words), projection_dim=8
        )
        return hf.VisionTextDualEncoderModel(config)
    raise UsageError("kind", expected="clip, siglip or vision-text-dual-encoder", got=repr(kind))

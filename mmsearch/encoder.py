"""Texts and pictures to unit rows: model, device, precision and batching. Torch ends here.

Decisions:
- Texts go through onnxruntime whenever the checkpoint has graphs: a cold query imports neither torch nor
  transformers. Pictures do so too on machines without a GPU; with one, torch is worth its start.
- The towers are loaded when they are first needed: a query never reads the image tower.
- A batch that does not fit into memory is halved, down to one; the smaller size is kept for the rest of the
  call. What a batch was cut into changes no row.
- A row that is not finite or has no direction never leaves: `encode_pixels` marks it (a build lists the file
  and goes on), `encode_texts` and `encode_images` raise.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmsearch.backends.base import Backend
from mmsearch.backends.choice import Backends, Choice
from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.towers.checkpoint import TOKENIZER, Checkpoint, is_checkpoint, load_dual_encoder, load_item_fusion
from mmsearch.towers.config import no_item_fusion
from mmsearch.towers.locate import BUNDLED, is_directory, locate
from mmsearch.types import Embeddings, ModelIdentity, Pixels, Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmsearch.backends.items import ItemBackend
    from mmsearch.towers.tokenise import Tokeniser

_ITEMS_AT_ONCE = 1024


class Encodes(Protocol):
    """What a build and a search need of a model: `Encoder`, or `testing.ColorEncoder`."""

    identity: ModelIdentity
    preprocessing: Preprocessing
    max_tokens: int
    source: str | None

    @property
    def dim(self) -> int:
        """d, the length of every row."""
        ...

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Embeddings:
        """(n) texts -> (n, d) unit rows."""
        ...

    def encode_images(self, images: Sequence[Any], *, batch_size: int = 32) -> Embeddings:
        """(n) pictures -> (n, d) unit rows."""
        ...

    def encode_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> tuple[Embeddings, NDArray[np.bool_]]:
        """(n, s, s, 3) -> ((n, d) unit rows, (n) whether each is one)."""
        ...

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than the model reads."""
        ...


@runtime_checkable
class JoinsItems(Protocol):
    """What a build with fused item vectors needs beside `Encodes`; `joins_items`: whether this model can."""

    @property
    def joins_items(self) -> bool:
        """True when the model learned to join an item's picture and text."""
        ...

    def item_rows(
        self, images: Embeddings, texts: Embeddings, *, has_image: NDArray[np.bool_], has_text: NDArray[np.bool_]
    ) -> Embeddings:
        """(n, d), (n, d) unit rows, (n,), (n,) which of them are there -> (n, d) unit rows."""
        ...


class Encoder:
    """A loaded model. Thread-safe. Make one with `Encoder.load`.

    `identity` says which vectors its rows can be compared with; `max_tokens` is where texts are cut;
    `source` is what `load` was given, a directory as absolute path (None: the bundled model).
    """

    def __init__(
        self,
        *,
        identity: ModelIdentity,
        preprocessing: Preprocessing,
        tokeniser: Tokeniser,
        text_backend: Callable[[], Backend],
        image_backend: Callable[[], Backend],
        item_backend: Callable[[], ItemBackend] | None = None,
    ) -> None:
        self.source: str | None = None
        self.identity, self.preprocessing = identity, preprocessing
        self.max_tokens = tokeniser.max_tokens
        self._tokeniser = tokeniser
        self._backends = {"text": text_backend, "image": image_backend}
        self._item_backend = item_backend
        self._item: ItemBackend | None = None
        self._loaded: dict[str, Backend] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
    ) -> Encoder:
        """Load a model: None is the bundled one; else a directory or a hub name (see `towers.locate`).

        `device`: "auto", "cpu", "cuda", "cuda:N". `precision`: "auto", "fp32", "bf16", "fp16".
        `backend`: "auto", "onnx" (CPU, fp32, needs graphs), "torch". `threads`: for the CPU, None picks.
        Raises `ModelError` when the model is not there, damaged or of another kind.
        """
        choice = Choice(device=device, precision=precision, backend=backend, threads=threads)
        directory, name = locate(model)
        if is_checkpoint(directory):
            encoder = _load_checkpoint(cls, Checkpoint.open(directory), choice)
        else:
            encoder = _load_pretrained(cls, directory, choice, name=name)
        if model is not None:
            encoder.source = str(directory.resolve()) if is_directory(model) else str(model)
        return encoder

    @property
    def dim(self) -> int:
        """d, the length of every row."""
        return self.identity.dim

    def backend(self, side: str) -> Backend:
        """What runs the "text" or the "image" tower; loads it now."""
        with self._lock:
            if side not in self._loaded:
                try:
                    self._loaded[side] = self._backends[side]()
                except MemoryError as error:
                    raise _out_of_memory(f"loading the {side} tower") from error
            return self._loaded[side]

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Embeddings:
        """(n) texts -> (n, d) unit rows. Longer texts are cut at `max_tokens`, empty ones encoded as they are."""
        if isinstance(texts, str):
            raise UsageError("texts", expected="a list of texts", got="one str", do="Write [text].")
        backend = self.backend("text")
        order = np.array(sorted(range(len(texts)), key=lambda i: len(texts[i])), dtype=np.int64)

        def run(part: slice) -> NDArray[np.float32]:
            tokens = self._tokeniser([texts[i] for i in order[part]])
            return backend.encode_tokens(tokens.ids, tokens.mask)

        rows, ok = _checked(_in_batches(run, len(texts), batch_size=batch_size, dim=self.dim))
        _require(ok, what="text", order=order)
        back = np.empty_like(rows)
        back[order] = rows
        return back

    def encode_images(self, images: Sequence[Image | Pixels | os.PathLike[str]], *, batch_size: int = 32) -> Embeddings:
        """(n) pictures -> (n, d) unit rows. A picture is a PIL image, (h, w, 3) uint8 pixels, or a path."""
        size = self.preprocessing.size
        rows = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            part = [to_pixels(image, self.preprocessing) for image in images[start : start + batch_size]]
            pixels = np.stack(part).reshape(-1, size, size, 3)
            found, ok = self.encode_pixels(pixels, batch_size=batch_size)
            _require(ok, what="picture", order=np.arange(start, start + len(part)))
            rows[start : start + len(part)] = found
        return rows

    def encode_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> tuple[Embeddings, NDArray[np.bool_]]:
        """(n, s, s, 3) uint8 prepared pictures -> ((n, d) rows, (n) bool).

        Where the second is True the row has norm 1; where it is False the model gave no direction
        (NaN, infinite or zero) and the row is all zeros: do not store it.
        """
        size = self.preprocessing.size
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {pixels.shape}"
            raise UsageError("pixels", expected=f"uint8 (n, {size}, {size}, 3)", got=got, do="Prepare them first.")
        backend = self.backend("image")
        return _checked(
            _in_batches(
                lambda part: backend.encode_pixels(pixels[part]), len(pixels), batch_size=batch_size, dim=self.dim
            )
        )

    @property
    def joins_items(self) -> bool:
        """True when the model learned to join an item's picture and text."""
        return self._item_backend is not None

    def encode_items(
        self,
        images: Sequence[Image | Pixels | os.PathLike[str] | None],
        texts: Sequence[str | None],
        *,
        batch_size: int = 32,
    ) -> Embeddings:
        """(n) items, each a picture (see `encode_images`), a text, or both -> (n, d) unit rows; None: it is missing.

        Raises `UsageError` for lists of unequal length or an item with neither, `ModelError` for a model without
        an item head.
        """
        if isinstance(texts, str) or len(images) != len(texts):
            got = "one str" if isinstance(texts, str) else f"{len(images)} pictures and {len(texts)} texts"
            raise UsageError("items", expected="two lists of one length", got=got, do="Write None for what is missing.")
        has_image, has_text = (np.array([one is not None for one in side], bool) for side in (images, texts))
        if not (has_image | has_text).all():
            number = int(np.flatnonzero(~(has_image | has_text))[0])
            raise UsageError(f"item {number}", expected="a picture, a text or both", got="neither")
        self._joiner()  # before the pictures take their minutes
        rows = np.zeros((2, len(images), self.dim), np.float32)
        rows[0, has_image] = self.encode_images([one for one in images if one is not None], batch_size=batch_size)
        rows[1, has_text] = self.encode_texts([one for one in texts if one is not None], batch_size=batch_size)
        return self.item_rows(rows[0], rows[1], has_image=has_image, has_text=has_text)

    def item_rows(
        self, images: Embeddings, texts: Embeddings, *, has_image: NDArray[np.bool_], has_text: NDArray[np.bool_]
    ) -> Embeddings:
        """Unit rows of items from those of their sides: (n, d), (n, d), (n,) and (n,) which are there -> (n, d).

        Raises as `encode_items` does.
        """
        head = self._joiner()

        def run(part: slice) -> NDArray[np.float32]:
            return head.join(images[part], texts[part], has_image=has_image[part], has_text=has_text[part])

        rows, ok = _checked(_in_batches(run, len(images), batch_size=_ITEMS_AT_ONCE, dim=self.dim))
        _require(ok, what="item", order=np.arange(len(rows)))
        return rows

    def _joiner(self) -> ItemBackend:
        with self._lock:
            if self._item_backend is None:
                raise no_item_fusion(self.identity.name)
            self._item = self._item or self._item_backend()
            return self._item

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than the model reads."""
        return list(self._tokeniser(texts).truncated) if texts else []


def fastest_backend(
    model: str | Path | None = None, *, seconds: float = 2.0, batch_size: int = 16, threads: int | None = None
) -> str:
    """Whichever of "onnx" and "torch" encodes more pictures a second here. Takes `seconds` and the import of torch."""
    directory, _ = locate(model)
    if not is_checkpoint(directory) or not Checkpoint.open(directory).has_graphs:
        return "torch"
    speeds: dict[str, float] = {}
    for name in ("onnx", "torch"):
        encoder = Encoder.load(directory, backend=name, threads=threads, device="cpu" if name == "onnx" else "auto")
        size = encoder.preprocessing.size
        pixels = np.zeros((batch_size, size, size, 3), np.uint8)
        encoder.encode_pixels(pixels, batch_size=batch_size)  # the first batch pays for loading
        start, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds / 2 or not done:
            encoder.encode_pixels(pixels, batch_size=batch_size)
            done += 1
        speeds[name] = done / max(spent, 1e-9)
    return max(speeds, key=lambda name: speeds[name])


def _load_checkpoint(cls: type[Encoder], opened: Checkpoint, choice: Choice) -> Encoder:
    from mmsearch.towers.tokenise import Tokeniser

    graphs = opened.directory if opened.has_graphs else None
    make = Backends(choice, graphs=graphs, towers=lambda: load_dual_encoder(opened))
    encoder = cls(
        identity=opened.identity,
        preprocessing=opened.config.preprocessing,
        tokeniser=Tokeniser.from_file(opened.directory / TOKENIZER, max_tokens=opened.config.max_tokens),
        text_backend=make.text,
        image_backend=make.image,
        item_backend=None if opened.config.item is None else lambda: _item_backend(opened),
    )
    if choice.needs_torch:
        encoder.backend("image")  # a GPU that is not there is said now, not at the first picture
    return encoder


def _item_backend(opened: Checkpoint) -> ItemBackend:
    from mmsearch.backends.items import ItemBackend

    return ItemBackend(load_item_fusion(opened))


def _load_pretrained(cls: type[Encoder], directory: Path, choice: Choice, *, name: str) -> Encoder:
    from mmsearch.towers.pretrained import Pretrained

    opened = Pretrained.open(directory, name=name)
    make = Backends(choice, graphs=None, towers=opened.load_model)
    encoder = cls(
        identity=opened.identity,
        preprocessing=opened.preprocessing,
        tokeniser=opened.load_tokeniser(),
        text_backend=make.text,
        image_backend=make.image,
    )
    encoder.backend("image")
    return encoder


def to_pixels(picture: Image | Pixels | os.PathLike[str], preprocessing: Preprocessing) -> Pixels:
    """A PIL image, (h, w, 3) uint8 pixels or a path -> (s, s, 3) uint8 as the model wants it, EXIF rotation applied.

    Raises `ImageError` for a file that cannot be read, `UsageError` for anything else.
    """
    from PIL import Image as Pil
    from PIL import ImageOps

    from mmsearch.data.colour import to_rgb
    from mmsearch.data.images import prepare

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            got = f"{picture.dtype} {picture.shape}"
            raise UsageError("picture", expected="uint8 (h, w, 3)", got=got)
        return prepare(Pil.fromarray(picture), preprocessing)
    if isinstance(picture, Pil.Image):
        return prepare(to_rgb(ImageOps.exif_transpose(picture)), preprocessing)
    if isinstance(picture, os.PathLike):
        return file_pixels(os.fspath(picture), preprocessing)
    got = type(picture).__name__
    raise UsageError("picture", expected="a PIL image, pixels or a Path", got=got, do="Write Path(...) for a path.")


def file_pixels(path: str, preprocessing: Preprocessing) -> Pixels:
    """(s, s, 3) uint8 of the picture at a path, a URI or an address of `data.packed`. A `Path` of a URI loses a slash.

    Raises `ImageError` where it cannot be read.
    """
    from mmsearch.data.images import open_image, prepare

    return prepare(open_image(path, target=preprocessing.size)[0], preprocessing)


def _in_batches(
    run: Callable[[slice], NDArray[np.float32]], count: int, *, batch_size: int, dim: int
) -> NDArray[np.float32]:
    """Run slices of at most `batch_size` over `count` inputs; a `MemoryError` halves the size and tries again."""
    if batch_size < 1:
        raise UsageError("batch_size", expected="1 or more", got=str(batch_size))
    rows = np.empty((count, dim), np.float32)
    start, size = 0, batch_size
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            found = run(part)
        except MemoryError as error:
            size = (part.stop - part.start) // 2
            if size < 1:
                raise _out_of_memory("a batch of one") from error
            continue
        if found.shape != (part.stop - part.start, dim):
            raise ModelError("the model's output", expected=f"({part.stop - start}, {dim})", got=str(found.shape))
        rows[part] = found
        start = part.stop
    return rows


def _checked(rows: NDArray[np.float32]) -> tuple[Embeddings, NDArray[np.bool_]]:
    """(n, d) from a model -> ((n, d) unit rows, (n) ok); rows without a direction become zeros, marked False."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # (n, 1)
    ok = (np.isfinite(norms) & (norms > 1e-6))[:, 0]
    unit = np.zeros_like(rows)
    unit[ok] = rows[ok] / norms[ok]
    return unit, ok


def _require(ok: NDArray[np.bool_], *, what: str, order: NDArray[np.int64]) -> None:
    if not ok.all():
        number = int(order[np.flatnonzero(~ok)[0]])
        raise ModelError(f"{what} {number}", expected="a finite embedding", got="NaN, infinity or zero")


def _out_of_memory(what: str) -> ResourceError:
    return ResourceError(what, expected="enough memory", got="none left", do="Free memory or use a smaller model.")


__all__ = ["BUNDLED", "Encoder", "Encodes", "JoinsItems", "fastest_backend", "file_pixels", "to_pixels"]

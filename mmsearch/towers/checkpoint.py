"""A checkpoint is a directory: what it must hold, what its bytes must be, how it is written and read.

    config.json        format, towers, preprocessing, checksums of the other files; written last
    model.safetensors  the weights, half precision, the token table optionally in 8 bits (`tensors`)
    tokenizer.json     text to token ids
    text.onnx, image.onnx   graphs without weights of their own: they point into model.safetensors (`export`)
    README.md          the model card

Decisions:
- Every file that takes part in an embedding has its xxh3_128 in config.json, compared on load: damage is
  found and named, never answered from.
- The identity of a model covers weights, tokenizer and architecture: another pooling over the same weights
  is another space. A part that a model lacks (the item head) leaves its identity what it was before there was one.
- Pickle is refused by name, before anything is opened. Opening and checking needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mmsearch.errors import ModelError, ResourceError
from mmsearch.towers.config import DualEncoderConfig, no_item_fusion
from mmsearch.types import ModelIdentity, Preprocessing

if TYPE_CHECKING:
    from torch import nn

    from mmsearch.towers.dual_encoder import DualEncoder
    from mmsearch.towers.item import ItemFusion

FORMAT = 1
WEIGHTS, TOKENIZER, CONFIG, CARD = "model.safetensors", "tokenizer.json", "config.json", "README.md"
TEXT_GRAPH, IMAGE_GRAPH = "text.onnx", "image.onnx"
_FORMAT_KEY = "mmsearch_format"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_MAX_CONFIG = 4 << 20
_ITEM = "item."
TOKEN_TABLE = "text.backbone.embeddings.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory whose config.json was read and checked. `files`: checksums in hex by file name."""

    directory: Path
    name: str
    config: DualEncoderConfig
    files: Mapping[str, str]

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> Checkpoint:
        """Read config.json and, with `verify`, compare the checksum of every file it lists. No torch."""
        values = read_config(directory)
        if values.get(_FORMAT_KEY) != FORMAT:
            raise ModelError(
                str(directory / CONFIG),
                expected=f"{_FORMAT_KEY} {FORMAT}",
                got=repr(values.get(_FORMAT_KEY))[:40],
                do="A newer mmsearch made it, or it is not a checkpoint of mmsearch.",
            )
        files = values.get("files")
        if not isinstance(files, Mapping) or not all(isinstance(v, str) for v in files.values()):
            raise ModelError(str(directory / CONFIG), expected="checksums under 'files'", got="none")
        if unknown := set(files) - {WEIGHTS, TOKENIZER, TEXT_GRAPH, IMAGE_GRAPH}:
            raise ModelError(str(directory / CONFIG), expected="files of a checkpoint", got=sorted(unknown)[0][:60])
        if missing := {WEIGHTS, TOKENIZER} - set(files):
            raise ModelError(str(directory / CONFIG), expected=f"a checksum of {min(missing)}", got="none")
        config = DualEncoderConfig.from_json(values)
        opened = cls(directory, str(values.get("name", directory.name))[:200], config, dict(files))
        if verify:
            opened.verify()
        return opened

    def verify(self) -> None:
        """Compare every listed file with its checksum; `ModelError` names the first that differs."""
        for name, expected in self.files.items():
            got = file_checksum(self.directory / name)
            if got != expected:
                raise ModelError(
                    str(self.directory / name),
                    expected=f"checksum {expected[:12]}",
                    got=got[:12],
                    do="The file is damaged or was changed: copy the model again.",
                )

    @property
    def has_graphs(self) -> bool:
        """True when texts and images can be encoded without torch."""
        return TEXT_GRAPH in self.files and IMAGE_GRAPH in self.files

    @property
    def identity(self) -> ModelIdentity:
        """Which vectors can be compared with this model's."""
        plain = self.config.to_json()
        parts: dict[str, Any] = {k: plain[k] for k in ("dim", "max_tokens", "text", "image", "item") if k in plain}
        parts |= {"weights": self.files[WEIGHTS], "tokenizer": self.files[TOKENIZER]}
        digest = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
        return ModelIdentity(self.name, digest, self.config.preprocessing.digest(), self.config.dim)


def is_checkpoint(directory: Path) -> bool:
    """True when the directory's config.json says that mmsearch wrote it."""
    return _FORMAT_KEY in read_config(directory)


def read_config(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    """config.json of a model directory (or another JSON file in it) as plain values; `ModelError` when it cannot be."""
    path = directory / name
    refuse_pickle(directory)
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ModelError(str(path), expected=f"at most {_MAX_CONFIG} bytes", got=str(path.stat().st_size))
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            str(directory), expected="a model directory", got=f"no {name}", do="`mmsearch models` lists some."
        ) from error
    except OSError as error:
        raise ModelError(str(path), got=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(str(path), expected="JSON", got=str(error)[:120], do="Copy the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(str(path), expected="a JSON object", got=type(values).__name__)
    return values


def refuse_pickle(path: Path) -> None:
    """`ModelError` for a pickle file, or for a directory whose only weights are pickles."""
    found = path.suffix.lower() in _PICKLES and not path.is_dir()
    if not found and path.is_dir() and not any(path.glob("*.safetensors")):
        found = any(entry.suffix.lower() in _PICKLES for entry in path.iterdir())
    if found:
        raise ModelError(
            str(path),
            expected="weights in safetensors",
            got="a pickle, which can run code when it is opened",
            do="Convert it to model.safetensors first.",
        )


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes in hex; `ModelError` when it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise ModelError(
            str(path), got=error.strerror or str(error), do="The model is incomplete: copy it again."
        ) from error
    return digest.hexdigest()


def save_checkpoint(
    model: DualEncoder,
    directory: str | os.PathLike[str],
    *,
    tokenizer_json: str | Path,
    preprocessing: Preprocessing | None = None,
    name: str,
    card: str,
    quantise_embeddings: bool = True,
    graphs: bool = True,
) -> Checkpoint:
    """Write a checkpoint directory and return it opened and verified.

    `tokenizer_json`: the JSON text, or a `Path` to it. `preprocessing`: when given, replaces the fit and
    interpolation of the model's own; its size, mean and std must be the model's.
    `graphs=False` leaves out the ONNX graphs (quicker while training).
    """
    from safetensors.torch import save

    from mmsearch.towers.tensors import to_stored

    folder = Path(directory)
    config = replace(model.config, preprocessing=_same_pixels(model.config.preprocessing, preprocessing))
    tables = (TOKEN_TABLE,) if quantise_embeddings else ()
    text = tokenizer_json.read_text("utf-8") if isinstance(tokenizer_json, Path) else tokenizer_json
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # a half-written directory is never taken for a whole one
        stored = to_stored(model.state_dict(), quantise=tables)
        write_file(folder / WEIGHTS, save(stored, metadata={"format": "pt"}))
        write_file(folder / TOKENIZER, text.encode())
        write_file(folder / CARD, card.encode())
        listed = [WEIGHTS, TOKENIZER, *(_write_graphs(folder, config) if graphs else ())]
        files = {entry: file_checksum(folder / entry) for entry in listed}
        values = {_FORMAT_KEY: FORMAT, "name": name, **config.to_json(), "files": files}
        write_file(folder / CONFIG, json.dumps(values, indent=2).encode() + b"\n")
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError(str(folder), got=why, do="Free space or choose another folder.") from error
    return Checkpoint.open(folder)


def load_dual_encoder(directory: str | os.PathLike[str] | Checkpoint) -> DualEncoder:
    """The torch model of a checkpoint directory, in eval mode, on the CPU, float32."""
    opened = directory if isinstance(directory, Checkpoint) else Checkpoint.open(Path(directory))
    return _filled(opened.config, opened.directory / WEIGHTS)


def load_item_fusion(opened: Checkpoint) -> ItemFusion:
    """The head that joins an item's picture and text, alone: neither tower is built. Eval mode, CPU, float32.

    Raises `ModelError` for a model without one, and for weights that do not fit it.
    """
    import torch

    from mmsearch.towers.item import build_item_fusion
    from mmsearch.towers.tensors import damaged, from_stored, read_tensors

    if opened.config.item is None:
        raise no_item_fusion(opened.name)
    weights = opened.directory / WEIGHTS
    stored = {k.removeprefix(_ITEM): v for k, v in read_tensors(weights).items() if k.startswith(_ITEM)}
    with torch.device("meta"):  # a config that asks for too much costs a sentence, not the memory
        head = build_item_fusion(opened.config.item, dim=opened.config.dim)
    try:
        head.load_state_dict(from_stored(stored), assign=True)
    except RuntimeError as error:
        raise damaged(weights, detail=str(error)) from error
    return head.eval()


def _filled(config: DualEncoderConfig, weights: Path) -> DualEncoder:
    from mmsearch.towers.dual_encoder import build_dual_encoder
    from mmsearch.towers.tensors import damaged, from_stored, read_tensors

    state = from_stored(read_tensors(weights))
    check_shapes(lambda: build_dual_encoder(config), state, path=weights)
    model = build_dual_encoder(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise damaged(weights, detail=str(error)) from error
    return model.eval()


def _write_graphs(folder: Path, config: DualEncoderConfig) -> tuple[str, ...]:
    """Export the graphs of the model *as stored*, so that graph and torch model agree to rounding."""
    from mmsearch.towers.export import image_graph, text_graph

    model = _filled(config, folder / WEIGHTS)
    write_file(folder / TEXT_GRAPH, text_graph(model, folder / WEIGHTS))
    write_file(folder / IMAGE_GRAPH, image_graph(model, folder / WEIGHTS))
    return TEXT_GRAPH, IMAGE_GRAPH


def check_shapes(build: Callable[[], nn.Module], state: Mapping[str, Any], *, path: Path) -> None:
    """Compare shapes with those of a model built on the meta device, before memory is taken for a real one.

    `state`: what was read from `path`. Raises `ModelError` naming the first tensor that does not fit.
    """
    import torch

    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in build().state_dict().items()}
    for key in sorted(wanted.keys() | state.keys()):
        got = tuple(state[key].shape) if key in state else None
        if wanted.get(key) != got:
            raise ModelError(
                f"{path}, {key}",
                expected=str(wanted.get(key)),
                got=str(got),
                do="The settings and the weights do not fit.",
            )


def _same_pixels(own: Preprocessing, given: Preprocessing | None) -> Preprocessing:
    if given is None:
        return own
    if (given.size, given.mean, given.std) != (own.size, own.mean, own.std):
        raise ModelError("preprocessing", expected=f"the model's {own}", got=str(given))
    return given


def write_file(path: Path, content: bytes) -> None:
    """Write, fsync and rename into place, so that a name never shows half a file; `OSError` when it cannot."""
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()

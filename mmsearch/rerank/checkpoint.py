"""A re-ranker on disk: files beside the towers that it reads, in the same model directory.

    rerank.json          format, settings, scoring, whose towers it reads, checksums of the files below; written last
    rerank.safetensors   weights of the patch projection and the fusion, half precision
    words.onnx, patches.onnx, match.onnx, match_one.onnx   graphs without weights of their own, see `export`
    RERANK.md            the card, if there is one

Decisions:
- The towers' own files and their identity stay as they are: an index made with them stays valid.
- The checksum of the towers' weights is recorded: with other towers the same fusion would answer, and wrongly.
- A graph that cannot be exported is left out, and torch runs that part. Opening and checking needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.present import RERANK, has_reranker
from mmsearch.towers.checkpoint import (
    CARD,
    CONFIG,
    TOKEN_TABLE,
    WEIGHTS,
    Checkpoint,
    check_shapes,
    file_checksum,
    load_dual_encoder,
    read_config,
    write_file,
)
from mmsearch.towers.tensors import QUANTISED, SCALE, Stored, read_layout, read_tensors
from mmsearch.types import Embeddings

if TYPE_CHECKING:
    from mmsearch.rerank.model import RerankModel
    from mmsearch.towers.dual_encoder import DualEncoder

FORMAT = 1
RERANK_WEIGHTS, RERANK_CARD = "rerank.safetensors", "RERANK.md"
WORDS_GRAPH, PATCHES_GRAPH, MATCH_GRAPH = "words.onnx", "patches.onnx", "match.onnx"
MATCH_ONE_GRAPH = "match_one.onnx"
GRAPHS = (WORDS_GRAPH, PATCHES_GRAPH, MATCH_GRAPH, MATCH_ONE_GRAPH)
_FORMAT_KEY = "mmsearch_rerank_format"
_TOKENS_FORMAT = 1
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I8": np.dtype("i1")}
_BACKBONE, _OWN_BACKBONE, _PROJECTION = "image.backbone.", "backbone.", "patch_projection."
_BANKS = {"caption": "caption_bank", "picture": "picture_bank"}


@dataclass(frozen=True)
class RerankCheckpoint:
    """A model directory whose rerank.json was read and checked, and the towers beside it.

    `scoring_json`: as it was saved, for `rerank.scores.Scoring.from_json`. `reads_tokens`: False for a fusion of unit
    rows alone. `files`: checksums in hex by file name, the re-ranker's own files only.
    """

    directory: Path
    name: str
    config: RerankConfig
    towers: Checkpoint
    scoring_json: Mapping[str, Any]
    reads_tokens: bool
    files: Mapping[str, str]

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> RerankCheckpoint:
        """Read rerank.json and config.json and, with `verify`, compare the checksum of every file. No torch.

        Raises `ModelError` when there is no re-ranker, for other towers than it was trained on, and for damage.
        """
        values, where = _read(directory), str(directory / RERANK)
        opened = cls(
            directory,
            str(values.get("name", directory.name))[:200],
            RerankConfig.from_json(_mapping(values, "config", where=where)),
            Checkpoint.open(directory, verify=verify),
            _mapping(values, "scoring", where=where),
            values.get("reads_tokens") is not False,
            _checked_files(_mapping(values, "files", where=where), where=where),
        )
        opened._require_towers(values.get("towers"))
        if verify:
            opened.verify()
        return opened

    def verify(self) -> None:
        """Compare every file of the re-ranker with its checksum; `ModelError` names the first that differs."""
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
        """True when it runs without torch."""
        return set(GRAPHS) <= set(self.files)

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of all that a logit depends on: its weights and settings, the towers, their preprocessing."""
        towers = self.towers.identity
        parts = [self.config.to_json(), self.files[RERANK_WEIGHTS], towers.weights, towers.preprocessing]
        return _digest(parts)

    @functools.cached_property
    def tokens_identity(self) -> str:
        """Hex digest of all that stored patch tokens depend on: what makes a picture's patches, and nothing else.

        The image backbone, the patch projection, the grid, the preprocessing. Another fusion on top changes nothing.
        """
        towers, own = self.towers.config, self.directory / RERANK_WEIGHTS
        backbone = (own, _OWN_BACKBONE) if self.config.own_backbone else (self.directory / WEIGHTS, _BACKBONE)
        parts = [_TOKENS_FORMAT, self.config.grid, towers.image.backbone, towers.preprocessing.digest()]
        return _digest([*parts, _tensors_digest(*backbone), _tensors_digest(own, _PROJECTION)])

    def bank(self, of: str) -> Embeddings:
        """(m, d) float32 rows of the "caption" or the "picture" bank, see `commonness`; (0, d) when there is none."""
        name, path = _BANKS[of], self.directory / RERANK_WEIGHTS
        layout = read_layout(path)
        if name + QUANTISED not in layout:
            return np.zeros((0, self.towers.config.dim), np.float32)
        rows, scale = (_stored(path, layout[name + end]) for end in (QUANTISED, SCALE))
        return rows.astype(np.float32) * scale.astype(np.float32)

    def _require_towers(self, recorded: object) -> None:
        there = self.towers.files[WEIGHTS]
        if recorded != there:
            raise ModelError(
                str(self.directory / RERANK),
                expected=f"towers with the weights {str(recorded)[:12]}",
                got=f"{there[:12]} in {WEIGHTS}",
                do="The re-ranker was trained on other towers: train one on these, or remove rerank.json.",
            )


def save_reranker(
    model: RerankModel,
    directory: str | os.PathLike[str],
    *,
    name: str,
    scoring_json: Mapping[str, Any],
    card: str = "",
    graphs: bool = True,
) -> RerankCheckpoint:
    """Write a re-ranker into the model directory of its towers (see `copy_towers`) and return it opened and verified.

    Raises `ModelError` when the directory's towers are not those that `model` reads, `ResourceError` when it cannot be
    written. `graphs=False` leaves out the ONNX graphs.
    """
    from safetensors.torch import save

    from mmsearch.towers.tensors import to_stored

    folder = Path(directory)
    towers = Checkpoint.open(folder)
    _require_same(model.towers, folder / WEIGHTS)
    values = {_FORMAT_KEY: FORMAT, "name": name, "config": model.config.to_json(), "towers": towers.files[WEIGHTS]}
    values |= {"reads_tokens": model.fusion.reads_tokens, "scoring": _plain(scoring_json)}
    try:
        for stale in (RERANK, *GRAPHS, RERANK_CARD):  # rerank.json first: half a re-ranker is never taken for a whole
            (folder / stale).unlink(missing_ok=True)
        stored = to_stored(model.state_dict(), quantise=_tables(model))
        write_file(folder / RERANK_WEIGHTS, save(stored, metadata={"format": "pt"}))
        if card:
            write_file(folder / RERANK_CARD, card.encode())
        made = _write_graphs(_filled(model.config, model.towers, folder / RERANK_WEIGHTS), folder) if graphs else []
        values["files"] = {entry: file_checksum(folder / entry) for entry in (RERANK_WEIGHTS, *made)}
        write_file(folder / RERANK, json.dumps(values, indent=2).encode() + b"\n")
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError(str(folder), got=why, do="Free space or choose another folder.") from error
    return RerankCheckpoint.open(folder)


def _tables(model: RerankModel) -> tuple[str, ...]:
    """What is stored in 8 bits: the banks, if there are any."""
    return tuple(_BANKS.values()) if model.config.bank else ()


def _stored(path: Path, place: Stored) -> NDArray[Any]:
    """One tensor of a safetensors file, as it lies there."""
    with path.open("rb") as file:
        file.seek(place.offset)
        found: NDArray[Any] = np.frombuffer(file.read(place.length), _DTYPES[place.dtype]).reshape(place.shape)
    return found


def copy_towers(source: Path, target: Path) -> Checkpoint:
    """Copy a checkpoint's towers, without its re-ranker, into another directory; config.json last.

    `target` may be `source`: then nothing is done. Raises `ModelError` for a damaged source, `ResourceError` when
    the target cannot be written.
    """
    opened = Checkpoint.open(source)
    if source.resolve() == target.resolve():
        return opened
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).unlink(missing_ok=True)
        for name in (*opened.files, *([CARD] if (source / CARD).is_file() else [])):
            draft = target / f"{name}.draft"
            shutil.copyfile(source / name, draft)
            draft.replace(target / name)
        write_file(target / CONFIG, (source / CONFIG).read_bytes())
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError(str(target), got=why, do="Free space or choose another folder.") from error
    return Checkpoint.open(target)


def load_rerank_model(opened: RerankCheckpoint) -> RerankModel:
    """The torch model and its towers, both in eval mode, on the CPU, float32.

    Raises `ModelError` for weights that do not fit the settings, before memory is taken for the settings' sizes.
    """
    return _filled(opened.config, load_dual_encoder(opened.towers), opened.directory / RERANK_WEIGHTS)


def load_weights(config: RerankConfig, towers: DualEncoder, opened: RerankCheckpoint) -> RerankModel:
    """A new model of `config` over any `towers`, with the weights of `opened` and empty banks, in eval mode.

    Raises `ModelError` where the weights are of another shape.
    """
    from mmsearch.rerank.model import RerankModel
    from mmsearch.towers.tensors import from_stored

    path = opened.directory / RERANK_WEIGHTS
    state = {name: value for name, value in from_stored(read_tensors(path)).items() if name not in _BANKS.values()}
    check_shapes(lambda: RerankModel(dataclasses.replace(config, bank=0), towers), state, path=path)
    model = RerankModel(config, towers)
    model.load_state_dict(state, strict=False)
    return model.eval()


def _filled(config: RerankConfig, towers: DualEncoder, weights: Path) -> RerankModel:
    from mmsearch.rerank.model import RerankModel
    from mmsearch.towers.tensors import damaged, from_stored

    state = from_stored(read_tensors(weights))
    check_shapes(lambda: RerankModel(config, towers), state, path=weights)
    model = RerankModel(config, towers)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise damaged(weights, detail=str(error)) from error
    return model.eval()


def _write_graphs(model: RerankModel, folder: Path) -> list[str]:
    """Export from the model *as stored*; the names of those that could be."""
    from mmsearch.rerank.export import match_graph, patches_graph, words_graph

    made = []
    exports: dict[str, Callable[[RerankModel, Path], bytes | None]] = {
        WORDS_GRAPH: words_graph,
        PATCHES_GRAPH: patches_graph,
        MATCH_GRAPH: match_graph,
        MATCH_ONE_GRAPH: functools.partial(match_graph, one_text=True),
    }
    for name, export in exports.items():
        content = export(model, folder)
        if content is not None:
            write_file(folder / name, content)
            made.append(name)
    return made


def _require_same(towers: DualEncoder, weights: Path) -> None:
    """The towers of a model, stored, are byte for byte those of the directory."""
    import torch

    from mmsearch.towers.tensors import to_stored

    stored = read_tensors(weights)
    own = to_stored(towers.state_dict(), quantise=(TOKEN_TABLE,) if TOKEN_TABLE + QUANTISED in stored else ())
    for name in sorted(stored.keys() | own.keys()):
        if name not in stored or name not in own or not torch.equal(stored[name], own[name]):
            raise ModelError(
                str(weights),
                expected="the towers that the re-ranker reads",
                got=f"others: {name} differs",
                do="Save the towers there first, or copy those it was trained on.",
            )


def _read(directory: Path) -> dict[str, Any]:
    if not has_reranker(directory):
        raise ModelError(
            str(directory),
            expected="a re-ranker beside the towers",
            got=f"no {RERANK}",
            do="`mmsearch train --stage rerank` makes one.",
        )
    values = read_config(directory, RERANK)
    if values.get(_FORMAT_KEY) != FORMAT:
        raise ModelError(
            str(directory / RERANK),
            expected=f"{_FORMAT_KEY} {FORMAT}",
            got=repr(values.get(_FORMAT_KEY))[:40],
            do="A newer mmsearch made it, or it is not a re-ranker of mmsearch.",
        )
    return values


def _mapping(values: Mapping[str, Any], key: str, *, where: str) -> Mapping[str, Any]:
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise ModelError(where, expected=f"an object under {key!r}", got=type(found).__name__)
    return found


def _checked_files(files: Mapping[str, Any], *, where: str) -> Mapping[str, str]:
    if unknown := set(files) - {RERANK_WEIGHTS, *GRAPHS}:
        raise ModelError(where, expected="files of a re-ranker", got=min(unknown)[:60])
    if RERANK_WEIGHTS not in files or not all(isinstance(value, str) for value in files.values()):
        raise ModelError(where, expected=f"a checksum of {RERANK_WEIGHTS}", got="none")
    return dict(files)


def _plain(scoring_json: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(json.dumps(scoring_json, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError("scoring_json", expected="plain JSON values", got=str(error)[:120]) from error


def _tensors_digest(path: Path, prefix: str) -> str:
    """xxh3_128 of the stored tensors whose names start with `prefix`: names, types, shapes and bytes."""
    digest = xxhash.xxh3_128()
    places = {name: place for name, place in read_layout(path).items() if name.startswith(prefix)}
    with path.open("rb") as file:
        for name in sorted(places):
            place = places[name]
            file.seek(place.offset)
            digest.update(f"{name} {place.dtype} {place.shape}".encode())
            digest.update(file.read(place.length))
    return digest.hexdigest()


def _digest(parts: list[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

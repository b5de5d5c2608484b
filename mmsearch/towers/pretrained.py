"""Models of transformers behind the dual encoder's two methods: CLIP, SigLIP, VisionTextDualEncoder.

Decisions:
- Only safetensors, never code from a model's folder (`trust_remote_code`), and nothing is fetched here: the
  folder is on disk already.
- A weight that the file does not hold is an error. transformers would fill it with random numbers and say so
  in a log line.
- Preprocessing is read from the image processor's JSON and has to fit `Preprocessing`; "resize the short side
  to 256, then cut 224" becomes "cut at 224", the one case that is not exact.
- SigLIP was trained on texts padded to full length without a mask: it gets exactly that.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mmsearch.errors import ModelError
from mmsearch.towers.checkpoint import file_checksum, read_config
from mmsearch.towers.config import preprocessing_from_json
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.types import ModelIdentity, Preprocessing

if TYPE_CHECKING:
    from torch import nn

_KINDS = {
    # model_type: (class in transformers, texts padded to full length and unmasked)
    "clip": ("CLIPModel", False),
    "siglip": ("SiglipModel", True),
    "vision-text-dual-encoder": ("VisionTextDualEncoderModel", False),
}
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MAX_JSON = 4 << 20
_LONGEST_TEXT = 512


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A transformers directory that was recognised; the weights are read by `load_model`."""

    directory: Path
    kind: str
    identity: ModelIdentity
    preprocessing: Preprocessing
    max_tokens: int

    @classmethod
    def open(cls, directory: Path, *, name: str) -> Pretrained:
        """Read the JSON files of a transformers directory; `ModelError` when its family is not one of ours."""
        config = read_config(directory)
        kind = config.get("model_type")
        if kind not in _KINDS:
            raise ModelError(
                str(directory), expected=f"a model of type {', '.join(sorted(_KINDS))}", got=repr(kind)[:60]
            )
        preprocessing = read_preprocessing(directory)
        text = config.get("text_config") or {}
        tokens = min(int(text.get("max_position_embeddings") or _default_tokens(kind)), _LONGEST_TEXT)
        dim = int(config.get("projection_dim") or text.get("projection_size") or text.get("hidden_size") or 768)
        identity = ModelIdentity(name, _weights_digest(directory), preprocessing.digest(), dim)
        return cls(directory, kind, identity, preprocessing, tokens)

    def load_tokeniser(self) -> Tokeniser:
        """The folder's tokenizer.json, or what transformers makes of its other tokenizer files."""
        fixed, pad = _KINDS[self.kind][1], _pad_token(self.directory)
        path = self.directory / "tokenizer.json"
        if path.exists():
            return Tokeniser.from_file(path, max_tokens=self.max_tokens, fixed=fixed, pad=pad)
        import transformers

        with _plain_errors(self.directory):
            made = transformers.AutoTokenizer.from_pretrained(
                str(self.directory), trust_remote_code=False, local_files_only=True
            )
        backend = getattr(made, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(str(self.directory), expected="tokenizer.json", got="a tokenizer that has none")
        return Tokeniser(backend, max_tokens=self.max_tokens, fixed=fixed, pad=pad)

    def load_model(self) -> nn.Module:
        """The weights as a module with `encode_texts` and `encode_images`, in eval mode, on the CPU, float32."""
        import torch
        import transformers

        from mmsearch.towers.transformers_model import TransformersTowers

        cls = getattr(transformers, _KINDS[self.kind][0])
        with _plain_errors(self.directory), _quiet(transformers):
            model, report = cls.from_pretrained(
                str(self.directory),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if missing := [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]:
            raise ModelError(str(self.directory), expected=f"a weight {sorted(map(str, missing))[0]}", got="none")
        return TransformersTowers(model, preprocessing=self.preprocessing, masked=not _KINDS[self.kind][1]).eval()


def read_preprocessing(directory: Path) -> Preprocessing:
    """How a transformers image processor prepares a picture, from its JSON file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if path.exists():
            values = _read_json(path)
            return _to_preprocessing(values.get("image_processor", values), path)
    raise ModelError(str(directory), expected="preprocessor_config.json", got="none", do="Copy the whole model.")


def _to_preprocessing(values: Mapping[str, Any], path: Path) -> Preprocessing:
    cut, size = values.get("crop_size"), values.get("size")
    crop = bool(values.get("do_center_crop", cut is not None)) and cut is not None
    chosen = cut if crop else size
    if isinstance(chosen, Mapping):
        sides = {chosen[key] for key in ("height", "width", "shortest_edge") if chosen.get(key)}
        chosen = sides.pop() if len(sides) == 1 else None
    if not isinstance(chosen, int):
        raise ModelError(str(path), expected="one square input size", got=str(size)[:80])
    squash = not crop and isinstance(size, Mapping) and "height" in size
    plain: dict[str, Any] = {
        "size": chosen,
        "fit": "squash" if squash else "crop",
        "interpolation": _RESAMPLING.get(values.get("resample", 3), "bicubic"),
    }
    if values.get("do_normalize", True):
        plain |= {
            "mean": values.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
            "std": values.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        }
    else:
        plain |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    return preprocessing_from_json(plain)


def _default_tokens(kind: str) -> int:
    return {"clip": 77, "siglip": 64}.get(kind, _LONGEST_TEXT)


def _pad_token(directory: Path) -> str | None:
    path = directory / "tokenizer_config.json"
    token = _read_json(path).get("pad_token") if path.exists() else None
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(str(path), expected=f"at most {_MAX_JSON} bytes", got=str(path.stat().st_size))
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(str(path), expected="JSON", got=str(error)[:120], do="Copy the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(str(path), expected="a JSON object", got=type(values).__name__)
    return values


def _weights_digest(directory: Path) -> str:
    """One checksum over the files that decide what the model answers."""
    parts = sorted(directory.glob("*.safetensors"))
    if not parts:
        raise ModelError(str(directory), expected="weights in safetensors", got="none", do="Copy the whole model.")
    parts += [p for name in ("config.json", "tokenizer.json") if (p := directory / name).exists()]
    return xxhash.xxh3_128_hexdigest(json.dumps([(p.name, file_checksum(p)) for p in parts]).encode())


@contextlib.contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    """Whatever transformers raises about a folder becomes one `ModelError`."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            str(directory), expected="a model transformers can read", got=str(error)[:200], do="Copy the model again."
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:  # noqa: ANN401 - the module itself
    """No progress bar and no log lines while weights are read; the user's settings come back after."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()

"""Which directory is meant by a model's name.

Decisions:
- A plain string is a directory only if there is one, or if it starts like a path (./ ../ / ~); else it is the
  bundled model's name, else OWNER/NAME[@REVISION] on the hub. Nothing is guessed from how it ends.
- The folder of a training run may be named instead of the checkpoint in it.
- The hub is asked only when a hub name was given, for the few files a model is made of, never for pickles.
  Without a network that is one sentence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmsearch.errors import MissingExtraError, ModelError
from mmsearch.towers.checkpoint import CONFIG, read_config, refuse_pickle

BEST = "best"
"""Where a training run keeps its best checkpoint, below its own folder."""
SHIPPED = "bundled"
"""What the model that comes with mmsearch is called, whatever its own name is."""
UNNAMED = "imported:"
"""What the model of an index begins with whose vectors were imported without saying which model made them."""
BUNDLED = Path(__file__).resolve().parent.parent / "weights"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,80})?", re.ASCII)
_PATH_STARTS = ("./", "../", "/", "~")
_HUB_FILES = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model"]
_PATIENCE_S = 5


def locate(model: str | Path | None, *, bundled: Path = BUNDLED) -> tuple[Path, str]:
    """(directory, name for people) of `model`: None, "bundled" or the bundled name, a directory, or a hub name."""
    if isinstance(model, str) and model.startswith(UNNAMED):
        raise ModelError(
            f"model {model!r}",
            expected="a model's name",
            got="vectors that were imported without one",
            do="Say whose they are: mmsearch import PATH --out INDEX --model NAME (or use Searcher.search_vector).",
        )
    if model is None or (model == SHIPPED and not Path(model).is_dir()):
        return bundled, str(_bundled_name(bundled))
    if isinstance(model, Path):
        return _directory(model), model.name
    if is_directory(model):
        path = Path(model).expanduser()
        return _directory(path), path.resolve().name
    if (bundled / CONFIG).exists() and model == _bundled_name(bundled):
        return bundled, model
    refuse_pickle(Path(model.replace("\0", "")))
    if _HUB_NAME.fullmatch(model):
        return _from_hub(model), model
    raise ModelError(
        f"model {model!r}",
        expected="the bundled name, a directory, or OWNER/NAME on the hub",
        got="none of them",
        do="A directory below this one is written ./NAME; `mmsearch models` lists what is here.",
    )


def is_directory(model: str | os.PathLike[str]) -> bool:
    """Whether `model` names a directory: it is a `Path`, starts like a path, or there is such a directory."""
    if not isinstance(model, str):
        return True
    return model.startswith(_PATH_STARTS) or bool(model and "\0" not in model and Path(model).is_dir())


def _bundled_name(bundled: Path) -> object:
    return read_config(bundled).get("name", "bundled")


def _directory(path: Path) -> Path:
    refuse_pickle(path)
    if not path.is_dir():
        raise ModelError(str(path), expected="a model directory", got="a file" if path.exists() else "nothing there")
    # A training run's folder stands for its best checkpoint, which is whole at any moment.
    if not (path / CONFIG).exists() and (path / BEST / CONFIG).exists():
        return path / BEST
    return path


def _from_hub(model: str) -> Path:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"model {model!r}", package="huggingface_hub", extra="all") from error
    name, _, revision = model.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=_HUB_FILES, etag_timeout=_PATIENCE_S
        )
    except (OSError, ValueError, RuntimeError) as error:  # the hub client's errors descend from these
        raise ModelError(
            f"model {model!r}",
            expected="a network to fetch it from the hub, or a copy fetched before",
            got=str(error).splitlines()[0][:160] if str(error) else type(error).__name__,
            do="Give a directory, or leave the model out to use the bundled one.",
        ) from error
    return _directory(Path(found))

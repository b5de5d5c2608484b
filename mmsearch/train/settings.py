"""What a run is told: every setting of `mmsearch train`, from defaults, a recipe file (TOML) and the command line.

Decisions:
- One flat table of settings in six sections, checked once, before data or weights are touched; an unknown name is an
  error that lists the known ones, because a misspelt setting that is ignored costs a night of training.
- The defaults are for small data and a model that knows something already: heads at the base rate, backbones at a
  tenth of it, early layers of the image tower left alone.
- A run's settings are written beside its checkpoint as JSON; `digest` says whether a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mmsearch.errors import InputError, UsageError
from mmsearch.train.augment import Augmentation
from mmsearch.train.examples import DataSource
from mmsearch.train.parameters import Tuning
from mmsearch.train.settings_check import check_settings

BUNDLED = "bundled"
_MAX_RECIPE = 1 << 20


@dataclass(frozen=True, slots=True)
class Data:
    """`val_share`: share of the groups held out where the data names no validation split. `limit`: pairs at most.

    `mixed`: pairs of several sources may meet in a batch. `captions`: of a picture in one step, which encodes it once.
    """

    val_share: float = 0.1
    limit: int | None = None
    workers: int | None = None
    mixed: bool = True
    captions: int = 1


@dataclass(frozen=True, slots=True)
class Start:
    """Where the towers come from.

    `model`: a checkpoint to go on from ("bundled", a name or a directory), or "" to build `config` anew: a mapping as
    in a checkpoint's config.json, its backbones filled from `text_weights` and `image_weights` (paths or
    "package:NAME/path"; "" for random numbers) and `tokenizer` read from a tokenizer.json.
    `anchor_prompts`: names of the anchors' classes, "imagenet", a file with one name a line, or "" to keep the rows.
    `anchor_peak`: share of a sharper verdict in them, None as the model has it; `anchor_boost`: times their scale.
    """

    model: str = BUNDLED
    config: Mapping[str, Any] = field(default_factory=dict)
    text_weights: str = ""
    image_weights: str = ""
    tokenizer: str = ""
    anchor_prompts: str = ""
    anchor_peak: float | None = None
    anchor_boost: float = 1.0
    item: str = ""


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss. `name`: as `losses.build_objective` has it; max-hinges are means for the first `soften_epochs`.

    `smoothing` in [0, 1); `margin` of hinges; `matryoshka`: shorter dimensions that are trained too;
    `hard_negatives`: mined neighbours a pair, 0 for none, drawn into `hard_share` of each batch from epoch `mine_from`;
    `teacher`: a model whose similarities are imitated with weight `teacher_weight` at multiplier `teacher_scale`;
    `modality_dropout`: probability that an item loses one side, used when the model has an item head;
    `keep_classes`, `keep_names`: weights of keeping the class-name anchors' verdicts and names (`keeping`), 0 for none.
    """

    name: str = "info_nce"
    smoothing: float = 0.0
    margin: float = 0.2
    soften_epochs: int = 1
    matryoshka: tuple[int, ...] = ()
    hard_negatives: int = 0
    hard_share: float = 0.5
    mine_from: int = 1
    teacher: str = ""
    teacher_weight: float = 1.0
    teacher_scale: float = 20.0
    modality_dropout: float = 0.5
    keep_classes: float = 1.0
    keep_names: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """The course of a run.

    `lr`: base rate, that of the heads. `warmup`: share of the steps over which it rises. `backbone_start`: share of
    the run in which heads learn alone. `chunk`: rows encoded at a time with gradient caching, 0 for none;
    `accumulate`: batches a step. `precision`: "auto", "fp32", "bf16" or "fp16". `patience`: epochs without a better
    validation score before the run stops, 0 for never. `ema`: decay of the average, 0 for none. `wise`: choose the
    share between the weights before and after on the validation split. `views`: random views a picture that are kept
    on disk, as outputs of the image tower's frozen first stages; 0 decodes anew each time, -1 decides by the device.
    `resident`: a GPU holds the pictures where they fit. `graphs`: ONNX graphs for queries without torch.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 3e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.1
    schedule: str = "cosine"
    floor: float = 0.0
    backbone_start: float = 0.0
    clip: float = 1.0
    chunk: int = 0
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "auto"
    device: str = "auto"
    threads: int = 0
    feature_dropout: float = 0.0
    anchor_refresh: int = 20
    patience: int = 4
    ema: float = 0.998
    wise: bool = True
    views: int = -1
    views_folder: str = ""
    resident: bool = True
    save_seconds: float = 60.0
    max_steps: int = 0
    seed: int = 0
    graphs: bool = True


@dataclass(frozen=True, slots=True)
class Rerank:
    """The second stage (`--stage rerank`): a fusion over towers that stay as they are.

    `fusion`: one of `rerank.config.FUSIONS`; `patch_dim`, `grid`, `text_layer` (-1: half of the text tower's layers),
    `layers` (-1: those above), `width` (0: the text tower's), `hidden`, `dropout`: see `RerankConfig`.
    `contrast`, `match`: weights of the list loss and of the yes/no loss (ITM). `negatives`: rivals drawn for each text
    and each picture, 0 for all of the batch, -1 as the fusion can afford; `hardness`: multiplier of the first stage's
    cosines when they are drawn. `mined`: neighbours of each pair, by the first stage, that are pulled into its batch,
    up to `mined_share` of it. `teacher`: a model with a re-ranker over the same towers, imitated with `teacher_weight`.
    `layers_rate`: of the layers taken over from the text tower, as a share of `run.lr`. `bank`: rows of captions and of
    pictures that say how common a candidate is, 0 for none. `image_train`: last stages of an image backbone of the
    re-ranker's own that learn too, at `image_rate` of `run.lr`; 0: it reads the tower's. `image_weights`: where that
    backbone starts, "" as the tower's. `start`: whose re-ranker is gone on with ("auto": `start.model`'s where it
    fits, "": none). `depth`, `val_pictures`, `val_texts`: candidates a query; most pictures, captions an epoch's end.
    """

    start: str = "auto"
    fusion: str = "late-interaction"
    patch_dim: int = 384
    grid: int = 5
    text_layer: int = -1
    layers: int = -1
    width: int = 0
    hidden: int = 512
    dropout: float = 0.2
    contrast: float = 1.0
    match: float = 0.5
    negatives: int = -1
    hardness: float = 20.0
    mined: int = 0
    mined_share: float = 0.5
    teacher: str = ""
    teacher_weight: float = 1.0
    layers_rate: float = 0.3
    bank: int = 8192
    image_train: int = 0
    image_weights: str = ""
    image_rate: float = 0.3
    depth: int = 64
    val_pictures: int = 1000
    val_texts: int = 2000


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """All of it. `sources` come from the command line or from `[[source]]` tables of the recipe."""

    sources: tuple[DataSource, ...] = ()
    data: Data = field(default_factory=Data)
    start: Start = field(default_factory=Start)
    text: Tuning = field(default_factory=lambda: Tuning(rate=0.1))
    image: Tuning = field(default_factory=lambda: Tuning(train=3, rate=0.1))
    augment: Augmentation | None = field(default_factory=Augmentation)
    objective: Objective = field(default_factory=Objective)
    run: Run = field(default_factory=Run)
    rerank: Rerank = field(default_factory=Rerank)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `settings_from` takes them."""
        plain = asdict(self)
        plain["source"] = plain.pop("sources")
        plain["augment"] = plain["augment"] if self.augment is not None else {"enabled": False}
        return json.loads(json.dumps(plain))  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Equal for runs that take the same steps: how many hands it has and how often it saves do not count."""
        plain = self.to_json()
        for free in ("threads", "save_seconds", "views_folder", "graphs"):
            del plain["run"][free]
        del plain["data"]["workers"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


_SECTIONS = {
    "data": Data, "start": Start, "text": Tuning, "image": Tuning, "objective": Objective, "run": Run, "rerank": Rerank,
}  # fmt: skip


def read_recipe(path: Path) -> dict[str, Any]:
    """A TOML file as plain values; `InputError` when it cannot be read."""
    try:
        if path.stat().st_size > _MAX_RECIPE:
            raise InputError(str(path), expected=f"at most {_MAX_RECIPE} bytes", got=str(path.stat().st_size))
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(str(path), expected="a recipe file", got=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), expected="TOML", got=str(error)[:120]) from error


def overridden(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`values` with "section.name=value" assignments put in; a value is read as TOML, else taken as text."""
    result = dict(values)
    for assignment in assignments:
        place, equals, text = assignment.partition("=")
        section, dot, name = place.strip().partition(".")
        if not (equals and dot and name):
            raise UsageError("--set", expected="SECTION.NAME=VALUE", got=repr(assignment))
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        _put(result, section, name, value)
    return result


def _put(values: dict[str, Any], section: str, name: str, value: object) -> None:
    values[section] = {**_table(values.get(section, {}), section), name: value}


def _table(value: object, section: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"recipe, [{section}]", expected="a table of settings", got=repr(value)[:60])
    return value


def gathered(
    pairs: Sequence[str], *, recipe: Path | None, given: Mapping[str, Any], assignments: Sequence[str]
) -> TrainSettings:
    """Settings of one command: the recipe, then `given` ("section.name" -> value), then `assignments` (as text).

    `pairs`, when there are any, take the place of the recipe's sources.
    """
    values = read_recipe(recipe) if recipe is not None else {}
    for place, value in given.items():
        section, _, name = place.partition(".")
        _put(values, section, name, value)
    values = overridden(values, assignments)
    if pairs:
        values["source"] = [{"path": path} for path in pairs]
    settings = settings_from(values)
    if not settings.sources:
        raise UsageError("train", expected="pictures with captions", got="nothing", do="Name a table or a folder.")
    return settings


def settings_from(values: Mapping[str, Any]) -> TrainSettings:
    """Checked settings from plain values (a recipe); `UsageError` names the first that cannot be."""
    known = {*_SECTIONS, "augment", "source"}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"recipe, [{unknown[0]}]", expected=f"one of {', '.join(sorted(known))}", got=unknown[0])
    sources = tuple(_made(DataSource, entry, "source") for entry in _listed(values.get("source", ())))
    made: dict[str, Any] = {"sources": sources}
    defaults = TrainSettings()
    for section, cls in _SECTIONS.items():
        if section in values:
            made[section] = _made(cls, values[section], section, base=getattr(defaults, section))
    if "augment" in values:
        augment = dict(_table(values["augment"], "augment"))
        enabled = _typed(augment.pop("enabled", True), bool, "augment.enabled")
        made["augment"] = _made(Augmentation, augment, "augment", base=Augmentation()) if enabled else None
    return TrainSettings(**made)


def _listed(value: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise UsageError("recipe, source", expected="[[source]] tables", got=type(value).__name__)
    return value


def _made(cls: type[Any], values: Mapping[str, Any], section: str, *, base: Any = None) -> Any:  # noqa: ANN401 - one of the classes above
    values, hints = _table(values, section), get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise UsageError(
            f"recipe, {section}.{unknown[0]}", expected=f"one of {', '.join(sorted(hints))}", got="an unknown name"
        )
    given = {name: _typed(value, hints[name], f"{section}.{name}") for name, value in values.items()}
    try:
        return cls(**given) if base is None else dataclasses.replace(base, **given)
    except TypeError as error:
        raise UsageError(f"recipe, [{section}]", expected="its settings", got=str(error)) from error


def _typed(value: object, hint: object, where: str) -> object:
    """`value` as the setting's type has it: whole numbers pass as fractions, lists as tuples."""
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is int and (hint is float or (get_origin(hint) is UnionType and float in get_args(hint))):
        return float(value)
    if not _fits(value, hint):
        name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).rpartition(".")[2]
        raise UsageError(where, expected=name, got=repr(value)[:60])
    return value


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type as it was written
    """Whether a value is of one of the types that settings have; exact, since True is no number here."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is Mapping:
        return isinstance(value, Mapping)
    return type(value) is hint or (hint is float and type(value) is int)

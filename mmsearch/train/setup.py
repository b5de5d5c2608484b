"""From settings to a model that is ready to learn, and the files that go with it.

Decisions:
- A run starts from a checkpoint of ours, or builds towers anew and fills their backbones from weights on disk. Both
  end in the same three things: the model, the text of its tokenizer.json, and the name it started from.
- Random parts are drawn from the run's seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmsearch.errors import ModelError, UsageError
from mmsearch.towers.checkpoint import TOKENIZER, Checkpoint, is_checkpoint, load_dual_encoder
from mmsearch.towers.config import DualEncoderConfig, ItemConfig
from mmsearch.towers.dual_encoder import DualEncoder, build_dual_encoder
from mmsearch.towers.initial import initial_dual_encoder
from mmsearch.towers.locate import locate
from mmsearch.towers.sources import resolve_place
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.settings import Start

_BERT_WORDS = 30_522  # where a config does not say


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run starts from. `known`: the model was trained before, so that a share of it is worth keeping."""

    model: DualEncoder
    tokenizer_json: str
    name: str
    known: bool

    def tokeniser(self) -> Tokeniser:
        """Texts to ids as the model takes them."""
        return Tokeniser.from_json(self.tokenizer_json, max_tokens=self.model.config.max_tokens)


def begin(start: Start, *, seed: int) -> Beginning:
    """The model to train, in float32 on the CPU, in evaluation mode."""
    torch.manual_seed(seed)
    made = _from_checkpoint(start) if start.model else _anew(start)
    if speaks_of_anchors(start) and made.model.image.anchors is None:
        raise UsageError("start.anchor_peak, start.anchor_boost", expected="a model with anchors", got="one without")
    return made


def _from_checkpoint(start: Start) -> Beginning:
    if start.config or start.text_weights or start.image_weights:
        raise UsageError(
            "start", expected="a model to go on from, or a config to build", got="both", do='Set start.model to "".'
        )
    directory, name = locate(start.model)
    if not is_checkpoint(directory):
        raise ModelError(
            str(directory), expected="a checkpoint that mmsearch trained", got="another model's directory",
            do="CLIP and SigLIP can be indexed with and serve as a teacher (objective.teacher), not be trained on.",
        )  # fmt: skip
    opened = Checkpoint.open(directory)
    model = load_dual_encoder(opened)
    if start.item and (model.config.item is None or model.config.item.kind != start.item):
        model = _with_item(model, start.item)
    return Beginning(model, (directory / TOKENIZER).read_text("utf-8"), name, known=True)


def _with_item(model: DualEncoder, kind: str) -> DualEncoder:
    """The same towers with a new item head."""
    config = replace(model.config, item=ItemConfig(kind=kind))
    made = build_dual_encoder(config)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("item.")}
    made.load_state_dict({**made.state_dict(), **state})
    return made.eval()


def set_anchors(model: DualEncoder, start: Start) -> None:
    """What the settings say of the class-name anchors of the model that `begin` gave, in place.

    Apart from `begin`, so that the model before a run is measured as it is.
    """
    anchors, config = model.image.anchors, model.config
    if anchors is None or config.image.anchors is None:
        return
    with torch.no_grad():
        anchors.scale.mul_(start.anchor_boost)
    if start.anchor_peak is not None:
        anchors.peak = start.anchor_peak
        told = replace(config.image.anchors, peak=start.anchor_peak)
        model.config = replace(config, image=replace(config.image, anchors=told))


def speaks_of_anchors(start: Start) -> bool:
    """Whether the settings change the class-name anchors of the model before it learns."""
    return start.anchor_peak is not None or start.anchor_boost != 1.0


def _anew(start: Start) -> Beginning:
    if not start.config or not start.tokenizer:
        raise UsageError(
            "start", expected="a model, or a config and a tokenizer", got="neither",
            do='Set start.model, or [start.config] and start.tokenizer in a recipe.',
        )  # fmt: skip
    values: dict[str, object] = {"max_tokens": 64, **start.config}
    if start.item:
        values["item"] = {"kind": start.item}
    config = DualEncoderConfig.from_json(_plain(values))
    model = initial_dual_encoder(
        config, text_weights=start.text_weights or None, image_weights=start.image_weights or None
    )
    tokenizer = resolve_place(start.tokenizer)
    path = tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(str(path), expected="a tokenizer.json", got=str(error)[:120]) from error
    name = "untrained heads" if start.text_weights or start.image_weights else "random weights"
    made = Beginning(model.eval(), text, name, known=False)
    made.tokeniser()  # refuses what is no tokenizer
    _check_words(config, Tokenizer.from_str(text).get_vocab_size(), path=path)
    return made


def _check_words(config: DualEncoderConfig, words: int, *, path: Path) -> None:
    """A token beyond the tower's table would be an index error in the middle of an epoch."""
    table = int(config.text.backbone.get("vocab_size", _BERT_WORDS))
    if words > table:
        raise ModelError(str(path), expected=f"at most {table} tokens, as the text tower has", got=str(words))


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in values.items()}

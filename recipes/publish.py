"""Put a trained checkpoint, or the mean of several, into the package as the bundled model.

    python recipes/publish.py --checkpoint checkpoints/names-0 --checkpoint checkpoints/names-1 \
        --checkpoint checkpoints/names-2 --name mmsearch-lite2-minilm-6 --boost 1.05 --mirror --out mmsearch/weights

Averages the weights (a model soup: Wortsman et al. 2022, arXiv:2203.05482, uniform; the runs have to begin at the same
model), says the anchors' names anew, multiplies their share by `--boost`, and writes the card from `bundled_card.md`.
The boost is for a model that captions alone have trained: they name few of the classes, and what share they leave the
anchors is too small for words that no caption holds.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from mmsearch.towers.checkpoint import TOKENIZER, load_dual_encoder, save_checkpoint
from mmsearch.towers.dual_encoder import DualEncoder
from mmsearch.towers.locate import locate
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.anchor_rows import IMAGENET, AnchorRows
from mmsearch.train.averaging import mean_of
from mmsearch.train.encoding import TowerPass


def joined(directories: list[Path]) -> DualEncoder:
    """The model whose weights are the mean of those of checkpoints with one configuration."""
    models = [load_dual_encoder(directory) for directory in directories]
    first = directories[0]
    for directory, model in zip(directories, models, strict=True):
        same_words = (directory / TOKENIZER).read_bytes() == (first / TOKENIZER).read_bytes()
        if not same_words or model.config != models[0].config:
            raise SystemExit(f"{directory}: expected the configuration and tokenizer of {first}, got others")
    models[0].load_state_dict(mean_of([model.state_dict() for model in models]))
    return models[0]


@torch.no_grad()
def main() -> None:
    """Load, average, refresh, boost, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, action="append", help="several times for their mean")
    parser.add_argument("--name", required=True)
    parser.add_argument("--boost", type=float, default=1.0)
    parser.add_argument("--mirror", action="store_true", help="a picture's row is the mean of both its mirror images'")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    directories = [locate(Path(path))[0] for path in options.checkpoint]
    directory, model = directories[0], joined(directories)
    tokeniser = Tokeniser.from_file(directory / TOKENIZER, max_tokens=model.config.max_tokens)

    def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        made = tokeniser(texts)
        return torch.from_numpy(made.ids), torch.from_numpy(made.mask)

    passes = TowerPass(model, dtype=torch.float32, device=torch.device("cpu"))
    AnchorRows(passes, prompts=IMAGENET, tokens=tokens).refresh()
    model.image.anchors.scale.mul_(options.boost)
    if options.mirror:
        model.config = replace(model.config, image=replace(model.config.image, mirror=True))
        model.image.mirror = True
    draft = options.out.with_name(options.out.name + ".draft")
    card = Path(__file__).with_name("bundled_card.md").read_text("utf-8").replace("{name}", options.name)
    save_checkpoint(model, draft, tokenizer_json=directory / TOKENIZER, name=options.name, card=card)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        shutil.move(file, options.out / file.name)
    draft.rmdir()
    print(options.out)


if __name__ == "__main__":
    main()

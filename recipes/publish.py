"""Put a trained checkpoint into the package as the bundled model.

    python recipes/publish.py --checkpoint checkpoints/names --name mmsearch-lite2-minilm-5 --boost 1.1 --mirror \
        --out mmsearch/weights

Says the anchors' names anew, multiplies their share by `--boost`, and writes the card from `bundled_card.md`. The boost
is there because captions name few of the classes: their share, as captions alone would have it, is too small for words
that no caption holds.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from mmsearch.towers.checkpoint import TOKENIZER, load_dual_encoder, save_checkpoint
from mmsearch.towers.locate import locate
from mmsearch.towers.tokenise import Tokeniser
from mmsearch.train.anchor_rows import IMAGENET, AnchorRows
from mmsearch.train.encoding import TowerPass


def main() -> None:
    """Load, refresh, boost, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--boost", type=float, default=1.25)
    parser.add_argument("--mirror", action="store_true", help="a picture's row is the mean of both its mirror images'")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    directory, _ = locate(Path(options.checkpoint))
    model = load_dual_encoder(directory)
    tokeniser = Tokeniser.from_file(directory / TOKENIZER, max_tokens=model.config.max_tokens)

    def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        made = tokeniser(texts)
        return torch.from_numpy(made.ids), torch.from_numpy(made.mask)

    passes = TowerPass(model, dtype=torch.float32, device=torch.device("cpu"))
    AnchorRows(passes, prompts=IMAGENET, tokens=tokens).refresh()
    with torch.no_grad():
        model.image.anchors.scale.mul_(options.boost)
    if options.mirror:
        model.config = replace(model.config, image=replace(model.config.image, mirror=True))
        model.image.mirror = True
    draft = options.out.with_name(options.out.name + ".draft")
    card = Path(__file__).with_name("bundled_card.md").read_text("utf-8").replace("{name}", options.name)
    save_checkpoint(model, draft, tokenizer_json=directory / TOKENIZER, name=options.name, card=card)
    for file in draft.iterdir():
        shutil.move(file, options.out / file.name)
    draft.rmdir()
    print(options.out)


if __name__ == "__main__":
    main()

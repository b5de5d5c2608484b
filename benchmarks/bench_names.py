"""How often the nearest of all class names is what the classifier inside the model sees in a photo.

    python benchmarks/bench_names.py data/flickr8k/captions.jsonl data/coco/captions.jsonl data/caltech101
    python benchmarks/bench_names.py photos/ --model checkpoints/names

Photos of ImageNet with their labels are in no data set of this project. What can be measured without them: a model with
class-name anchors holds an ImageNet classifier, and a photo's row should lie nearest to the name of its verdict. Of
tables the val split is read, of folders every picture. Photos count by how sure the verdict is (its largest share,
mean of the picture and its mirror image where the model joins both): above 0.4, and from 0.15 to 0.4. Labels are
measured by `mmsearch eval --classes`. Two usual names stand for two classes each ("crane", "maillot"): of those, the
second is never found. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsearch.data.pairs import read_pairs
from mmsearch.encoder import Encoder
from mmsearch.evaluate.prompts import TEMPLATES, ensembled, filled
from mmsearch.towers.checkpoint import load_dual_encoder
from mmsearch.towers.image import joined_views
from mmsearch.towers.locate import locate
from mmsearch.train.anchor_rows import spoken
from mmsearch.train.feed import plain_pixels

SENTENCES = ("a photo of a {}", "{}")
SURE, UNSURE = 0.4, 0.15
BATCH, CLASSES, SEVERAL = 32, 1000, 4


def skip(skipped: object) -> None:
    """Say it, not among the results."""
    print(skipped, file=sys.stderr)


def pictures_of(paths: list[str]) -> list[str]:
    """Every picture of folders, those of the val split of tables."""
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found += sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        else:
            found += [str(pair.image) for pair in read_pairs(path, split="val", on_skip=skip)]
    return found


def seen(model: Any, pictures: list[str], workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, classes) verdicts and (n, d) rows of those that can be read."""
    verdicts, rows = [], []
    tower = model.image
    for _, pixels in plain_pixels(
        pictures, preprocessing=model.config.preprocessing, batch_size=BATCH, workers=workers, on_skip=skip
    ):
        images = model.normalise_pixels(torch.from_numpy(np.asarray(pixels)))
        images = images.contiguous(memory_format=torch.channels_last)
        views = torch.cat([images, images.flip(-1)]) if tower.mirror else images
        pooled = tower.pooled(views)
        verdicts.append(tower.anchors.classifier(pooled).softmax(-1).reshape(-1, len(images), CLASSES).mean(0))
        rows.append(joined_views(tower.embed(pooled)) if tower.mirror else tower.embed(pooled))
        print(f"\r{sum(map(len, rows))} of {len(pictures)} photos", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return torch.cat(verdicts), torch.cat(rows)


@torch.no_grad()
def main() -> None:
    """Encode, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    directory = locate(options.model)[0]
    model = load_dual_encoder(directory).eval()
    model.image.backbone.to(memory_format=torch.channels_last)
    if model.image.anchors is None or len(model.image.anchors.names) != CLASSES:
        raise SystemExit(f"{directory}: expected a model with ImageNet's class names as anchors")
    verdicts, rows = seen(model, pictures_of(options.paths), os.cpu_count() or 1)
    top, verdict = verdicts.max(dim=1)
    groups = {"sure": top > SURE, "unsure": (top > UNSURE) & (top <= SURE)}
    names, _ = spoken("imagenet", classes=CLASSES, synonyms=1, template="{}")
    encoder = Encoder.load(directory)

    def said(sentences: tuple[str, ...]) -> torch.Tensor:
        rows = encoder.encode_texts(filled(names, sentences))
        return torch.from_numpy(ensembled(rows, templates=len(sentences)))

    asked = {**{one: said((one,)) for one in SENTENCES}, f"{SEVERAL} sentences": said(TEMPLATES[:SEVERAL])}
    found: dict[str, Any] = {"model": encoder.identity.name, "photos": len(rows)}
    print(f"{encoder.identity.name}: nearest of 1,000 names is the classifier's verdict, in percent of photos")
    for group, which in groups.items():
        found[group] = {"photos": int(which.sum())}
        for name, texts in asked.items():
            right = ((rows @ texts.T).argmax(dim=1) == verdict)[which]
            found[group][name] = round(100 * float(right.float().mean()), 1) if len(right) else None
        print(f"{group:>7} ({found[group]['photos']}): " + ", ".join(f"{n} {found[group][n]}" for n in asked))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

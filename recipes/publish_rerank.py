"""Put a trained re-ranker into the package, beside the bundled towers that it reads.

    python recipes/publish_rerank.py --checkpoint checkpoints/rerank --name mmsearch-late-3 --out mmsearch/weights

Its files are copied as they are; the name changes, and the card comes from `rerank_card.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mmsearch.rerank.checkpoint import RERANK_CARD, RerankCheckpoint
from mmsearch.rerank.present import RERANK
from mmsearch.towers.locate import locate


def main() -> None:
    """Check, copy, rename, check again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    opened = RerankCheckpoint.open(locate(Path(options.checkpoint))[0])
    (options.out / RERANK).unlink(missing_ok=True)
    for name in opened.files:
        shutil.copyfile(opened.directory / name, options.out / name)
    card = Path(__file__).with_name("rerank_card.md").read_text("utf-8").replace("{name}", options.name)
    (options.out / RERANK_CARD).write_text(card, "utf-8")
    values = json.loads((opened.directory / RERANK).read_text("utf-8"))
    (options.out / RERANK).write_text(json.dumps({**values, "name": options.name}, indent=2) + "\n", "utf-8")
    print(RerankCheckpoint.open(options.out).directory)


if __name__ == "__main__":
    main()

"""Karpathy's splits (dataset_flickr8k.json, dataset_coco.json): {"images": [{"filename", "split", "sentences"}]}.

The whole document is held in memory. "restval" (COCO pictures of the old validation set that train and test left
over) counts as train, as in the papers that report on these splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmsearch.data.records import Record
from mmsearch.data.texts import OnSkip, captions_in, clean
from mmsearch.types import Skipped, SkipReason


def is_karpathy(document: object) -> bool:
    """Whether a parsed JSON document has the shape of this format."""
    images = document.get("images") if isinstance(document, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def read_karpathy(path: str, document: Mapping[str, object], *, on_skip: OnSkip) -> Iterator[Record]:
    """One record a picture; `filepath`, where there is one, is the folder of `filename`."""
    images = document["images"]
    for number, image in enumerate(images if isinstance(images, list) else (), 1):
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            on_skip(Skipped(f"{path}: image {number}", SkipReason.BAD_ROW, "no filename"))
            continue
        folder, split, identity = image.get("filepath"), image.get("split"), image.get("imgid")
        sentences = image.get("sentences")
        texts = tuple(
            text
            for sentence in (sentences if isinstance(sentences, list) else ())
            if isinstance(sentence, dict)
            for text in captions_in(sentence.get("raw"))
        )
        yield Record(
            number,
            f"{folder}/{name}" if isinstance(folder, str) and folder else name,
            texts,
            id=None if identity is None else str(identity),
            split=_split(split) if isinstance(split, str) else None,
        )


def _split(name: str) -> str:
    return "train" if name == "restval" else clean(name)

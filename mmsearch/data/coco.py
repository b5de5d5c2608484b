"""COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

The whole document is held in memory (its pictures come before its captions). The split is taken from the
usual file names (captions_val2017.json); pictures lie beside the file or in a folder near it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from mmsearch.data.records import Record
from mmsearch.data.texts import OnSkip, captions_in, json_value
from mmsearch.types import Skipped, SkipReason

_SPLIT = re.compile(r"(train|val|test)(?=\d{4}|[._-]|$)")
_LEFT_OUT = {"file_name", "license", "coco_url", "flickr_url"}


def is_coco(document: object) -> bool:
    """Whether a parsed JSON document has the shape of this format."""
    return isinstance(document, dict) and {"images", "annotations"} <= document.keys()


def read_coco(path: str, document: Mapping[str, object], *, on_skip: OnSkip) -> Iterator[Record]:
    """One record a picture, with its captions in the order of their ids."""
    found = _SPLIT.search(os.path.basename(path))
    captions = _captions(path, document, on_skip)
    images = document["images"]
    for number, image in enumerate(images if isinstance(images, list) else (), 1):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            on_skip(Skipped(f"{path}: image {number}", SkipReason.BAD_ROW, "no file_name"))
            continue
        metadata = {key: json_value(value) for key, value in image.items() if key not in _LEFT_OUT | {"id"}}
        identity = image.get("id")
        texts = tuple(text for _, text in sorted(captions.get(str(identity), ())))
        yield Record(
            number,
            name,
            texts,
            id=None if identity is None else str(identity),
            split=found[1] if found else None,
            metadata=metadata,
        )


def _captions(path: str, document: Mapping[str, object], on_skip: OnSkip) -> dict[str, list[tuple[int, str]]]:
    captions: dict[str, list[tuple[int, str]]] = {}
    entries = document["annotations"]
    for number, entry in enumerate(entries if isinstance(entries, list) else (), 1):
        texts = captions_in(entry.get("caption")) if isinstance(entry, dict) else ()
        if not texts:
            on_skip(Skipped(f"{path}: annotation {number}", SkipReason.BAD_ROW, "no caption"))
            continue
        order = entry.get("id")
        captions.setdefault(str(entry.get("image_id")), []).append(
            (order if isinstance(order, int) else number, texts[0])
        )
    return captions

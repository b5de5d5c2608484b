"""JSON files that hold a whole collection in one document: Karpathy splits, COCO captions, a list of rows.

The document is parsed in memory, as these formats demand; `MAX_BYTES` bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmsearch.data.coco import is_coco, read_coco
from mmsearch.data.karpathy import is_karpathy, read_karpathy
from mmsearch.data.reading import read_file
from mmsearch.data.records import Record
from mmsearch.data.table import read_list
from mmsearch.data.texts import OnSkip, parse_json
from mmsearch.errors import ImageError, InputError

MAX_BYTES = 1 << 30


def read_json(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Whichever of the three the document is; `InputError` when it is none."""
    document = _document(path)
    if is_coco(document):
        return read_coco(path, document, on_skip=on_skip)
    if is_karpathy(document):
        return read_karpathy(path, document, on_skip=on_skip)
    if isinstance(document, list):
        return read_list(path, document, on_skip=on_skip)
    expected = 'a list of rows, Karpathy splits ("images" with "sentences") or COCO ("images", "annotations")'
    raise InputError(path, expected=expected, got="another JSON document")


def read_karpathy_file(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Karpathy splits; `InputError` when it is something else."""
    document = _document(path)
    if not is_karpathy(document):
        raise InputError(path, expected='Karpathy splits ("images" with "sentences")', got="something else")
    return read_karpathy(path, document, on_skip=on_skip)


def read_coco_file(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """COCO captions; `InputError` when it is something else."""
    document = _document(path)
    if not is_coco(document):
        raise InputError(path, expected='COCO captions ("images", "annotations")', got="something else")
    return read_coco(path, document, on_skip=on_skip)


def _document(path: str) -> Any:  # noqa: ANN401 - any JSON value; its shape is looked at next
    try:
        data, _ = read_file(path, max_bytes=MAX_BYTES)
        return parse_json(data)
    except ImageError as error:
        raise InputError(path, expected="a JSON document", got=f"{error.reason} {error.detail}".strip()) from None
    except ValueError as error:
        raise InputError(path, expected="a JSON document", got=str(error)) from None

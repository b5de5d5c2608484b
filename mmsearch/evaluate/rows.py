"""Embeddings of captions and pictures -> an evaluation of both directions.

Decisions:
- It stands apart from `evaluator`, which reads and encodes files: training measures rows that it already holds.
- Intervals resample groups. A group is one picture with its captions, or several views of one thing; neither
  its captions nor its views are independent of each other.
"""

from __future__ import annotations

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.evaluate.metrics import Ints, rank_groups
from mmsearch.evaluate.report import Evaluation, summarise
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings


def evaluate_rows(
    texts: Embeddings, images: Embeddings, *, text_groups: Ints, image_groups: Ints, model: str
) -> Evaluation:
    """Rank both ways: (m, d) captions and (n, d) pictures, unit rows, with their (m,) and (n,) groups.

    What has the same group belongs together; a group is any integer. `model`: the name that a report shows.
    Known value: rows that are alike within a group and orthogonal between groups give hit@1 = 1 both ways.
    Raises `UsageError` for rows that are not unit rows, counts that do not fit, and a caption or a picture
    whose group has nothing on the other side.
    """
    images = check_embeddings(images, where="pictures")
    texts = check_embeddings(texts, dim=images.shape[1], where="captions")
    text_groups, image_groups = np.asarray(text_groups, np.int64), np.asarray(image_groups, np.int64)
    for what, rows, groups in (("captions", texts, text_groups), ("pictures", images, image_groups)):
        if groups.shape != (len(rows),):
            raise UsageError(f"groups of the {what}", expected=f"shape ({len(rows)},)", got=str(groups.shape))
    to_image = rank_groups(texts, images, query_groups=text_groups, candidate_groups=image_groups)
    to_text = rank_groups(images, texts, query_groups=image_groups, candidate_groups=text_groups)
    return Evaluation(
        model=model,
        images=len(images),
        texts=len(texts),
        text_to_image=summarise(to_image, clusters=text_groups),
        image_to_text=summarise(to_text, clusters=image_groups),
    )

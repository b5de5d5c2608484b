"""How often pictures are given the right name, out of the names of all classes.

Decisions:
- The right name's rank is pessimistic, as in retrieval: a name that scores as high stands before it.
- top-1 and top-5 weigh pictures alike, the mean over classes weighs classes alike: the second is not carried by
  one large class. Its interval resamples within classes, whose number of hits is then binomial.
- top-5 of five classes or fewer is always right, and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.evaluate.comparison import Comparison, differences_of
from mmsearch.evaluate.metrics import Floats, Ints, hit_at, interval, rank_groups
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Skipped

_BLOCK = 2048
_DRAWS = 1000
_SHOWN = 10
_TITLES = {"top1": "top-1", "top5": "top-5", "class_mean": "mean of classes"}


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: how many of its `images` were given its name first.

    `taken_for`: the name that the others were given most often, and how often; None when all were right.
    """

    name: str
    images: int
    right: int
    taken_for: tuple[str, int] | None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        taken = None if self.taken_for is None else {"name": self.taken_for[0], "images": self.taken_for[1]}
        return {"name": self.name, "images": self.images, "right": self.right, "taken_for": taken}


@dataclass(frozen=True, slots=True)
class Classification:
    """What naming pictures by their classes gave. Shares are in [0, 1].

    `values`: `top1`, `top5` (more than five classes), `class_mean` (the mean over classes of the share that is right);
    `intervals`: their 95 % intervals. `warnings`: what the numbers do not say. `per_picture`: `top1` and `top5` of
    each of the n pictures, 0.0 or 1.0; `labels` (n,): the class of each.
    """

    model: str
    images: int
    classes: tuple[ClassScore, ...]
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    per_picture: Mapping[str, Floats] = field(compare=False, repr=False)
    labels: Ints = field(compare=False, repr=False)
    templates: int = 1
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values: counts, shares, their 95 % intervals under `ci95`, every class."""
        return {
            "model": self.model,
            "images": self.images,
            "templates": self.templates,
            "skipped": len(self.skipped),
            **self.values,
            "ci95": {name: list(ends) for name, ends in self.intervals.items()},
            "classes": [one.to_json() for one in self.classes],
            "warnings": list(self.warnings),
        }

    def lines(self) -> Iterator[str]:
        """For people: shares in per cent, ± half of their 95 % interval, and the classes with the fewest hits."""
        yield (
            f"{self.model}: {self.images} images, {len(self.classes)} classes, {self.templates} templates, "
            f"{self.seconds:.1f} s"
        )
        for name, value in self.values.items():
            low, high = self.intervals[name]
            yield f"{_TITLES[name]:<16} {100 * value:5.1f} ± {50 * (high - low):.1f}"
        worst = [one for one in self.worst() if one.taken_for is not None][:_SHOWN]
        if worst:
            width = max(len(one.name) for one in worst)
            yield "least often right:"
        for one in worst:
            name, count = one.taken_for or ("", 0)
            yield f"  {one.name:<{width}}  {one.right} of {one.images}, {count} taken for {name}"
        yield "In per cent, ± half of the 95 % interval (bootstrap over images)."

    def worst(self) -> list[ClassScore]:
        """All classes, the one with the smallest share of hits first."""
        return sorted(self.classes, key=lambda one: (one.right / one.images, -one.images, one.name))


def classify_rows(
    images: Embeddings, classes: Embeddings, *, labels: Ints, names: Sequence[str], model: str
) -> Classification:
    """Name (n, d) pictures by the nearest of (c, d) classes. `labels` (n,) in 0..c-1: the right one; `names` (c).

    Every class has at least one picture, and there are two classes at least; else `UsageError`.
    Known value: pictures that are their class's row are right everywhere: top1 = class_mean = 1.
    """
    images = check_embeddings(images, where="pictures")
    classes = check_embeddings(classes, dim=images.shape[1], where="classes")
    counts = np.bincount(labels, minlength=len(names)).astype(np.int64)
    if len(names) != len(classes) or len(counts) != len(classes) or len(classes) < 2 or not counts.all():
        got = f"{len(classes)} classes with {len(names)} names and {int((counts > 0).sum())} in use"
        raise UsageError("classes", expected="two or more, each with a name and a picture", got=got)
    ranked = rank_groups(images, classes, query_groups=labels, candidate_groups=np.arange(len(classes)))
    per_picture = {"top1": hit_at(ranked, 1), **({"top5": hit_at(ranked, 5)} if len(classes) > 5 else {})}
    everyone = np.arange(len(images), dtype=np.int64)
    right = np.bincount(labels[per_picture["top1"] > 0], minlength=len(classes)).astype(np.int64)
    wrong = _wrong_names(images, classes, labels=labels, right=per_picture["top1"])
    return Classification(
        model=model,
        images=len(images),
        classes=tuple(
            ClassScore(name, int(counts[row]), int(right[row]), _most_frequent(wrong.get(row, {}), names))
            for row, name in enumerate(names)
        ),
        values={
            **{name: float(values.mean()) for name, values in per_picture.items()},
            "class_mean": float((right / counts).mean()),
        },
        intervals={
            **{name: interval(values, everyone) for name, values in per_picture.items()},
            "class_mean": _class_mean_interval(right, counts),
        },
        per_picture=per_picture,
        labels=labels,
    )


def compare_classes(before: Classification, after: Classification) -> Comparison[Classification]:
    """What changed between two models on the same pictures and names, with 95 % intervals of the differences.

    Raises `UsageError` when the pictures or the names are not the same.
    """
    same_names = [one.name for one in before.classes] == [one.name for one in after.classes]
    if not same_names or not np.array_equal(before.labels, after.labels):
        raise UsageError(
            f"{before.model} and {after.model}",
            expected="the same pictures of the same classes measured with both",
            got=f"{before.images} and {after.images} pictures, {len(before.classes)} and {len(after.classes)} classes",
            do="Remove the skipped pictures.",
        )
    found = differences_of(before.per_picture, after.per_picture, clusters=np.arange(before.images, dtype=np.int64))
    return Comparison(before, after, {"classes": found})


def _wrong_names(images: Embeddings, classes: Embeddings, *, labels: Ints, right: Floats) -> dict[int, dict[int, int]]:
    """class -> the best other class of each of its wrong pictures -> how often."""
    found: dict[int, dict[int, int]] = {}
    wrong = np.flatnonzero(right == 0)
    for low in range(0, len(wrong), _BLOCK):
        rows = wrong[low : low + _BLOCK]
        scores = images[rows] @ classes.T  # (b, c)
        scores[np.arange(len(rows)), labels[rows]] = -np.inf  # ties: it was named something else
        for label, name in zip(labels[rows].tolist(), scores.argmax(axis=1).tolist(), strict=True):
            counts = found.setdefault(label, {})
            counts[name] = counts.get(name, 0) + 1
    return found


def _most_frequent(counts: Mapping[int, int], names: Sequence[str]) -> tuple[str, int] | None:
    if not counts:
        return None
    best = min(counts, key=lambda row: (-counts[row], row))
    return names[best], counts[best]


def _class_mean_interval(right: Ints, counts: Ints) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over classes; resampled 0s and 1s of one class sum to a binomial number."""
    random = np.random.default_rng(0)
    means = (random.binomial(counts, right / counts, size=(_DRAWS, len(counts))) / counts).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

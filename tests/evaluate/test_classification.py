"""Naming pictures: known shares, and that large classes carry no more than their part."""

import json

import numpy as np
import pytest

from mmsearch.errors import UsageError
from mmsearch.evaluate.classification import Classification, classify_rows, compare_classes
from mmsearch.evaluate.comparison import Verdict
from mmsearch.similarity import normalise

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
AXES = np.eye(len(NAMES), dtype=np.float32)


def named(seen: str, *, labels: str | None = None, classes: int = len(NAMES), model: str = "m") -> Classification:
    """Pictures that look exactly like the classes whose first letters are `seen`; `labels`: what they are."""
    rows = AXES[["abcdefg".index(letter) for letter in seen]][:, :classes]
    right = np.array(["abcdefg".index(letter) for letter in labels or seen])
    return classify_rows(rows, AXES[:classes, :classes], labels=right, names=NAMES[:classes], model=model)


def test_pictures_like_their_names_are_all_right():
    """Known value: 1 for every share, and no class was taken for another."""
    found = named("abcdefgabc")
    assert found.values == {"top1": 1.0, "top5": 1.0, "class_mean": 1.0}
    assert set(found.intervals.values()) == {(1.0, 1.0)}
    assert {(one.right, one.taken_for) for one in found.classes} == {(2, None), (1, None)}


def test_classes_count_alike_in_the_mean_over_classes():
    """Nine right pictures of one class and two wrong ones of another: 9/11 of the pictures, half of the classes."""
    found = named("a" * 9 + "aa", labels="a" * 9 + "bb", classes=2)
    assert found.values == {"top1": pytest.approx(9 / 11), "class_mean": 0.5}


def test_what_a_class_is_taken_for_is_its_most_frequent_wrong_name():
    """Counted over its wrong pictures only."""
    found = named("abbba" + "cbcdefg", labels="aaaaa" + "bbcdefg")
    assert (found.classes[0].images, found.classes[0].right, found.classes[0].taken_for) == (5, 2, ("bee", 3))
    assert [(one.name, one.right / one.images) for one in found.worst()[:2]] == [("ant", 0.4), ("bee", 0.5)]


def test_names_that_score_alike_count_against_the_model():
    """A model that says the same of every name has named nothing."""
    same = normalise(np.ones((3, 4)))
    found = classify_rows(same, same, labels=np.arange(3), names=NAMES[:3], model="m")
    assert found.values == {"top1": 0.0, "class_mean": 0.0}


def test_the_first_five_of_six_leave_one_out_and_of_five_nothing():
    """top-5 of five classes says nothing and is not there."""
    order = normalise(np.linspace(1.0, 0.1, 6)[None])  # one picture: class 0 first, class 5 last
    names, eye = NAMES[:6], AXES[:6, :6]
    pictures = np.repeat(order, 6, axis=0)
    found = classify_rows(pictures, eye, labels=np.arange(6), names=names, model="m")
    assert (found.values["top1"], found.values["top5"]) == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert "top5" not in named("abcde", classes=5).values


def test_the_interval_of_the_class_mean_has_a_known_width():
    """Two classes of 100 with half of them right: 1.96 · sqrt(2 · 0.25 / 100) / 2."""
    seen = "a" * 50 + "b" * 50 + "b" * 50 + "a" * 50
    low, high = named(seen, labels="a" * 100 + "b" * 100, classes=2).intervals["class_mean"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(2 * 0.25 / 100) / 2, rel=0.1)


def test_against_a_dumb_loop():
    """Random rows, 30 classes, 200 pictures: the same shares as sorting by hand."""
    random = np.random.default_rng(0)
    classes = normalise(random.normal(size=(30, 8)))
    labels = np.concatenate([np.arange(30), random.integers(0, 30, 170)])
    pictures = normalise(classes[labels] + random.normal(size=(200, 8)))
    found = classify_rows(pictures, classes, labels=labels, names=[str(i) for i in range(30)], model="m")
    orders = [sorted(range(30), key=lambda c, p=picture: -float(p @ classes[c])) for picture in pictures]
    places = [order.index(label) for order, label in zip(orders, labels, strict=True)]
    assert found.values["top1"] == pytest.approx(np.mean([place < 1 for place in places]))
    assert found.values["top5"] == pytest.approx(np.mean([place < 5 for place in places]))
    assert found.per_picture["top5"].tolist() == [float(place < 5) for place in places]


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [([0, 0], NAMES[:2], 2), ([0, 2], NAMES[:2], 2), ([0, 1], NAMES[:3], 2), ([0, 0], NAMES[:1], 1)],
)
def test_classes_that_cannot_be_measured_are_refused(labels, names, classes):
    """A class without a picture has no share, and one class is no choice."""
    with pytest.raises(UsageError, match="classes"):
        classify_rows(AXES[:2], AXES[:classes], labels=np.array(labels), names=names, model="m")


def test_two_models_are_compared_picture_by_picture():
    """All of 20 pictures better; the same names and pictures are asked for."""
    before, after = named("b" * 20 + "b", labels="a" * 20 + "b", classes=2), named("a" * 20 + "b", classes=2)
    found = compare_classes(before, after).differences["classes"]
    assert list(found) == ["top1"]
    assert found["top1"].verdict is Verdict.RISES
    assert found["top1"].change == pytest.approx(20 / 21)
    with pytest.raises(UsageError, match="same pictures"):
        compare_classes(before, named("a" * 19 + "bb", classes=2))


def test_json_and_the_table_say_the_same():
    """Shares between 0 and 1 in JSON, per cent in the table, the worst class in both."""
    found = named("abcdefb", labels="abcdefg")
    read = json.loads(json.dumps(found.to_json()))
    assert read["top1"] == pytest.approx(6 / 7)
    assert read["classes"][-1] == {"name": "gnu", "images": 1, "right": 0, "taken_for": {"name": "bee", "images": 1}}
    assert len(read["ci95"]["class_mean"]) == 2
    lines = list(found.lines())
    assert lines[0].startswith("m: 7 images, 7 classes, 1 templates")
    assert next(line for line in lines if line.startswith("top-1")).split()[1] == "85.7"
    assert any(line.split()[:4] == ["gnu", "0", "of", "1,"] for line in lines)

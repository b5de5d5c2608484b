"""Pairs of all sources, split by group and checked before any work is done."""

from __future__ import annotations

import json
import shutil

import pytest

from mmsearch.errors import InputError, UsageError
from mmsearch.train.examples import DataSource, read_examples
from mmsearch.types import SkipReason


def table(folder, rows, name: str = "pairs.jsonl") -> str:
    """A table of (picture, caption, split, group) rows; the pictures are there, and are never opened here."""
    folder.mkdir(exist_ok=True)
    lines = []
    for image, caption, split, group in rows:
        (folder / image).write_bytes(b"x")
        lines.append(json.dumps({"image": image, "caption": caption, "split": split, "group": group}))
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def unsplit(count: int, *, prefix: str = "p", groups: int = 0) -> list[tuple]:
    """`count` rows that name no split; with `groups`, so many groups in turn."""
    return [
        (f"{prefix}{i}.jpg", f"a photo of {prefix}{i}", None, f"g{i % groups}" if groups else None)
        for i in range(count)
    ]


def named(split: str, count: int, *, start: int = 0) -> list[tuple]:
    return [(f"{i}.jpg", f"a photo of {i}", split, None) for i in range(start, start + count)]


def read(*sources, **options):
    return read_examples([DataSource(s) if isinstance(s, str) else s for s in sources], **options)


def images(pairs) -> list[str]:
    return [pair.image.rsplit("/", 1)[1] for pair in pairs]


def test_a_table_with_splits_is_split_as_it_says(tmp_path):
    """train and restval to train on, dev to measure on, test left alone."""
    rows = [*named("train", 2), *named("restval", 1, start=2), *named("dev", 2, start=3), *named("test", 2, start=5)]
    found = read(table(tmp_path, rows))
    assert images(found.train) == ["0.jpg", "1.jpg", "2.jpg"]
    assert images(found.val) == ["3.jpg", "4.jpg"]
    assert found.repeats == (1, 1, 1)


def test_other_splits_can_be_named(tmp_path):
    """ "test" to train on and "train" to measure on, if somebody wants that."""
    path = table(tmp_path, [*named("train", 2), *named("test", 3, start=2)])
    found = read(DataSource(path, split="testing", val_split="train", repeat=4))
    assert (images(found.train), images(found.val)) == (["2.jpg", "3.jpg", "4.jpg"], ["0.jpg", "1.jpg"])
    assert found.repeats == (4, 4, 4)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    """Rather than training on nothing, or on the test split."""
    with pytest.raises(InputError, match=r"split train, got only test"):
        read(table(tmp_path, named("test", 3)))


@pytest.mark.parametrize("rows", [unsplit(40), named("train", 40)])
def test_without_validation_rows_a_share_of_the_groups_is_held_out(tmp_path, rows):
    """A tenth of them, and every pair is on exactly one side."""
    found = read(table(tmp_path, rows))
    assert (len(found.train), len(found.val)) == (36, 4)
    assert len({*images(found.train), *images(found.val)}) == 40


def test_one_split_for_both_is_divided(tmp_path):
    """A table of validation rows alone can still be trained on."""
    found = read(DataSource(table(tmp_path, named("val", 20)), split="val"), val_share=0.25)
    assert (len(found.train), len(found.val)) == (15, 5)


def test_groups_are_held_out_whole(tmp_path):
    """Two pictures of one thing are never on both sides."""
    found = read(table(tmp_path, unsplit(60, groups=12)), val_share=0.25)
    assert len({pair.group for pair in found.val}) == 3
    assert len(found.val) == 15
    assert {pair.group for pair in found.val}.isdisjoint(pair.group for pair in found.train)


def test_what_is_held_out_depends_on_the_seed_and_on_nothing_else(tmp_path):
    """Not on the order of rows, on rows that came later, or on where the data lies; another seed holds out others."""
    rows = unsplit(50)
    first = set(images(read(table(tmp_path / "a", rows)).val))
    assert set(images(read(table(tmp_path / "b", rows[::-1])).val)) == first
    more = set(images(read(table(tmp_path / "c", rows + unsplit(10, prefix="q"))).val))
    assert len(more - first) <= 3
    assert set(images(read(table(tmp_path / "d", rows), seed=1).val)) != first
    shutil.copytree(tmp_path / "a", tmp_path / "e")
    assert set(images(read(str(tmp_path / "e" / "pairs.jsonl")).val)) == first


def test_few_groups_leave_two_to_train_on(tmp_path):
    """Three groups: one to measure on; two: none, and a warning."""
    assert len(read(table(tmp_path / "3", unsplit(3)), val_share=0.9).val) == 1
    found = read(table(tmp_path / "2", unsplit(2)), val_share=0.9)
    assert (len(found.train), len(found.val)) == (2, 0)
    assert "no pairs are held out" in found.warnings[0]


def test_no_share_holds_out_nothing(tmp_path):
    """A run on everything there is, once the settings are known."""
    assert read(table(tmp_path, unsplit(20)), val_share=0).val == ()


def test_a_limit_takes_so_many_pairs_by_whole_groups(tmp_path):
    """The same ones for one seed, in the order of the table; the share held out is a share of that many."""
    path = table(tmp_path, unsplit(100, groups=50))
    found = read(path, limit=20)
    assert len(found.train) == 20
    assert len({pair.group for pair in found.train}) == 10
    assert len({pair.group for pair in found.val}) == 2
    assert found == read(path, limit=20)
    assert list(found.train) == sorted(found.train, key=lambda pair: int(images([pair])[0][1:-4]))
    assert images(read(path, limit=20, seed=5).train) != images(found.train)
    assert len(read(path, limit=1000).train) == 90


def test_several_sources_are_joined_each_with_its_repeats(tmp_path):
    """And each is split in its own way."""
    first = DataSource(table(tmp_path / "a", [*named("train", 3), *named("val", 2, start=3)]), repeat=3)
    second = DataSource(table(tmp_path / "b", unsplit(20)))
    found = read(first, second)
    assert found.repeats == (3,) * 3 + (1,) * 18
    assert found.origins == (0,) * 3 + (1,) * 18
    assert len(found.val) == 2 + 2


def test_a_group_of_one_table_is_not_a_group_of_another(tmp_path):
    """Both may number theirs."""
    rows_a = [("a.jpg", "one", "train", "7"), ("b.jpg", "two", "train", "8")]
    rows_b = [("c.jpg", "three", "train", "9"), ("d.jpg", "four", "val", "7")]
    found = read(table(tmp_path / "a", rows_a), table(tmp_path / "b", rows_b))
    assert len({pair.group for pair in (*found.train, *found.val)}) >= 4


def test_a_group_in_both_splits_is_an_error_that_names_it(tmp_path):
    """A model that learned it by heart would look good."""
    rows = [*named("train", 3), ("x.jpg", "one", "train", "shoe"), ("y.jpg", "two", "val", "shoe")]
    with pytest.raises(InputError, match=r"y\.jpg.*shoe.*both to train on and to measure on"):
        read(table(tmp_path, rows))


@pytest.mark.parametrize("apart", [False, True])
def test_a_picture_in_both_splits_is_an_error_that_names_it(tmp_path, apart):
    """In one table, or in two that name the same file."""
    rows = [*named("train", 3), ("x.jpg", "one", "train", None)]
    leak = [*named("val", 2, start=10), ("x.jpg", "two", "val", None)]
    paths = (
        [table(tmp_path, rows), table(tmp_path, [*named("train", 1, start=20), *leak], name="other.jsonl")]
        if apart
        else [table(tmp_path, rows + leak)]
    )
    with pytest.raises(InputError, match=r"x\.jpg.*the picture both to train on and to measure on"):
        read(*paths)


@pytest.mark.parametrize("by", ["picture", "group"])
def test_what_leaks_into_another_split_is_an_error_too(tmp_path, by):
    """A test row of a training picture would make the last figure a lie."""
    leak = ("1.jpg", "another", "test", None) if by == "picture" else ("9.jpg", "another", "test", "g")
    rows = [("0.jpg", "zero", "train", "g"), *named("train", 3, start=1), leak]
    with pytest.raises(InputError, match=rf"the {by}.* both to train on and in another split"):
        read(table(tmp_path, rows), val_share=0)


def test_a_table_with_nothing_but_validation_rows_is_what_is_measured_on(tmp_path):
    """captions_train.json and captions_val.json: nothing of the other is held out besides."""
    paths = [table(tmp_path, unsplit(20)), table(tmp_path, named("val", 3), name="other.jsonl")]
    for sources in (paths, paths[::-1]):
        found = read(*sources)
        assert (len(found.train), images(found.val)) == (20, ["0.jpg", "1.jpg", "2.jpg"])


def test_rows_without_a_split_follow_the_tables_that_name_one(tmp_path):
    """More captions of pictures that another table has divided: none ends on both sides."""
    first = table(tmp_path, [*named("train", 6), *named("val", 2, start=6), *named("test", 2, start=8)])
    second = table(tmp_path, [(f"{i}.jpg", f"again {i}", None, None) for i in range(20)], name="more.jsonl")
    for sources in ((first, second), (second, first)):
        found = read(*sources, val_share=0.3)
        held, learnt = set(images(found.val)), set(images(found.train))
        assert not held & learnt and {"6.jpg", "7.jpg"} < held and {f"{i}.jpg" for i in range(6)} < learnt
        assert not {"8.jpg", "9.jpg"} & (held | learnt)
        assert any("2 pairs without a split left out" in one for one in found.warnings)


def test_validation_alone_is_nothing_to_train_on(tmp_path):
    """Said of all tables together, not of groups that there are none of."""
    paths = [table(tmp_path, named("val", 2, start=2 * i), name=f"{i}.jsonl") for i in range(2)]
    with pytest.raises(InputError, match="pairs to train on, got only val"):
        read(*paths)


def test_among_several_tables_a_name_that_is_a_split_counts(tmp_path):
    """train.jsonl, val.jsonl and test.jsonl; a single table is to be trained on whatever it is called."""
    named_so = [table(tmp_path, unsplit(4, prefix=name), name=f"{name}.jsonl") for name in ("train", "val")]
    found = read(*named_so)
    assert images(found.train) == [f"train{i}.jpg" for i in range(4)]
    assert images(found.val) == [f"val{i}.jpg" for i in range(4)]
    assert len(read(named_so[1], val_share=0).train) == 4
    with pytest.raises(InputError, match=r"test\.jsonl: .* got only test, as the file is called"):
        read(*named_so, table(tmp_path, unsplit(4, prefix="t"), name="test.jsonl"))


def test_a_name_that_only_begins_like_a_split_is_none(tmp_path):
    """Two tables called test1 and test2 are somebody's trials."""
    found = read(*(table(tmp_path, unsplit(4, prefix=n), name=f"{n}.jsonl") for n in ("test1", "test2")), val_share=0)
    assert len(found.train) == 8


def test_a_picture_that_two_tables_list_is_held_out_of_both(tmp_path):
    """Also where the tables lie in different folders and name groups of their own, which then follow."""
    (tmp_path / "deep").mkdir()
    rows = unsplit(30)
    first = table(tmp_path, rows)
    second = tmp_path / "deep" / "more.jsonl"
    second.write_text(
        "\n".join(
            json.dumps({"image": str(tmp_path / image), "caption": f"again {image}", "group": f"g{i // 2}"})
            for i, (image, *_) in enumerate(rows)
        )
    )
    found = read(first, str(second), val_share=0.2)
    held, learnt = set(images(found.val)), set(images(found.train))
    assert held and learnt and not held & learnt
    assert len(found.train) + len(found.val) == 60


def test_one_caption_for_all_is_an_error_that_shows_it(tmp_path):
    """Most likely the wrong column."""
    rows = [(f"{i}.jpg", "A  photo", None, None) for i in range(9)] + [("x.jpg", "a photo", None, None)]
    with pytest.raises(InputError, match=r'got "a photo" for all'):
        read(table(tmp_path, rows))


def test_one_group_is_nothing_to_contrast(tmp_path):
    """Whatever the number of its pictures."""
    with pytest.raises(InputError, match="at least two groups"):
        read(table(tmp_path, [(f"{i}.jpg", f"caption {i}", None, "one") for i in range(5)]))


def test_nothing_at_all_is_an_error_with_the_first_reason(tmp_path):
    """A table whose pictures are elsewhere."""
    (tmp_path / "t.csv").write_text("image,caption\nnone/1.jpg,a\nnone/2.jpg,b\n")
    with pytest.raises(InputError, match=r"no pairs at all, the first skipped: .*1\.jpg \(vanished\)"):
        read(str(tmp_path / "t.csv"))


def test_what_is_missing_is_left_out_and_said(tmp_path):
    """A picture that is not there and a row without a caption: a warning with counts, and each in the list."""
    rows = [*unsplit(20), ("empty.jpg", " ", None, None), ("gone.jpg", "gone", None, None)]
    path = table(tmp_path, rows)
    (tmp_path / "gone.jpg").unlink()
    found = read(path)
    assert {one.reason for one in found.skipped} == {SkipReason.VANISHED, SkipReason.BAD_ROW}
    assert len(found.train) + len(found.val) == 20
    assert found.warnings[0].startswith("2 left out of the data (")
    assert "1 vanished" in found.warnings[0]
    assert "1 bad table row" in found.warnings[0]


def test_a_caption_that_many_share_is_a_warning(tmp_path):
    """Each of those pictures is a false negative of the others."""
    rows = [*unsplit(20), *((f"s{i}.jpg", "Same text", None, None) for i in range(10))]
    (note,) = (w for w in read(table(tmp_path, rows), val_share=0).warnings if "same text" in w)
    assert note.startswith('10 of 30 captions are "same text"')


def test_validation_captions_that_were_trained_on_are_a_warning(tmp_path):
    """Only where there are many: people do write "a dog runs" twice."""
    rows = [*named("train", 30), *((f"v{i}.jpg", f"A photo of  {i}", "val", None) for i in range(30))]
    warnings = read(table(tmp_path, rows)).warnings
    assert warnings[0].startswith("30 of 30 validation captions are also captions of training pictures")
    rows = [*named("train", 30), *((f"v{i}.jpg", f"a photo of {28 + i}", "val", None) for i in range(30))]
    assert read(table(tmp_path, rows)).warnings == ()


@pytest.mark.parametrize(
    "options",
    [{"val_share": -0.1}, {"val_share": 1.0}, {"limit": 0}, {"sources": []}, {"sources": [DataSource("x", 0)]}],
)
def test_numbers_that_cannot_be_are_refused(options):
    """Before anything is read."""
    with pytest.raises(UsageError):
        read_examples(**{"sources": [DataSource("nowhere")], **options})

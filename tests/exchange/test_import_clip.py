"""clip-retrieval's layout: numbers, pictures, texts and metadata of the same rows."""

import pytest
from exchange_kit import bits, clip_folder, held, npy, pictures, unit

from mmsearch.errors import InputError
from mmsearch.exchange import import_vectors


def test_rows_meet_their_metadata_and_texts(tmp_path):
    """Row i of each file of a number is one item; its text vector is that of its caption."""
    columns = [
        {"id": ["a", "b"], "caption": ["red", "blue"], "url": ["u1", "u2"], "image_path": ["/x/1.jpg", None]},
        {"id": ["c"], "caption": ["green"], "url": ["u3"], "image_path": [__file__]},
    ]  # fmt: skip
    folder = clip_folder(
        tmp_path / "clip", [unit(2), unit(1, seed=1)], texts=[unit(2, seed=2), unit(1, seed=3)], columns=columns
    )
    report = import_vectors(folder, tmp_path / "i")
    found = held(tmp_path / "i")
    assert report.added == 3 and {n: one["captions"] for n, one in found.items()} == {
        "a": ("red",), "b": ("blue",), "c": ("green",)
    }  # fmt: skip
    assert [one["image"] for one in found.values()] == [*bits(unit(2)).values(), *bits(unit(1, seed=1)).values()]
    assert [one["texts"][0] for one in found.values()] == [
        *bits(unit(2, seed=2)).values(), *bits(unit(1, seed=3)).values()
    ]  # fmt: skip
    assert found["b"]["metadata"] == {"url": "u2"}


def test_pictures_of_another_machine_are_not_lost(tmp_path):
    """A path that is no file here is kept in the metadata: hits whose file is gone would not be shown."""
    places = [__file__, "/elsewhere/1.jpg", "pics/a.jpg", str(tmp_path / "gone.jpg")]
    columns = [{"id": ["here", "there", "below", "gone"], "image_path": places}]
    folder = clip_folder(tmp_path / "clip", [unit(4)], columns=columns)
    (folder / "pics").mkdir()
    (folder / "pics" / "a.jpg").write_bytes(b"")
    report = import_vectors(folder, tmp_path / "i")
    found = held(tmp_path / "i")
    assert (found["here"]["path"], found["there"]["path"]) == (__file__, None)
    assert found["below"]["path"] == str(folder / "pics" / "a.jpg")
    assert found["there"]["metadata"] == {"image_path": "/elsewhere/1.jpg"}
    assert found["gone"]["path"] is None
    assert any("2 pictures are not on this machine" in note for note in report.notes)


def test_numbers_order_the_files_and_name_rows_without_ids(tmp_path):
    """Ten comes after two; a row without an id is known by its file's number and its own."""
    folder = tmp_path / "clip"
    for number in (2, 10):
        npy(folder / "img_emb" / f"img_emb_{number}.npy", unit(2, seed=number))
    import_vectors(folder, tmp_path / "i")
    expected = {**bits(unit(2, seed=2), ["2:0", "2:1"]), **bits(unit(2, seed=10), ["10:0", "10:1"])}
    assert list(pictures(tmp_path / "i").items()) == list(expected.items())


def test_a_text_without_a_text_is_left_out(tmp_path):
    """A caption's vector without a caption cannot be shown; its picture stays."""
    folder = clip_folder(
        tmp_path / "clip", [unit(2)], texts=[unit(2, seed=1)], columns=[{"id": ["a", "b"], "caption": ["red", None]}]
    )
    report = import_vectors(folder, tmp_path / "i")
    found = held(tmp_path / "i")
    assert (len(found["a"]["texts"]), len(found["b"]["texts"])) == (1, 0) and found["b"]["image"] is not None
    assert any("1 vectors of texts without a text" in note for note in report.notes)


def test_a_bad_side_costs_only_itself(tmp_path):
    """A zero text leaves its picture, a zero picture its text; with both zero the item is skipped."""
    images, texts = unit(4), unit(4, seed=1)
    images[1] = images[3] = texts[2] = texts[3] = 0
    folder = clip_folder(
        tmp_path / "clip", [images], texts=[texts], columns=[{"id": list("abcd"), "caption": list("wxyz")}]
    )
    report = import_vectors(folder, tmp_path / "i")
    found = held(tmp_path / "i")
    assert {name: (one["image"] is not None, len(one["texts"])) for name, one in found.items()} == {
        "a": (True, 1), "b": (False, 1), "c": (True, 0)
    }  # fmt: skip
    assert [(one.path, one.detail) for one in report.skipped] == [("d", "no direction (zero, NaN or infinite)")]
    assert any("1 vectors of pictures have no direction" in note for note in report.notes)
    assert any("1 items have a text whose vector has no direction" in note for note in report.notes)


def test_modality_takes_one_side_only(tmp_path):
    """Texts alone, or pictures alone."""
    folder = clip_folder(tmp_path / "clip", [unit(1)], texts=[unit(1, seed=1)], columns=[{"caption": ["red"]}])
    import_vectors(folder, tmp_path / "texts", modality="text")
    import_vectors(folder, tmp_path / "images", modality="image")
    (text,), (image,) = held(tmp_path / "texts").values(), held(tmp_path / "images").values()
    assert text["image"] is None and len(text["texts"]) == 1
    assert image["image"] is not None and not image["texts"]


@pytest.mark.parametrize("break_it", ["rows", "missing", "dims"])
def test_files_that_do_not_fit_are_refused(tmp_path, break_it):
    """Rows that cannot be side by side: nobody guesses which belong together."""
    folder = clip_folder(
        tmp_path / "clip",
        [unit(3), unit(3)],
        texts=[unit(3), unit(3)],
        columns=[{"id": list("abc")}, {"id": list("def")}],
    )
    if break_it == "rows":
        npy(folder / "text_emb" / "text_emb_1.npy", unit(2))
    elif break_it == "missing":
        (folder / "metadata" / "metadata_0.parquet").unlink()
    else:
        npy(folder / "text_emb" / "text_emb_1.npy", unit(3, d=4))
    with pytest.raises(InputError, match="clip"):
        import_vectors(folder, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_shard_that_changes_leaves_the_others_alone(tmp_path):
    """Names go by number and row, so a new shard at the end adds its rows and touches no others."""
    folder = clip_folder(tmp_path / "clip", [unit(4), unit(4, seed=1)])
    import_vectors(folder, tmp_path / "i")
    clip_folder(folder, [unit(4), unit(3, seed=1), unit(2, seed=2)])
    report = import_vectors(folder, tmp_path / "i")
    assert (report.added, report.changed, report.unchanged, report.removed) == (2, 0, 7, 1)
    assert list(pictures(tmp_path / "i"))[-2:] == ["2:0", "2:1"]

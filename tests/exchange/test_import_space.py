"""Whose vectors they are: what an index records, and what can then be asked of it."""

import numpy as np
import pyarrow as pa
import pytest
from exchange_kit import npy, pictures, unit
from PIL import Image
from pyarrow import parquet

from mmsearch.builder import build
from mmsearch.encoder import Encoder
from mmsearch.errors import IndexMismatchError, ModelError, UsageError
from mmsearch.exchange import import_vectors
from mmsearch.reshard import merge, split
from mmsearch.searcher import Searcher
from mmsearch.store import Batch, IndexStore
from mmsearch.store.creation import first_facts
from mmsearch.testing import COLORS, ColorEncoder


@pytest.fixture
def colours(tmp_path):
    """The vectors that `ColorEncoder` gives eight colours, as a file."""
    return npy(tmp_path / "colours.npy", ColorEncoder().encode_texts(list(COLORS)).astype(np.float16))


def test_vectors_of_a_model_are_found_by_its_words(tmp_path, colours):
    """With the model named, texts are encoded by it: "blue" finds the vector that the model gave blue."""
    import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    with Searcher.open(tmp_path / "i", encoder=ColorEncoder()) as searcher:
        hits = searcher.search_text("a blue car", k=1)
    assert [hit.item.id for hit in hits] == [str(list(COLORS).index("blue"))]
    with IndexStore.open(str(tmp_path / "i")) as store:
        assert store.model == ColorEncoder().identity and store.settings["model"] == "colors"


def test_a_model_directory_is_enough_to_search_with(tmp_path, plain_checkpoint):
    """`--model DIR`: the index remembers it, and opens it by itself."""
    encoder = Encoder.load(plain_checkpoint.directory)
    rows = encoder.encode_texts(["a dog", "a cat"])
    import_vectors(npy(tmp_path / "x.npy", rows), tmp_path / "i", model=plain_checkpoint.directory)
    with Searcher.open(tmp_path / "i") as searcher:
        assert searcher.search_text("a cat", k=1)[0].item.id == "1"


def test_pictures_can_be_indexed_beside_imported_vectors(tmp_path, colours):
    """An index of a named model stays one that `index` brings up to date; imported items are not taken for gone."""
    import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "red.png")
    report = build([tmp_path / "photos"], tmp_path / "i", encoder=ColorEncoder(), workers=1)
    assert (report.added, report.removed) == (1, 0) and len(pictures(tmp_path / "i")) == 9
    assert import_vectors(colours, tmp_path / "i", encoder=ColorEncoder()).rows == 0, "nor is the import forgotten"


def test_vectors_of_nobody_in_particular_are_searched_by_vectors_only(tmp_path, colours):
    """Without a model a vector finds its neighbours; words, pictures and `index` get one line that says what to do."""
    import_vectors(colours, tmp_path / "i")
    with Searcher.open(tmp_path / "i") as searcher:
        assert searcher.search_vector(ColorEncoder().encode_texts(["green"]), k=1)[0].item.id == "1"
        for ask in (
            lambda: searcher.search_text("green"),
            lambda: searcher.search_image(np.zeros((4, 4, 3), np.uint8)),
        ):
            with pytest.raises(ModelError, match=r"without one.*mmsearch import PATH --out INDEX --model NAME"):
                ask()
    with pytest.raises(ModelError, match="imported without one"):
        build([tmp_path], tmp_path / "i")


def test_the_model_can_be_named_later(tmp_path, colours):
    """The same import with --model says whose vectors they are; no row is written, and words work from then on."""
    import_vectors(colours, tmp_path / "i")
    before = (tmp_path / "i" / "vectors.f16").stat().st_mtime_ns
    report = import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    assert (report.rows, report.unchanged) == (0, 8)
    assert (tmp_path / "i" / "vectors.f16").stat().st_mtime_ns == before
    with Searcher.open(tmp_path / "i", encoder=ColorEncoder()) as searcher:
        assert searcher.search_text("green", k=1)[0].item.id == "1"
        assert IndexStore.open(str(tmp_path / "i")).verify() == []


def test_spaces_of_one_name_can_be_joined_and_others_not(tmp_path, colours):
    """Vectors of a model that is not known here: its name decides what belongs together."""
    other = npy(tmp_path / "other.npy", unit(3))
    import_vectors(colours, tmp_path / "i", space="lab-7")
    assert import_vectors(other, tmp_path / "i", space="lab-7").added == 3
    assert import_vectors(npy(tmp_path / "more.npy", unit(2)), tmp_path / "i").added == 2, "the index's own, if unsaid"
    with pytest.raises(IndexMismatchError, match="expected vectors of imported"):
        import_vectors(other, tmp_path / "i", space="lab-8")


def test_vectors_of_another_model_are_refused(tmp_path, colours):
    """An index of one model takes no rows of another, whatever their dimension."""
    import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    with pytest.raises(IndexMismatchError, match=r"colors.*other"):
        import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", encoder=ColorEncoder(name="other"))
    with pytest.raises(IndexMismatchError, match="d = 8, as those of colors are, got d = 4"):
        import_vectors(npy(tmp_path / "x.npy", unit(2, d=4)), tmp_path / "j", encoder=ColorEncoder())
    assert not (tmp_path / "j").exists()


def test_a_space_has_a_name_that_can_be_shown(tmp_path, colours):
    """And a model is a space already."""
    for name in ("", " ", "two\nlines", "x" * 300):
        with pytest.raises(UsageError, match="--space"):
            import_vectors(colours, tmp_path / "i", space=name)
    with pytest.raises(UsageError, match="a model or a space"):
        import_vectors(colours, tmp_path / "i", space="mine", encoder=ColorEncoder())


def test_an_index_that_was_given_another_model_takes_no_vectors_of_the_old_one(tmp_path, colours):
    """After `reindex` nobody knows whose a changed source is: it is refused until the user says so."""
    import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    other = ColorEncoder(name="other")
    with IndexStore.open(str(tmp_path / "i"), write=True) as store:
        facts = first_facts(other.identity, other.preprocessing, {"model": "other"})
        store.commit(Batch(facts={name: facts[name] for name in ("model", "preprocessing", "settings")}))
        store.finish()
    assert import_vectors(colours, tmp_path / "i").rows == 0, "what did not change is left alone"
    npy(colours, unit(8))
    with pytest.raises(IndexMismatchError, match="imported when it had another model"):
        import_vectors(colours, tmp_path / "i")
    assert import_vectors(colours, tmp_path / "i", encoder=other).changed == 8


def test_one_table_can_be_imported_and_indexed_into_one_index(tmp_path):
    """Its vectors and its pictures are different items: neither run takes the other's for gone, or for its own."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    vectors = pa.array(ColorEncoder().encode_texts(["blue"]).tolist())
    parquet.write_table(pa.table({"image_path": ["red.png"], "vector": vectors}), tmp_path / "t.parquet")
    for _ in range(2):
        import_vectors(tmp_path / "t.parquet", tmp_path / "i", encoder=ColorEncoder())
        report = build([tmp_path / "t.parquet"], tmp_path / "i", encoder=ColorEncoder(), workers=1)
        assert report.removed == 0 and len(pictures(tmp_path / "i")) == 2
    with Searcher.open(tmp_path / "i", encoder=ColorEncoder()) as searcher:
        assert [hit.score > 0.9 for hit in (searcher.search_text(c, k=1)[0] for c in ("red", "blue"))] == [True, True]


@pytest.mark.parametrize("copied", ["merge", "split"])
def test_whose_vectors_a_source_holds_is_known_after_a_copy_too(tmp_path, colours, copied):
    """An index that was given another model and then merged or split takes no vectors of the old one."""
    import_vectors(colours, tmp_path / "i", encoder=ColorEncoder())
    with IndexStore.open(str(tmp_path / "i"), write=True) as store:
        other = ColorEncoder(name="other")
        facts = first_facts(other.identity, other.preprocessing, {"model": "other"})
        store.commit(Batch(facts={name: facts[name] for name in ("model", "preprocessing", "settings")}))
        store.finish()
    out = tmp_path / "out"
    made = merge([tmp_path / "i"], out, encoder=other) if copied == "merge" else split(tmp_path / "i", out, shards=2)
    np.save(colours, np.load(colours)[::-1])
    for index in made.indexes:
        with pytest.raises(IndexMismatchError, match="another model"):
            import_vectors(colours, index)

"""The searchable files of an index through its life: chosen, tuned, grown, left, retrained, and never in the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent / "store"), str(Path(__file__).parent / "index")]
from index_kit import Told, clustered, off  # noqa: E402
from store_kit import source  # noqa: E402

from mmsearch.derive import IndexWish, derive, made_texts, memory_of, tune_index  # noqa: E402
from mmsearch.derived_maker import IndexMaker  # noqa: E402
from mmsearch.errors import IndexMismatchError, InputError, UsageError  # noqa: E402
from mmsearch.index.derived import neighbours  # noqa: E402
from mmsearch.index.exact_answers import overlap  # noqa: E402
from mmsearch.index.layouts import layout_of  # noqa: E402
from mmsearch.store import Batch, IndexStore, Upsert  # noqa: E402
from mmsearch.types import Modality, ModelIdentity, Preprocessing  # noqa: E402

D = 32
PREPROCESSING = Preprocessing(size=16)
MODEL = ModelIdentity("tiny", weights="w1", preprocessing=PREPROCESSING.digest(), dim=D)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine FAISS's barriers cost more than a second thread brings."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


class Texts:
    """An encoder as far as tuning needs one: a text's row depends on its length only."""

    identity = MODEL

    def __init__(self):
        self.asked = []

    def encode_texts(self, texts):
        self.asked += texts
        return off(len(texts), D, seed=7)


def put(store, n, *, seed=0, first=0, captions=0):
    """n pictures, the first few with a caption each."""
    rows, texts = clustered(n, D, seed=seed), off(captions, D, seed=seed + 1)
    batch = Batch()
    for i, row in enumerate(rows):
        text = {"text_vectors": texts[i : i + 1]} if i < captions else {}
        named = source(f"{first + i:06}", captions=["c"] if text else [])
        batch.upserts.append(Upsert(named, image_vector=row, **text))
    store.commit(batch)


@pytest.fixture
def path(tmp_path):
    """An index of 3,000 pictures, 100 of them with a caption."""
    path = str(tmp_path / "index")
    with IndexStore.create(path, model=MODEL, preprocessing=PREPROCESSING) as store:
        put(store, 3000, captions=100)
    return path


def facts(path, modality="image"):
    """What the manifest records of the file of a modality."""
    derived = json.loads(Path(path, "manifest.json").read_text())["derived"].get(modality)
    return derived and {**derived, **derived["facts"]}


def generation(path):
    with IndexStore.open(path) as store:
        return store.generation


def brought(path, told=None, **wish):
    """Bring the files up to date; what is recorded of the pictures' one."""
    options = {name: wish.pop(name) for name in ("anew", "encoder") if name in wish}
    with IndexStore.open(path, write=True) as store:
        derive(store, wish=IndexWish(**wish), told=told, **options)
    return facts(path)


def answers(path, queries, *, k=10):
    """(kind, names) by the index as it is."""
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        index = neighbours(snapshot, Modality.IMAGE, small=0, few=0)
        rows = index.search(queries, k)[1]
        return index.kind, [[one.item.id for one in snapshot.locate(line)] for line in rows]


def agreement(path, queries=None):
    """Overlap of the index's answers with those of exact search over the same snapshot."""
    queries = off(60, D, seed=9) if queries is None else queries
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        alive = snapshot.alive_rows(Modality.IMAGE)
        order = np.argsort(-(queries @ snapshot.vectors(alive).T), axis=1, kind="stable")[:, :10]
        return overlap(neighbours(snapshot, Modality.IMAGE, few=0).search(queries, 10)[1], alive[order])


def test_a_small_index_is_exact_unless_asked(path):
    """Auto decides; a kind that was asked for once stays."""
    assert brought(path)["kind"] == "faiss-flat"
    assert brought(path, kind="ivf-pq-fs")["kind"] == "ivf-pq-fs"
    assert brought(path)["kind"] == "ivf-pq-fs"
    assert brought(path, kind="exact") is None
    assert brought(path, kind="auto")["kind"] == "faiss-flat"
    with IndexStore.open(path) as store:
        assert "index" not in store.settings


@pytest.mark.parametrize("kind", ["ivf-pq-fs", "hnsw-sq8", "ivf-flat", "IVF16,SQ8"])
def test_it_answers_with_the_overlap_it_records(path, kind):
    """On captions it was not tuned on, opened anew, over the whole way from disk."""
    recorded = brought(path, kind=kind)
    assert answers(path, off(3, D))[0] == recorded["kind"] == kind
    assert agreement(path) >= 0.9
    assert recorded["tuned"]["queries"]["text"] == {"count": 100, "source": "captions of the collection"}
    assert set(recorded["tuned"]["overlap"]) == {"text", "image"}
    with IndexStore.open(path) as store:
        assert store.verify() == []
        assert store.info()["derived"]["image"]["tuned"] == recorded["tuned"]


def test_new_rows_are_found_at_once_and_added_when_they_are_many(path):
    """A few are searched beside the file, which stays as it is; many make it grow, without learning anew."""
    before = brought(path, kind="ivf-pq-fs")
    with IndexStore.open(path, write=True) as store:
        put(store, 40, seed=1, first=3000)
        derive(store)
    assert facts(path)["xxh3"] == before["xxh3"]
    assert agreement(path, clustered(40, D, seed=1)) >= 0.9
    told = Told()
    with IndexStore.open(path, write=True) as store:
        put(store, 500, seed=2, first=3040)
        derive(store, told=told)
    after = facts(path)
    assert (after["count"], after["trained_for"]) == (3540, 3000)
    assert answers(path, off(3, D))[0] == "ivf-pq-fs"
    assert not any("training" in part for part in told.parts)
    assert agreement(path) >= 0.9


def test_it_learns_anew_when_it_has_outgrown_what_it_learned(path):
    """Four times the rows; and parameters are searched for again at half as many more."""
    brought(path, kind="ivf-flat")
    with IndexStore.open(path, write=True) as store:
        put(store, 1600, seed=3, first=3000)
        derive(store)
    assert facts(path)["trained_for"] == 3000
    assert facts(path)["tuned"]["rows"] == 4600
    with IndexStore.open(path, write=True) as store:
        put(store, 8000, seed=4, first=4600)
        derive(store)
    assert facts(path)["trained_for"] == 12600
    assert agreement(path) >= 0.9


def test_it_learns_anew_when_its_lists_have_become_uneven(path):
    """Rows of another sort that all fall into one list."""
    brought(path, kind="ivf-flat")
    told = Told()
    with IndexStore.open(path, write=True) as store:
        batch = Batch()
        for i in range(2500):
            row = clustered(1, D, seed=5)[0] + 0.01 * np.random.default_rng(i).standard_normal(D)
            batch.upserts.append(Upsert(source(f"x{i}"), image_vector=(row / np.linalg.norm(row)).astype(np.float32)))
        store.commit(batch)
        derive(store, told=told)
    assert facts(path)["trained_for"] == 5500
    assert any("uneven" in note for note in told.notes)


def test_removed_items_never_come_back_though_the_file_has_them(path):
    """Tombstones work inside the search, also beyond rows of captions; the file is not written again for them."""
    with IndexStore.open(path, write=True) as store:
        put(store, 1000, seed=2, first=3000)
    before = brought(path, kind="ivf-pq-fs")
    queries = off(20, D, seed=9)
    best = {names[0] for names in answers(path, queries)[1]}
    with IndexStore.open(path, write=True) as store, store.snapshot() as snapshot:
        store.commit(Batch(removals=[known.item for known in snapshot.items() if known.id in best]))
        derive(store)
    assert facts(path)["xxh3"] == before["xxh3"]
    assert not best & {name for names in answers(path, queries)[1] for name in names}
    assert agreement(path) >= 0.9


def test_only_allowed_rows_are_found_wherever_they_lie(path):
    """Row numbers are those of the store: captions lie between the pictures."""
    with IndexStore.open(path, write=True) as store:
        put(store, 6000, seed=2, first=3000)
    brought(path, kind="ivf-pq-fs")
    queries = off(20, D, seed=9)
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        allowed = snapshot.alive_rows(Modality.IMAGE)[-5000:]
        order = np.argsort(-(queries @ snapshot.vectors(allowed).T), axis=1, kind="stable")[:, :10]
        found = neighbours(snapshot, Modality.IMAGE, few=0).search(queries, 10, allowed=allowed)[1]
        assert np.isin(found, allowed).all()
        assert overlap(found, allowed[order]) >= 0.9


def test_after_compaction_the_file_is_of_the_new_rows(path):
    """Row numbers have changed; old ones would be wrong answers."""
    brought(path, kind="ivf-pq-fs")
    with IndexStore.open(path, write=True) as store, store.snapshot() as snapshot:
        store.commit(Batch(removals=[known.item for known in snapshot.items()][:1500]))
        assert store.compact()
        derive(store)
    assert facts(path)["count"] == 1500
    assert agreement(path) >= 0.8  # the captions went with their pictures: it was tuned on pictures alone


@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_a_file_that_is_damaged_or_gone_costs_no_answer(path, harm):
    """Searched exactly meanwhile; written anew next time."""
    brought(path, kind="ivf-pq-fs")
    file = Path(path, facts(path)["file"])
    if harm == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(bytes(data))
    kind, _ = answers(path, off(3, D))
    assert kind == "exact"
    assert agreement(path) == 1.0
    brought(path)
    assert answers(path, off(3, D))[0] == "ivf-pq-fs"


def test_another_overlap_tunes_the_same_file_again(path):
    """Nothing is trained or written for it but the manifest."""
    before = brought(path, kind="ivf-flat", overlap=0.8)
    seen = generation(path)
    brought(path)
    assert generation(path) == seen
    after = brought(path, overlap=0.99)
    assert after["xxh3"] == before["xxh3"]
    assert after["tuned"]["parameters"]["probes"] > before["tuned"]["parameters"]["probes"]
    assert generation(path) > seen
    assert brought(path)["tuned"] == after["tuned"]


def test_queries_come_from_the_file_that_is_named(path, tmp_path):
    """Encoded by the model, whatever captions there are."""
    (tmp_path / "queries.txt").write_text("a dog\n\na cat on a mat\n" * 40)
    encoder = Texts()
    tuned = brought(path, kind="ivf-flat", queries=tmp_path / "queries.txt", encoder=lambda: encoder)["tuned"]
    assert set(encoder.asked) == {"a dog", "a cat on a mat"}
    assert tuned["queries"]["text"] == {"count": 80, "source": "a file of 80 texts"}


def test_without_captions_texts_are_made(tmp_path):
    """Of class names; without a model pictures alone have to do."""
    with IndexStore.create(str(tmp_path / "i"), model=MODEL, preprocessing=PREPROCESSING) as store:
        put(store, 2000)
        encoder = Texts()
        derive(store, wish=IndexWish(kind="ivf-flat"), encoder=lambda: encoder)
        assert facts(store.path)["tuned"]["queries"]["text"]["source"] == "made of class names"
        assert encoder.asked == made_texts(512)
        derive(store, anew=True)
        assert set(facts(store.path)["tuned"]["queries"]) == {"image"}


def test_a_searcher_sees_a_new_file_when_it_asks(path):
    """Tuning alone changes no item, and is a generation of its own all the same."""
    brought(path)
    with IndexStore.open(path) as reader:
        before = reader.generation
        brought(path, kind="ivf-flat")
        brought(path, anew=True)
        assert reader.generation > before
        with reader.snapshot() as snapshot:
            assert neighbours(snapshot, Modality.IMAGE).kind == "ivf-flat"


def test_what_cannot_be_is_refused_before_anything_is_changed(path, tmp_path):
    """Unknown kinds, overlaps, budgets, missing files: one line, and the index as it was."""
    before = brought(path)
    for wish, match in [
        ({"kind": "fast"}, "ivf-pq-fs"),
        ({"overlap": 1.5}, "0.5 to 1"),
        ({"memory": "lots"}, "4G"),
        ({"memory": "-3G"}, "4G"),
    ]:
        with pytest.raises(UsageError, match=match):
            tune_index(path, **wish)
    with pytest.raises(InputError, match=r"no\.txt"):
        tune_index(path, queries=tmp_path / "no.txt")
    with pytest.raises(UsageError, match="bytes for 3,000 rows as hnsw"):
        tune_index(path, kind="hnsw", memory="1K")
    assert facts(path) == before
    assert agreement(path) == 1.0
    with IndexStore.open(path) as store:
        assert "index" not in store.settings
    assert brought(path)["kind"] == "faiss-flat"


def test_other_queries_tune_again_and_nothing_else(path, tmp_path):
    """The file stays as it is."""
    before = brought(path, kind="ivf-pq-fs")
    (tmp_path / "queries.txt").write_text("a dog\n" * 40)
    told = Told()
    after = brought(path, queries=tmp_path / "queries.txt", encoder=Texts, told=told)
    assert after["xxh3"] == before["xxh3"]
    assert after["tuned"]["queries"]["text"]["source"] == "a file of 40 texts"
    assert not any("training" in part or "adding" in part for part in told.parts)


def test_a_model_of_another_space_makes_no_queries(tmp_path):
    """Its texts would be compared with rows they have nothing to do with; the user's own are refused in one line."""
    (tmp_path / "queries.txt").write_text("a dog\n" * 40)

    class Other(Texts):
        identity = ModelIdentity("other", weights="w2", preprocessing=PREPROCESSING.digest(), dim=D)

    with IndexStore.create(str(tmp_path / "i"), model=MODEL, preprocessing=PREPROCESSING) as store:
        put(store, 2000)
        derive(store, wish=IndexWish(kind="ivf-flat"), encoder=Other)
        assert set(facts(store.path)["tuned"]["queries"]) == {"image"}
        with pytest.raises(IndexMismatchError, match="other"):
            derive(store, wish=IndexWish(queries=tmp_path / "queries.txt"), encoder=Other)


def test_what_one_modality_cannot_do_costs_the_other_nothing(path):
    """Captions too few for the kind are searched exactly; the pictures' file is there and used."""
    told = Told()
    image = brought(path, kind="IVF128,SQ8", told=told)
    assert (image["kind"], facts(path, "text")["kind"]) == ("IVF128,SQ8", "faiss-flat")
    assert any("too few" in note for note in told.notes)
    assert agreement(path) >= 0.9


def test_a_budget_holds_when_the_index_grows(path):
    """What no longer fits is said with the bytes it needs; until then the index answers as before."""
    budget = int(layout_of("ivf-pq-fs", n=3000, d=D).row_bytes * 3000 * 1.05)
    with IndexStore.open(path, write=True) as store:
        derive(store, wish=IndexWish(kind="ivf-pq-fs", memory=budget))
        put(store, 600, seed=2, first=3000)
        with pytest.raises(UsageError, match="bytes for 3,600 rows as ivf-pq-fs"):
            derive(store)
        assert agreement(path) >= 0.8
        derive(store, wish=IndexWish(memory="none"))
    assert facts(path)["count"] == 3600


def test_it_learns_from_the_living_when_most_have_gone(path):
    """A sample of rows that are still there, however few they are among the dead."""
    with IndexStore.open(path, write=True) as store, store.snapshot() as snapshot:
        store.commit(Batch(removals=[known.item for known in snapshot.items()][:2200]))
        derive(store, wish=IndexWish(kind="ivf-flat"))
    assert facts(path)["kind"] == "ivf-flat"
    assert agreement(path) >= 0.75  # tuned on pictures alone, asked with texts


def test_tuning_says_what_was_made_and_what_it_finds(path):
    """By modality, as JSON values."""
    said = tune_index(path, kind="ivf-flat", encoder=Texts())
    assert set(said) == {"image", "text"}
    assert said["image"]["kind"] == "ivf-flat"
    assert said["image"]["tuned"]["overlap"]["text"] > 0.8
    assert said["text"]["kind"] == "faiss-flat"
    json.dumps(said)


def test_memory_is_read_as_people_write_it():
    """Known values."""
    assert (memory_of("1K"), memory_of("4G"), memory_of("1.5 GiB"), memory_of(77)) == (1024, 4 << 30, 3 << 29, 77)
    assert memory_of("none") is None


def test_a_long_build_says_beforehand_what_it_takes(path):
    """Rows, memory, disk, minutes."""
    told = Told()
    with IndexStore.open(path, write=True) as store:
        maker = IndexMaker("ivf-flat", told=told, told_from_s=0.0)
        store.update_derived(maker)
    assert any("3,000 image rows as ivf-flat" in note and "MB in memory" in note for note in told.notes)

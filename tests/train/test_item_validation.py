"""How well an item head does on held-out pairs: who is asked for, in which forms, and that the report says so."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from train_kit import PAIRS, passes, picture, settings, table, tokens

from mmsearch.cli.app import main
from mmsearch.cli.library import Library
from mmsearch.errors import ModelError
from mmsearch.testing import COLORS, TINY_CONFIG, tiny_checkpoint, tiny_dual_encoder
from mmsearch.towers.checkpoint import load_dual_encoder
from mmsearch.towers.config import ITEM_FUSIONS, ItemConfig
from mmsearch.towers.item import build_item_fusion
from mmsearch.train.bench import Bench, Silent
from mmsearch.train.item_validation import item_forms, item_hits, item_texts
from mmsearch.train.run import TrainReport, _stored, train
from mmsearch.train.setup import Beginning, begin
from mmsearch.train.validation import Validation
from mmsearch.types import Pair

FORMS = ["picture", "text", "both", "mixed"]
NONE, ALL = {"hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}, {"hit@1": 1.0, "hit@5": 1.0, "hit@10": 1.0}


# Who is asked for


def photo(*captions, group="g") -> Pair:
    return Pair("a.png", captions, group)


def test_the_items_text_is_the_first_caption_in_other_words():
    """One caption, one in two spellings, or one beside no words: such a pair is left out."""
    pairs = [photo("a dog", "a hound", "a pet", group="1"), photo("a cat", group="2"),
             photo("a cow", "A  cow.", group="3"), photo("a pig", "...", group="4"),
             photo("a car", "A car!", "a van", group="5")]  # fmt: skip
    assert item_texts(pairs) == {0: 1, 4: 2}


def test_the_query_of_a_group_mate_is_nobodys_text():
    """It would find its own group by its own words; in another group it is a text like any other."""
    assert item_texts([photo("a", "b", "c"), photo("b", "d")]) == {0: 2, 1: 1}
    assert item_texts([photo("a", "b"), photo("B", "a")]) == {}
    assert item_texts([photo("a", "b", "c"), photo("b", "d", group="other")]) == {0: 1, 1: 1}
    assert item_texts([photo("a", "b"), photo("b")]) == {0: 1}  # who is left out asks for nothing


def test_no_query_finds_its_group_by_its_own_words():
    """Two thousand draws of few words, against a plain look at all queries of the group."""
    draw, words = np.random.default_rng(0), ["a", "B", "b", "c.", "C", "d", "-"]
    for _ in range(500):
        pairs = [photo(*draw.choice(words, draw.integers(1, 4)), group=str(draw.integers(2))) for _ in range(4)]
        found = item_texts(pairs)
        for position, number in found.items():
            mates = [pairs[other] for other in found if pairs[other].group == pairs[position].group]
            assert plain(pairs[position].captions[number]) not in {plain(mate.captions[0]) for mate in mates}


def plain(caption: str) -> str:
    return caption.lower().strip(".-")


# The four forms


def unit(count, *, seed, dim=8):
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=draw), dim=-1)


@pytest.mark.parametrize("kind", ITEM_FUSIONS)
def test_the_forms_have_known_values_before_the_head_has_learned(kind):
    """The picture, the text, their normalised sum; and in turn one of each."""
    images, texts = unit(5, seed=1), unit(5, seed=2)
    found = item_forms(build_item_fusion(ItemConfig(kind), dim=8).eval(), images, texts)
    both = normalize(images + texts, dim=-1)
    mixed = torch.stack([images[0], texts[1], both[2], images[3], texts[4]])
    assert list(found) == FORMS
    for form, wanted in zip(FORMS, (images, texts, both, mixed), strict=True):
        assert torch.allclose(found[form], wanted, atol=1e-6), form


def test_only_the_pictures_do_without_the_head():
    """What an index without a head would hold, beside what one with fused item vectors holds."""
    images, texts, made = unit(4, seed=1), unit(4, seed=2), unit(4, seed=3)
    found = item_forms(lambda *sides, **masks: made, images, texts)
    assert torch.equal(found["picture"], images)
    assert all(torch.equal(found[form], made) for form in FORMS[1:])


def test_hits_have_known_values_at_their_ends():
    """Each its own item; each another's; twelve that nobody can tell apart, who do not count as found."""
    eye, own = np.eye(12, dtype=np.float32), np.arange(12)
    alike = np.repeat(eye[:1], 12, axis=0)
    found = item_hits(eye, {"a": eye, "b": np.roll(eye, 1, axis=0), "c": alike}, groups=own)
    assert found == {"a": ALL, "b": NONE, "c": NONE}


def test_an_item_of_the_same_group_is_the_right_one():
    """Two pairs of one group whose items changed places."""
    eye, turned = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]
    assert item_hits(eye, {"a": turned}, groups=np.array([0, 0, 1, 2]))["a"]["hit@1"] == 1.0
    assert item_hits(eye, {"a": turned}, groups=np.arange(4))["a"]["hit@1"] == 0.5


# On held-out pairs


def with_head(kind="gated", *, seed=0, **item):
    """A tiny model whose item head is not at its start."""
    return tiny_dual_encoder({**TINY_CONFIG, "item": {"kind": kind, **item}}, seed=seed)


def at_start(model):
    """The same with the head as it is before training."""
    model.item = build_item_fusion(ItemConfig("gated"), dim=8).eval()
    return model


def validation_of(pairs, one) -> Validation:
    return Validation(
        pairs, passes=one, tokens=tokens, preprocessing=one.model.config.preprocessing, workers=0,
        on_skip=lambda skipped: None,
    )  # fmt: skip


def hits_on(pairs, model):
    return validation_of(pairs, passes(model)).evaluate_items()


def colours(folder, captions, *, same=False) -> list[Pair]:
    """A picture of each colour (or all white) with what `captions` says for it."""
    made = []
    for number, colour in enumerate(COLORS):
        path = picture(folder / f"{number}.png", "white" if same else colour, "black", seed=0 if same else number)
        made.append(Pair(path, captions(number, colour), str(number)))
    return made


def test_texts_that_sound_alike_to_the_model_are_found_and_pictures_all_alike_are_not(tmp_path):
    """Query and text differ in words that the tokeniser does not know, so their rows are equal; eight pictures that
    are the same tie, and a tie counts for the others.
    """
    pairs = colours(tmp_path, lambda _, colour: (f"a {colour} zeppelin", f"a {colour} hovercraft"), same=True)
    found = hits_on(pairs, at_start(with_head()))
    assert list(found) == FORMS
    assert found["text"] == ALL
    assert found["picture"] == {**NONE, "hit@10": 1.0}


def test_pairs_without_another_caption_are_in_no_gallery(tmp_path):
    """Five of eight pictures that are all alike are left: the rank that a tie gives is five, not eight."""
    pairs = colours(
        tmp_path, lambda i, colour: (f"a {colour} car", f"the {colour} dog")[: 1 if i < 3 else 2], same=True
    )
    found = hits_on(pairs, with_head())
    assert found["picture"] == {"hit@1": 0.0, "hit@5": 1.0, "hit@10": 1.0}


def test_without_a_head_or_two_items_there_is_nothing_to_measure(tmp_path):
    """A model of two towers; pairs with one caption each, or one with two, for which no picture is read; a second item
    that cannot be read.
    """

    def some(count):
        return colours(tmp_path, lambda i, colour: (f"a {colour} car", f"the {colour} dog")[: 2 if i < count else 1])

    assert hits_on(some(8), tiny_dual_encoder()) is None
    assert [hits_on([replace(p, image="gone") for p in some(n)], with_head()) for n in (0, 1)] == [None, None]
    assert hits_on(some(2), with_head()) is not None
    pairs = some(2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert hits_on(pairs, with_head()) is None


def by_hand(model, pairs, chosen):
    """The same with the model's own three methods, a pair at a time, and ranks that are counted."""

    def row(pair, number):
        return model.encode_texts(*tokens([pair.captions[number]]))

    def image(pair):
        size = model.config.preprocessing.size
        squashed = np.array(Image.open(pair.image).resize((size, size), Image.Resampling.BICUBIC))
        return model.encode_images(torch.from_numpy(squashed)[None])

    def item(turn, pair, number):
        has = {"has_image": torch.tensor([turn != 1]), "has_text": torch.tensor([turn != 0])}
        return model.item_rows(image(pair), row(pair, number), **has)

    with torch.no_grad():
        kept = [(pairs[position], number) for position, number in chosen.items()]
        queries = torch.cat([row(pair, 0) for pair, _ in kept])
        galleries = {"picture": [image(pair) for pair, _ in kept]}
        for form, turns in (("text", [1]), ("both", [2]), ("mixed", [0, 1, 2])):
            galleries[form] = [item(turns[i % len(turns)], *one) for i, one in enumerate(kept)]
    mates = np.array([[one.group == other.group for other, _ in kept] for one, _ in kept])
    found = {}
    for form, rows in galleries.items():
        cosines = (queries @ torch.cat(rows).T).numpy()
        best = np.where(mates, cosines, -np.inf).max(axis=1, keepdims=True)
        ranks = 1 + (~mates & (cosines >= best - 1e-6)).sum(axis=1)
        found[form] = {f"hit@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return found


def twenty(folder) -> list[Pair]:
    """The pair at 1 has one caption, the others a third one in other words; those at 4 and 6 are of one group."""
    made = []
    for i, (inner, outer) in enumerate(PAIRS[::2][:20]):
        texts = (f"a {inner} car", f"A {inner} car", f"the {inner} dog on {outer}")[: 1 if i == 1 else 3]
        path = picture(folder / f"{i}.png", inner, outer, seed=i)
        made.append(Pair(path, texts, "both" if i in (4, 6) else str(i)))
    return made


@pytest.mark.parametrize("kind", ["gated", "concat"])
def test_it_is_what_the_models_own_methods_give(kind, tmp_path):
    """Two of one group, one left out, one whose picture cannot be read; a head with dropout that comes in training mode
    and leaves in it.
    """
    pairs = twenty(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    model = with_head(kind, **({"dropout": 0.9} if kind == "concat" else {}))
    wanted = by_hand(model, pairs, {i: 2 for i in range(20) if i not in (1, 3)})
    assert len({json.dumps(shares) for shares in wanted.values()}) == 4  # each form has figures of its own
    model.train()
    assert hits_on(pairs, model) == wanted
    assert all(module.training for module in model.modules())


def test_a_head_that_gives_no_numbers_is_an_error(tmp_path):
    """Not a rank of one: nothing scores higher than what is no number."""
    model = with_head("gated")
    torch.nn.init.constant_(model.item.gate.bias, float("nan"))
    with pytest.raises(ModelError, match="rows of the held-out items"):
        hits_on(colours(tmp_path, lambda _, colour: (f"a {colour} car", f"the {colour} dog")), model)


# In a run


def held_out(out) -> list[Pair]:
    lines = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    return [Pair(line["image"], tuple(line["captions"]), line["group"]) for line in lines]


def test_what_is_measured_is_the_checkpoint_on_disk(tmp_path):
    """And not the model in memory, from which half precision may differ; here another one lies there."""
    config, pairs = {**TINY_CONFIG, "item": {"kind": "gated"}}, twenty(tmp_path)
    tiny_checkpoint(tmp_path / "o" / "best", config=config, seed=1)
    model, other = with_head(seed=0), load_dual_encoder(tmp_path / "o" / "best")
    one, wanted = passes(model), hits_on(pairs, other)
    assert hits_on(pairs, model) != wanted
    bench = Bench(settings("x.csv"), tmp_path / "o", Silent(), None, None, Beginning(model, "", "tiny", known=True))
    assert _stored(bench, one, validation_of(pairs, one))[1] == wanted


def test_the_report_of_a_run_has_the_items_of_its_checkpoint(tmp_path):
    """Returned and in report.json."""
    start = tiny_checkpoint(tmp_path / "start").directory
    chosen = settings(table(tmp_path / "d", 40, val=24), start={"model": str(start), "item": "gated"},
                      run={"epochs": 1, "lr": 1e-2, "ema": 0.0}, text={"rate": 1.0}, image={"rate": 1.0})  # fmt: skip
    report = train(chosen, tmp_path / "o")
    assert list(report.items) == FORMS
    assert json.loads((tmp_path / "o" / "report.json").read_text())["items"] == report.items
    assert hits_on(held_out(tmp_path / "o"), load_dual_encoder(tmp_path / "o" / "best")) == report.items


@pytest.mark.parametrize(("item", "val"), [("", 4), ("gated", 0)])
def test_the_report_of_a_run_without_a_head_or_held_out_pairs_has_none(item, val, plain_checkpoint, tmp_path):
    """None, and null in report.json."""
    chosen = settings(table(tmp_path / "d", 8, val=val), data={"val_share": 0}, run={"epochs": 1},
                      start={"model": str(plain_checkpoint.directory), "item": item})  # fmt: skip
    assert train(chosen, tmp_path / "o").items is None
    assert json.loads((tmp_path / "o" / "report.json").read_text())["items"] is None


def test_weighing_weights_leaves_the_head_as_it_was_learnt(tmp_path):
    """Towers that are not better go back to what they were; what joins picture and text was never measured."""
    start = tiny_checkpoint(tmp_path / "start").directory
    chosen = settings(table(tmp_path / "d", 8), start={"model": str(start), "item": "gated"},
                      text={"train": "head"}, image={"train": "head"},
                      run={"epochs": 1, "lr": 1.0, "warmup": 0.0, "ema": 0.0, "wise": True})  # fmt: skip
    report = train(chosen, tmp_path / "o")  # a rate that ruins the towers' heads
    assert report.share == 0.0
    first, last = begin(chosen.start, seed=0).model.state_dict(), load_dual_encoder(report.checkpoint).state_dict()
    changed = {name.split(".")[0] for name, value in last.items() if not torch.allclose(value, first[name], atol=1e-3)}
    assert changed == {"item"}


@pytest.mark.parametrize("captions", [1, 2])
def test_an_item_head_without_second_captions_is_warned_about(captions, tmp_path):
    """A photo with one title has no text beside its query: such a head would look trained."""
    start = tiny_checkpoint(tmp_path / "start").directory
    chosen = settings(table(tmp_path / "d", 8, captions=captions), start={"model": str(start), "item": "gated"},
                      run={"epochs": 1})  # fmt: skip
    warned = [one for one in train(chosen, tmp_path / "o").warnings if "learns from pictures alone" in one]
    assert len(warned) == (captions == 1)


# On the command line


class Trained(Library):
    def __init__(self, items) -> None:
        super().__init__()
        self.items = items

    def train(self, pairs, out, **options):
        return TrainReport(out / "best", pairs=90, held_out=10, steps=30, epochs=3, best_epoch=2, share=1.0,
                           comparison=None, items=self.items)  # fmt: skip


def test_the_command_ends_with_a_row_for_each_form(tmp_path, capsysbinary):
    """Between what was done and where it is, in per cent; nothing of it without a head, all of it in --json."""
    items = {form: {"hit@1": i / 8, "hit@5": 0.5, "hit@10": 1.0} for i, form in enumerate(FORMS)}

    def said(items, *more) -> list[str]:
        assert main(["train", "p.csv", "--out", str(tmp_path), *more], library=Trained(items)) == 0
        return os.fsdecode(capsysbinary.readouterr().out).splitlines()

    lines = said(items)
    assert [line.split() for line in lines[1:-2]] == [
        ["text", "->", "item", "hit@1", "hit@5", "hit@10"], ["picture", "0.0", "50.0", "100.0"],
        ["text", "12.5", "50.0", "100.0"], ["both", "25.0", "50.0", "100.0"], ["mixed", "37.5", "50.0", "100.0"],
    ]  # fmt: skip
    assert {len(line) for line in lines[1:-2]} == {38}
    assert lines[-2].startswith("In per cent")
    assert len(said(None)) == 2
    assert json.loads("".join(said(items, "--json")))["items"] == items

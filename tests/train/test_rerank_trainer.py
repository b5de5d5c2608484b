"""What a step of the second stage asks of a batch."""

import numpy as np
import pytest
import torch
from train_kit import passes, pixels, settings, tokens

from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.model import RerankModel
from mmsearch.testing import TINY_RERANK, tiny_dual_encoder
from mmsearch.train.batches import Draw
from mmsearch.train.examples import Examples
from mmsearch.train.feed import Batch
from mmsearch.train.rerank_losses import matrix_loss
from mmsearch.train.rerank_pictures import PictureReader
from mmsearch.train.rerank_trainer import RerankParts, RerankTrainer
from mmsearch.types import Pair

PAIRS = tuple(Pair(f"{i}.png", (f"a red dog {'of ' * i}", f"the blue cat {'on ' * i}"), f"g{i}") for i in range(4))


def trainer_of(tmp_path, *, fusion: str, captions: int, own: bool) -> RerankTrainer:
    torch.manual_seed(0)
    towers = tiny_dual_encoder()
    model = RerankModel(RerankConfig(**{**TINY_RERANK, "fusion": fusion, "own_backbone": own, "dropout": 0.0}), towers)
    rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    reader = PictureReader(model, passes(towers), learning=1 if own else 0, keep=False)
    parts = RerankParts(
        model, reader, feed=None, text_rows=torch.from_numpy(rows), starts=[0, 2, 4, 6], validation=None,
        folder=tmp_path, watcher=None, keep_best=lambda epoch: None, digest="",
    )  # fmt: skip
    chosen = settings("pairs.csv", data={"captions": captions}, rerank={"fusion": fusion}, run={"ema": 0.0})
    return RerankTrainer(chosen, Examples(PAIRS, (1,) * 4, ()), parts)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fusion", ["late-interaction", "cross-attention"])
def test_several_captions_of_a_picture_are_pairs_of_their_own(fusion, own, tmp_path):
    """The same list loss as a batch that holds the picture once for each of its captions, when all are rivals."""
    draws = [Draw(i, 0, i) for i in range(4)]
    captions = [caption for pair in PAIRS for caption in pair.captions]
    owners, images, groups = torch.arange(4).repeat_interleave(2), pixels(4), torch.arange(4)
    each = [Draw(i, number, i) for i in range(4) for number in (0, 1)]
    once = Batch(draws, images, *tokens(captions), groups, captions, owners)
    repeated = Batch(each, images[owners], *tokens(captions), groups[owners], captions, torch.arange(8))
    found = []
    for batch, count in ((once, 2), (repeated, 1)):
        trainer = trainer_of(tmp_path, fusion=fusion, captions=count, own=own)
        torch.manual_seed(1)
        found.append({name: float(value.detach()) for name, value in trainer.losses(batch).items()})
    assert found[0].keys() == found[1].keys() == {"loss", "contrast", "match"}
    assert all(np.isfinite(list(one.values())).all() for one in found)
    if fusion == "late-interaction":  # the other draws its rivals, and no picture twice for a text
        assert found[0]["contrast"] == pytest.approx(found[1]["contrast"], rel=1e-4)


@pytest.mark.parametrize("captions", [1, 2])
def test_the_list_loss_is_that_of_all_pairs_read_one_by_one(captions, tmp_path):
    """Each text against each picture, the dumb way."""
    trainer = trainer_of(tmp_path, fusion="late-interaction", captions=captions, own=False)
    draws = [Draw(i, 0, i) for i in range(4)]
    said = [caption for pair in PAIRS for caption in pair.captions[:captions]]
    owners = torch.arange(4).repeat_interleave(captions)
    batch = Batch(draws, pixels(4), *tokens(said), torch.arange(4), said, owners)
    texts, images, _ = trainer._sides(batch)
    every = torch.arange(len(said))
    logits = torch.stack([trainer.model(texts, images.take(torch.full_like(every, owner))) for owner in owners], dim=1)
    expected = matrix_loss(logits.float(), owners)
    assert float(trainer.losses(batch)["contrast"].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)

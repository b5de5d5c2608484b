"""Frozen stages run once: the two halves are the whole, and kept views are what decoding anew would give."""

import threading

import pytest
import torch
from PIL import Image
from torch import nn

from mmsearch.errors import ResourceError
from mmsearch.towers.base import build_backbone
from mmsearch.towers.config import ImageConfig
from mmsearch.towers.pooling import Pooling
from mmsearch.towers.stages import stages
from mmsearch.train.augment import Augmentation
from mmsearch.train.depthwise import fast_depthwise
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix, KeptViews, view_seed
from mmsearch.types import Pair, Preprocessing

SMALL = Preprocessing(size=16)
SHAPE = (2, 3)


def backbone_of(name: str, *, size: int = 32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    built = build_backbone(ImageConfig(backbone=name), size=size).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that do something
            module.running_mean.uniform_(-0.1, 0.1)
    return built


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name",
    ["timm:test_efficientnet", "timm:tf_efficientnet_lite0", "timm:test_resnet", "timm:test_convnext",
     "torchvision:resnet18", "plain_cnn:4,8,8", "timm:test_vit"],
)  # fmt: skip
@torch.no_grad()
def test_the_two_halves_are_the_backbone_wherever_it_fits(name):
    """Every cut that `fits` gives the backbone's features to rounding; convolutional ones fit everywhere.

    Behind the last stage there is nothing to cut: that is `FrozenBackbone`'s, and stages that features never see
    (a classifier's convolution) lie there.
    """
    size = 160 if name == "timm:test_vit" else 32
    backbone = backbone_of(name, size=size)
    whole = backbone(images(size))
    fitting = []
    for count in range(1, len(stages(backbone))):
        prefix = FrozenPrefix(backbone, count)
        if prefix.fits(images(size)):
            fitting.append(count)
            assert (prefix.rest(prefix.outputs(images(size))) - whole).abs().max() < 1e-4
    if name != "timm:test_vit":
        assert fitting == list(range(1, len(stages(backbone))))
    assert torch.equal(backbone(images(size)), whole)  # every forward is its own again


@torch.no_grad()
def test_what_lies_behind_the_cut_is_not_computed_for_the_outputs():
    """And what lies before it is not computed from there: the halves cost what they say."""
    backbone = backbone_of("plain_cnn:4,8,8")
    ran = []
    for number, stage in enumerate(stages(backbone)):
        own = stage.modules[0].forward
        stage.modules[0].forward = lambda x, n=number, own=own: (ran.append(n), own(x))[1]
    prefix = FrozenPrefix(backbone, 1)
    outputs = prefix.outputs(images())
    assert (ran, tuple(outputs.shape)) == ([0], (2, 4, 16, 16))
    ran.clear()
    prefix.rest(outputs)
    assert ran == [1, 2]


@torch.no_grad()
def test_no_stage_is_no_cut():
    """A backbone that learns from its first stage on has nothing to keep."""
    assert not FrozenPrefix(backbone_of("plain_cnn:4,8"), 0).fits(images())


class Crossed(nn.Module):
    """The second stage needs the picture again."""

    def __init__(self, *, wide: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4 if wide else 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, pixels):
        return self.second(self.first(pixels)[:, :3] + pixels)


@pytest.mark.parametrize("wide", [False, True])
@torch.no_grad()
def test_a_backbone_that_is_no_row_of_stages_does_not_fit(wide):
    """Whether the halves give something else or an error; afterwards it computes as before."""
    torch.manual_seed(0)
    backbone = Crossed(wide=wide).eval()
    before = backbone(images())
    assert not FrozenPrefix(backbone, 1).fits(images())
    assert torch.equal(backbone(images()), before)
    assert not any("forward" in module.__dict__ for module in backbone.modules())


def test_gradients_from_kept_outputs_are_those_of_the_whole():
    """Of the stages that learn, with the fast backward pass around it."""
    backbone = backbone_of("timm:test_efficientnet")
    later = [p for stage in stages(backbone)[2:] for p in stage.parameters()]
    prefix = FrozenPrefix(backbone, 2)
    found = []
    with fast_depthwise(backbone):
        for make in (lambda: backbone(images()), lambda: prefix.rest(prefix.outputs(images()).detach())):
            backbone.zero_grad()
            make().square().sum().backward()
            found.append([p.grad.clone() for p in later])
    for whole, halves in zip(*found, strict=True):
        assert (whole - halves).norm() <= 1e-4 * (1 + whole.norm())


@torch.no_grad()
def test_a_whole_backbone_is_kept_as_pooled_features():
    """(b, w) instead of maps; what pools must not learn."""
    backbone, pooling = backbone_of("plain_cnn:4,8"), Pooling("max")
    whole = FrozenBackbone(backbone, pooling)
    assert whole.fits(images())
    assert torch.equal(whole.outputs(images()), pooling(backbone(images())))
    assert whole.digest() != FrozenBackbone(backbone, Pooling("avg")).digest()


def test_a_digest_changes_with_any_weight_in_front_of_the_cut():
    """Statistics of batch norms too; what learns behind it does not count."""
    backbone = backbone_of("plain_cnn:4,8,8")
    before = FrozenPrefix(backbone, 2).digest()
    with torch.no_grad():
        stages(backbone)[2].modules[0].weight.add_(1)
        assert FrozenPrefix(backbone, 2).digest() == before
        stages(backbone)[1].modules[1].running_mean.add_(1e-3)
    assert FrozenPrefix(backbone, 2).digest() != before


# Kept views


class Source:
    """A feed: a picture's number and seed as its pixels; counts what it was asked, `stop` after so many batches."""

    def __init__(self, *, broken=(), stop: int | None = None) -> None:
        self.broken, self.stop, self.asked, self.closed = set(broken), stop, [], 0

    def __call__(self, plan):
        try:
            for number, draws in enumerate(plan):
                if number == self.stop:
                    raise KeyboardInterrupt
                self.asked += [draw.row for draw in draws]
                kept = [
                    draw for draw in draws if (draw.row, draw.seed) not in self.broken and draw.row not in self.broken
                ]
                yield Batch(kept, torch.tensor([[draw.row, draw.seed] for draw in kept]))
        finally:
            self.closed += 1


class Batch:
    def __init__(self, draws, images) -> None:
        self.draws, self.images = draws, images


def pairs(folder, count: int = 6, *, size: int = 9) -> list[Pair]:
    for i in range(count):
        Image.new("RGB", (size, size), (i, 0, 0)).save(folder / f"{i}.png")
    return [Pair(str(folder / f"{i}.png"), ("a",), str(i)) for i in range(count)]


def views_of(folder, kept, *, views: int = 2, weights: str = "w", augmentation=None) -> KeptViews:
    return KeptViews(folder / "views", kept, views=views, made_by=(weights, SMALL, augmentation))


def encode(pixels) -> torch.Tensor:
    """(b, 2, 3): the row, and the seed's remainder."""
    return torch.stack([pixels[:, 0], pixels[:, 1] % 1000], dim=1).float()[:, :, None].expand(-1, *SHAPE)


def fill(views: KeptViews, source, *, batch_size: int = 2, advance=lambda n: None) -> KeptViews:
    views.fill(source, shape=SHAPE, batch_size=batch_size, encode=encode, advance=advance)
    return views


def test_every_view_of_every_picture_is_kept_and_read_back(tmp_path):
    """In half precision, by row and by seed; the seed's remainder picks the view."""
    own = pairs(tmp_path)
    told = []
    views = fill(views_of(tmp_path, own), Source(), advance=told.append)
    assert sum(told) == 12
    got = views.read([4, 0, 4], [0, 1, 3])
    assert (got.dtype, got.shape) == (torch.float16, (3, *SHAPE))
    assert got[:, 0, 0].tolist() == [4, 0, 4]
    expected = [view_seed(own[row], view) % 1000 for row, view in ((4, 0), (0, 1), (4, 1))]
    assert got[:, 1, 0].tolist() == expected
    assert len(set(expected)) == 3


def test_views_that_are_there_are_not_made_again(tmp_path):
    """A second run with the same pictures, weights and augmentation asks nobody; progress is told all the same."""
    own = pairs(tmp_path)
    fill(views_of(tmp_path, own), Source())
    second, told = Source(), []
    assert fill(views_of(tmp_path, own), second, advance=told.append).read([3], [0])[0, 0, 0] == 3
    assert (second.asked, sum(told)) == ([], 12)


def test_other_makers_have_another_place(tmp_path):
    """Weights, augmentation, a changed file or another list of pictures; more views or word drop are the same place."""
    own = pairs(tmp_path)
    first = views_of(tmp_path, own)
    assert views_of(tmp_path, own, views=4).folder == first.folder
    cropped, dropped = Augmentation(), Augmentation(word_drop=0.5)  # a view has no words
    assert views_of(tmp_path, own, augmentation=dropped).folder == views_of(tmp_path, own, augmentation=cropped).folder
    folders = [first, views_of(tmp_path, own, weights="x"), views_of(tmp_path, own, augmentation=Augmentation())]
    folders += [views_of(tmp_path, own[:5]), views_of(tmp_path, pairs(tmp_path, size=40))]
    assert len({views.folder for views in folders}) == 5


@pytest.mark.parametrize("stop", [1, 17, 33])
def test_an_interrupted_fill_goes_on_where_it_stopped(stop, tmp_path):
    """At most sixteen batches are made again, and what comes out is what an undisturbed fill gives."""
    own = pairs(tmp_path, count=40)
    source = Source(stop=stop)
    with pytest.raises(KeyboardInterrupt):
        fill(views_of(tmp_path, own, views=1), source, batch_size=1)
    assert source.closed == 1
    again, told = Source(), []
    views = fill(views_of(tmp_path, own, views=1), again, batch_size=1, advance=told.append)
    assert again.asked == list(range(16 * (stop // 16), 40))
    assert sum(told) == 40
    assert views.read(list(range(40)), [0] * 40)[:, 0, 0].tolist() == list(range(40))
    assert {path.name for path in views.folder.iterdir()} <= {"view-0.npy", ".lock"}


def test_a_count_that_a_kill_left_empty_begins_the_view_anew(tmp_path):
    """A file is emptied before it is written; what was made is made again rather than read as no number."""
    own = pairs(tmp_path, count=20)
    with pytest.raises(KeyboardInterrupt):
        fill(views_of(tmp_path, own, views=1), Source(stop=17), batch_size=1)
    views = views_of(tmp_path, own, views=1)
    (views.folder / "view-0.done").write_text("")
    source = Source()
    fill(views, source, batch_size=1)
    assert source.asked == list(range(20))


def test_a_picture_that_cannot_be_read_is_unfit_and_the_others_are_not(tmp_path):
    """Also one that failed in a single view, for a slow disk: it would be NaN in some steps and not in others."""
    own = pairs(tmp_path)
    views = fill(views_of(tmp_path, own), Source(broken=[2, (4, view_seed(own[4], 1))]))
    assert views.unfit == {2, 4}
    assert bool(views.read([0, 1, 3, 5], [0, 1, 0, 1]).isfinite().all())
    assert fill(views_of(tmp_path, own), Source()).unfit == {2, 4}


def test_a_disk_that_is_too_small_is_said_before_anything_is_decoded(tmp_path):
    """How much is needed, how much is free, and what to do."""
    source = Source()
    views = views_of(tmp_path, pairs(tmp_path))
    with pytest.raises(ResourceError, match=r"MB for 2 views.*run\.views"):
        views.fill(source, shape=(1 << 20, 1 << 20), batch_size=2, encode=encode, advance=lambda n: None)
    assert source.asked == []


def test_two_runs_that_share_a_folder_fill_it_in_turn(tmp_path):
    """Three seeds at once with one `run.views_folder`: the second waits, and finds all of it."""
    own, first, second = pairs(tmp_path), Source(), Source()
    threads = [threading.Thread(target=fill, args=(views_of(tmp_path, own), source)) for source in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(map(len, (first.asked, second.asked))) == [0, 12]


def test_a_view_does_not_depend_on_who_else_is_there(tmp_path):
    """Its seed is the file's name and the view's number, so it stays when pictures come and go."""
    own = pairs(tmp_path)
    assert view_seed(own[3], 1) == view_seed(Pair("/else/3.png", ("b",), "g"), 1)
    assert len({view_seed(pair, view) for pair in own for view in range(3)}) == 18
    assert all(0 <= view_seed(pair, 0) < 2**31 for pair in own)


def test_a_feed_that_is_stopped_by_an_error_is_closed(tmp_path):
    """An encoder that fails ends the workers behind the feed, not the garbage collector."""
    source = Source()
    with pytest.raises(ZeroDivisionError):
        views_of(tmp_path, pairs(tmp_path)).fill(
            source, shape=SHAPE, batch_size=2, encode=lambda pixels: 1 / 0, advance=lambda n: None
        )
    assert source.closed == 1

"""The state of a run on disk: whole or not there, and never another run's."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmsearch.errors import InputError, ResourceError
from mmsearch.train.averaging import Average
from mmsearch.train.state import STATE, Progress, load_state, moving, read_progress, save_state, save_tensors


class Toy(nn.Module):
    """A frozen and a learning layer, a batch norm with statistics, and a counter that is a whole number."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.below, self.above, self.norm = nn.Linear(2, width), nn.Linear(width, 2), nn.BatchNorm1d(2)
        self.below.requires_grad_(False)
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, rows):
        return self.norm(self.above(self.below(rows)))


class Run:
    """A toy with an optimiser that has made `steps` steps."""

    def __init__(self, *, steps: int = 2, seed: int = 0, width: int = 3, average: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = Toy(width)
        self.named = {f"model/{n}": p for n, p in self.model.named_parameters()}
        self.moving = {f"model/{n}": v for n, v in moving(self.model).items()}
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.average = Average(self.model) if average else None
        for step in range(steps):
            self.step(step)

    def step(self, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        self.optimiser.zero_grad()
        self.model(torch.randn(4, 2, generator=draw)).square().sum().backward()
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.model)

    def save(self, path, progress: Progress) -> None:
        state = None if self.average is None else self.average.state()
        save_state(path, progress, model=self.moving, named=self.named, optimiser=self.optimiser, average=state)

    def load(self, path) -> Progress:
        progress, average = load_state(path, model=self.moving, named=self.named, optimiser=self.optimiser)
        if self.average is not None and average is not None:
            self.average.load(average)
        return progress

    def all_numbers(self) -> dict:
        rows = {} if self.average is None else {f"average/{n}": v for n, v in self.average.state()["rows"].items()}
        return {n: v.clone() for n, v in (self.model.state_dict() | rows).items()}


def test_a_state_that_was_loaded_goes_on_as_if_nothing_had_happened(tmp_path):
    """Weights, moments, statistics and the average: two more steps give the same bits as an undisturbed run."""
    whole = Run(steps=4)
    first = Run(steps=2)
    first.save(tmp_path / STATE, Progress("d", epoch=1, batch=2, step=2, best_epoch=0, best_score=0.5, history=[0.5]))
    other = Run(steps=0)
    progress = other.load(tmp_path / STATE)
    assert progress == Progress("d", epoch=1, batch=2, step=2, best_epoch=0, best_score=0.5, history=[0.5])
    for step in (2, 3):
        other.step(step)
    expected, got = whole.all_numbers(), other.all_numbers()
    del expected["norm.num_batches_tracked"], got["norm.num_batches_tracked"]  # counts for nothing
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_does_not_move_is_not_stored():
    """Frozen weights are in the checkpoint that the run began with; whole numbers and passing buffers count nothing."""
    assert set(moving(Toy())) == {
        "above.weight", "above.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    }  # fmt: skip


def test_without_a_file_there_is_no_run(tmp_path):
    """None, not an error: this is how every run begins."""
    assert read_progress(tmp_path / STATE) is None


def test_the_small_facts_are_read_without_the_tensors(tmp_path):
    """Also infinities that a first score may be, and a scaler's numbers."""
    Run().save(tmp_path / STATE, Progress("x", step=7, scaler={"scale": 65536.0}, done=True))
    found = read_progress(tmp_path / STATE)
    assert (found.digest, found.step, found.scaler, found.done) == ("x", 7, {"scale": 65536.0}, True)


@pytest.mark.parametrize("keep", [0, 3, 40, -10])
def test_a_torn_file_is_an_error_that_says_what_to_do(keep, tmp_path):
    """Empty, cut in the length, cut in the header, cut in the tensors."""
    path = tmp_path / STATE
    Run().save(path, Progress("d"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"state of a run.*Remove it"):
        read_progress(path)


@pytest.mark.parametrize("metadata", [None, {"state": "no JSON"}, {"other": "1"}, {"state": '{"format": 99}'}])
def test_a_file_of_something_else_is_refused(metadata, tmp_path):
    """A checkpoint's weights, or the state of a later format."""
    save_file({"a": torch.ones(1)}, str(tmp_path / STATE), metadata=metadata)
    with pytest.raises(InputError):
        read_progress(tmp_path / STATE)


def test_the_state_of_another_model_is_refused(tmp_path):
    """The first tensor that differs is named; nothing is read into the model."""
    Run(width=4).save(tmp_path / STATE, Progress("d"))
    run = Run()
    before = run.all_numbers()
    with pytest.raises(InputError, match=r"above\.weight"):
        run.load(tmp_path / STATE)
    assert all(torch.equal(before[name], value) for name, value in run.all_numbers().items())


def test_moments_of_a_parameter_that_is_not_there_are_refused(tmp_path):
    """By name, so that a file of another setup is noticed and not misread."""
    run = Run()
    run.named["model/else"] = run.named.pop("model/above.weight")
    run.save(tmp_path / STATE, Progress("d"))
    with pytest.raises(InputError, match="model/else"):
        Run().load(tmp_path / STATE)


def test_a_disk_that_takes_nothing_is_a_resource_error_and_leaves_the_last_state(tmp_path):
    """The draft is a folder here, so it cannot be written; the state of before stays whole."""
    path = tmp_path / STATE
    Run().save(path, Progress("d", step=1))
    (tmp_path / "state.draft").mkdir()
    with pytest.raises(ResourceError, match="Free space") as caught:
        Run().save(path, Progress("d", step=2))
    assert caught.value.exit_code == 5
    assert read_progress(path).step == 1


def test_saving_leaves_one_file_and_nothing_half(tmp_path):
    """What is written beside it is renamed over it."""
    for value in (1.0, 2.0):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.full((2, 3), value).T})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.full((3, 2), 2.0))


def test_moments_come_back_in_the_layout_of_their_parameter(tmp_path):
    """A fused optimiser walks both by address: a channels-last kernel would meet the moments of other weights."""
    found = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        kernel = nn.Parameter(torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last))
        optimiser = torch.optim.AdamW([kernel], lr=0.1, fused=True)
        for step in range(3):
            if interrupted and step == 2:
                path, named = tmp_path / STATE, {"k": kernel}
                save_state(path, Progress(), model={}, named=named, optimiser=optimiser, average=None)
                optimiser = torch.optim.AdamW([kernel], lr=0.1, fused=True)
                load_state(path, model={}, named=named, optimiser=optimiser)
                assert optimiser.state[kernel]["exp_avg"].stride() == kernel.stride()
            optimiser.zero_grad()
            (kernel * torch.arange(48.0).reshape(3, 4, 2, 2)).square().sum().backward()
            optimiser.step()
        found.append(kernel.detach())
    assert torch.equal(*found)

"""EMA and interpolation where their values are known."""

import math

import pytest
import torch
from torch import nn

from mmsearch.errors import InputError, UsageError
from mmsearch.train.averaging import Average, choose_share, interpolate, mean_of


class Small(nn.Module):
    """One weight that learns, one that does not, a statistic and a counter."""

    def __init__(self, value=0.0):
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.tensor([value])), nn.Parameter(torch.tensor([value]))
        self.frozen.requires_grad_(False)
        self.register_buffer("statistic", torch.tensor([value]))
        self.register_buffer("counter", torch.tensor(int(value)))


def set_to(model, value):
    with torch.no_grad():
        for tensor in (model.weight, model.frozen, model.statistic, model.counter):
            tensor.fill_(value)


def test_the_average_has_known_values_while_its_decay_rises():
    """From 0 with the weight at 1: d is 1/10, then 2/11, then the limit of 0.15."""
    model = Small()
    average = Average(model, decay=0.15)
    set_to(model, 1.0)
    expected, value = [], 0.0
    for d in (1 / 10, 0.15, 0.15):
        value = d * value + (1 - d)
        average.update(model)
        expected.append(value)
        with average.applied(model):
            assert model.weight.item() == pytest.approx(value)
    assert expected[0] == pytest.approx(0.9)


def test_only_what_moves_is_averaged():
    """The learning weight and the statistic; not the frozen weight, not the counter."""
    model = Small()
    average = Average(model)
    set_to(model, 10.0)
    average.update(model)
    with average.applied(model):
        assert [model.weight.item(), model.statistic.item()] == pytest.approx([9.0, 9.0])
        assert [model.frozen.item(), model.counter.item()] == [10.0, 10]


def test_the_models_own_weights_come_back_even_after_an_error():
    """What happens inside the block never costs the run its weights."""
    model = Small()
    average = Average(model)
    set_to(model, 3.0)
    with pytest.raises(KeyError), average.applied(model):
        assert model.weight.item() == 0.0
        raise KeyError
    assert [model.weight.item(), model.statistic.item()] == [3.0, 3.0]


def test_an_average_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been():
    """The same value as by hand, and neither moves the other's."""
    model = Small()
    one, two = Average(model, decay=0.9), Average(Small(5.0), decay=0.9)
    set_to(model, 1.0)
    one.update(model)
    two.load(one.state())
    set_to(model, 2.0)
    one.update(model), two.update(model)
    assert two.state()["updates"] == 2
    for average in (one, two):
        assert average.state()["rows"]["weight"].item() == pytest.approx(0.9 * 2 / 11 + 2.0 * 9 / 11)


def test_an_average_of_another_model_is_refused():
    """By the name that differs."""
    with pytest.raises(InputError, match="bias"):
        Average(nn.Linear(2, 2)).load(Average(nn.Linear(2, 2, bias=False)).state())
    with pytest.raises(UsageError, match="decay"):
        Average(Small(), decay=1.0)


def test_half_precision_weights_have_a_single_precision_average():
    """Steps of a thousandth are not rounded away."""
    model = Small(1.0).bfloat16()
    average = Average(model, decay=0.9999)
    assert average.state()["rows"]["weight"].dtype == torch.float32
    with average.applied(model):
        assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.25, 2.0), (1.0, 5.0)])
def test_interpolation_is_the_line_between(share, expected):
    """1 before and 5 after; counters are those of after."""
    found = interpolate(Small(1.0).state_dict(), Small(5.0).state_dict(), share)
    assert found["weight"].item() == expected
    assert found["counter"].item() == 5


def test_the_ends_of_the_line_are_exact_and_new_tensors():
    """Bit for bit, and a change of the result changes neither state."""
    before, after = ({"w": torch.randn(50)} for _ in range(2))
    for share, state in ((0.0, before), (1.0, after)):
        found = interpolate(before, after, share)["w"]
        assert torch.equal(found, state["w"])
        found.zero_()
        assert state["w"].any()


@pytest.mark.parametrize("after", [{"w": torch.ones(2), "x": torch.ones(1)}, {"w": torch.ones(3)}])
def test_states_of_different_models_are_not_mixed(after):
    """A missing name or another shape is an error that names it."""
    with pytest.raises(InputError, match=r"in [wx]"):
        interpolate({"w": torch.ones(2)}, after, 0.5)
    with pytest.raises(UsageError, match="share"):
        interpolate({}, {}, 1.5)


def test_the_mean_of_runs_is_that_of_their_floats():
    """1, 2 and 6 make 3; of one run it is that run. Counters are the first's; other models are refused."""
    states = [Small(weight).state_dict() for weight in (1.0, 2.0, 6.0)]
    states[0]["counter"] = torch.tensor(7)
    found = mean_of(states)
    assert (found["weight"].item(), found["counter"].item()) == (3.0, 7)
    assert torch.equal(mean_of(states[2:])["weight"], states[2]["weight"])
    with pytest.raises(InputError, match="in x"):
        mean_of([{"w": torch.ones(2)}, {"w": torch.ones(2), "x": torch.ones(1)}])
    with pytest.raises(UsageError):
        mean_of([])


def chosen(score, *, shares=(1.0, 0.0, 0.5)):
    model, made = Small(), []
    found = choose_share(
        model,
        Small(0.0).state_dict(),
        Small(1.0).state_dict(),
        evaluate=lambda: score(model.weight.item()),
        shares=shares,
        refresh=lambda: made.append(model.weight.item()),
    )
    return found, model.weight.item(), made


def test_the_best_share_is_chosen_and_left_in_the_model():
    """A score that peaks in the middle; each state, the last included, was refreshed."""
    (share, scores), left, made = chosen(lambda w: -abs(w - 0.5))
    assert (share, left) == (0.5, 0.5)
    assert scores == [(0.0, -0.5), (0.5, 0.0), (1.0, -0.5)]
    assert made == [0.0, 0.5, 1.0, 0.5]


def test_equal_scores_keep_what_was_known():
    """The smaller share wins a draw."""
    assert chosen(lambda w: 7.0)[0][0] == 0.0


def test_a_score_that_is_not_a_number_never_wins():
    """Weights that diverged are not kept while any other can be scored."""
    assert chosen(lambda w: math.nan if w < 1.0 else 0.1)[0][0] == 1.0
    assert chosen(lambda w: math.nan if w != 0.5 else 0.1)[0][0] == 0.5
    with pytest.raises(UsageError, match="shares"):
        chosen(lambda w: w, shares=())

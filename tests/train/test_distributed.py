"""Several ranks: the gradients, the rows and the state are those of one process."""

import pytest
import rank_kit
import torch
from safetensors.torch import load_file

from mmsearch.errors import UsageError
from mmsearch.train.distributed import Place, Ranks, place_from, ranks_from

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def ranks_results(tmp_path_factory):
    """What two real processes, joined by gloo, found; started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_kit.work, args=(str(folder),), nprocs=2)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("case", ["cached", "plain", "accumulated"])
def test_gradients_of_two_ranks_are_those_of_one_process(case, ranks_results):
    """4 + 3 pairs, extra negatives, groups across the ranks, the temperature included: equal on both, to 1e-12."""
    expected = {name: value for name, value in rank_kit.all_cases(Ranks()).items() if name.startswith(case)}
    assert len(expected) >= 6
    for results in ranks_results:
        got = {name: value for name, value in results.items() if name.startswith(case)}
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name] - value).abs().max() < 1e-12, name


def test_both_ranks_end_with_the_same_bits(ranks_results):
    """Weights that get these gradients cannot drift apart."""
    first, second = ranks_results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_that_one_rank_alone_has_is_averaged_with_zero(ranks_results):
    """6 on one of two ranks is 3 on both; a weight that nobody used gets no gradient, so no weight decay either."""
    for results in ranks_results:
        uneven = {name: value.tolist() for name, value in results.items() if name.startswith("uneven")}
        assert uneven == {"uneven:sometimes": [3.0, 3.0]}


def test_rows_of_an_empty_rank_are_gathered(ranks_results):
    """Two rows on one rank and none on the other are two rows on both; whole numbers stay whole."""
    for results in ranks_results:
        assert torch.equal(results["rows"], torch.tensor([[10], [11]]))


def test_numbers_come_from_the_main_rank_or_from_the_least(ranks_results):
    """0.1 and 1.1 -> 0.1 of the main rank, exactly; 5 and 6 -> 5."""
    for results in ranks_results:
        assert results["numbers"].tolist() == [0.1, 5.0]


def test_a_broadcast_makes_every_rank_the_main_one(ranks_results):
    """Weights, the count, the truth values and a transposed table of a model that began otherwise on rank 1."""
    for results in ranks_results:
        for name, value in rank_kit.Towers(seed=0).state_dict().items():
            assert torch.equal(results[f"state:{name}"], value), name


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_batch(world):
    """In order, each item once, lengths at most one apart, also with more ranks than items."""
    for count in (0, 1, 5, 16):
        shares = []
        for rank in range(world):
            ranks = rank_kit.ProcessGroup.__new__(rank_kit.ProcessGroup)  # a share needs no partner
            ranks.rank, ranks.world = rank, world
            shares.append(ranks.share(list(range(count))))
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_world_of_its_own():
    """Without torchrun nothing is joined: rows are themselves, the gradient stays, numbers stay."""
    with ranks_from({"HOME": "/"}) as ranks:
        rows = torch.ones(2, 3)
        assert (ranks.rank, ranks.world, ranks.is_main, ranks.device.type) == (0, 1, True, "cpu")
        assert ranks.gather_rows(rows) is rows
        assert list(ranks.share([1, 2])) == [1, 2]
        assert (ranks.from_main(2.5), ranks.least(3)) == (2.5, 3)
        assert not torch.distributed.is_initialized()


def test_torchrun_says_where_a_process_stands():
    """Rank, world, number on the machine and meeting place; a world of one meets nobody."""
    assert place_from(TORCHRUN) == Place(1, 2, 1, "tcp://10.0.0.7:29500")
    assert place_from({**TORCHRUN, "MASTER_ADDR": "fe80::1"}).meeting == "tcp://[fe80::1]:29500"
    assert place_from({"RANK": "0", "WORLD_SIZE": "1"}) == place_from({}) == Place(0, 1, 0, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "2"), ("RANK", "-1"), ("RANK", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "0"),
     ("MASTER_PORT", "65536"), ("LOCAL_RANK", "2"), ("MASTER_ADDR", "")],
)  # fmt: skip
def test_a_variable_that_cannot_be_is_named(name, value):
    """Rather than waiting for ranks that never come."""
    with pytest.raises(UsageError, match=name):
        place_from({**TORCHRUN, name: value})


def test_a_variable_that_is_missing_is_named():
    """RANK alone is half of what torchrun sets."""
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        place_from({"RANK": "0"})


@pytest.mark.parametrize(("device", "words"), [("mps", "cpu or cuda"), ("cuda", "GPU of its own")])
def test_a_device_that_ranks_cannot_share_is_refused(device, words):
    """Before anything waits: several ranks need gloo or NCCL, and a card each."""
    with pytest.raises(UsageError, match=words):
        ranks_from({**TORCHRUN, "RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}, device=device)

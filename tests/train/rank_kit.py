"""What each of two real processes does in the tests of several ranks; the tests do the same in one process."""

import torch
from safetensors.torch import save_file
from torch import nn

from mmsearch.train.chunked import Side, backward_in_chunks, chunks_of
from mmsearch.train.distributed import Place, ProcessGroup, Ranks

PAIRS, NEGATIVES, EMPTY = 7, 3, 2


class Towers(nn.Module):
    """Two linear towers to unit rows, a temperature, a weight that one rank alone uses and one that nobody does."""

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.text = nn.Linear(6, 4).double()
        self.image = nn.Linear(6, 4).double()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.sometimes = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.never = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.tensor([seed == 0, True]))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("turned", (torch.arange(6).reshape(2, 3) + seed).T)  # not contiguous
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def loss(self, texts, images, groups, *, extra):
        """Symmetric cross-entropy; images of the same group are not compared, `extra` rows are negatives only."""
        logits = self.log_scale.exp() * texts @ torch.cat([images, extra]).T
        alike = groups[:, None] == groups
        alike.fill_diagonal_(False)
        logits[:, : len(texts)] = logits[:, : len(texts)].masked_fill(alike, float("-inf"))
        targets = torch.arange(len(texts))
        square = logits[:, : len(texts)].T
        return nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(square, targets)


def unit(rows):
    return nn.functional.normalize(rows, dim=-1)


def data(seed):
    """(texts, images, extra images, groups) of one batch; two captions are of one group."""
    draw = torch.Generator().manual_seed(seed)
    texts, images, extra = (torch.randn(n, 6, dtype=torch.float64, generator=draw) for n in (PAIRS, PAIRS, NEGATIVES))
    return texts, images, extra, torch.tensor([0, 1, 2, 2, 4, 5, 0])


def step(model: Towers, ranks: Ranks, *, seed: int, chunk: int, pieces: int = 1) -> torch.Tensor:
    """One batch through this rank's share of it, with gradient caching and gathered negatives."""
    texts, images, extra, groups = (ranks.share(tensor) for tensor in data(seed))
    everyone = ranks.gather_rows(groups)

    def loss(text_rows, image_rows):
        pictures, negatives = image_rows[: len(texts)], image_rows[len(texts) :]
        gathered = (ranks.gather_rows(text_rows), ranks.gather_rows(pictures), everyone)
        return model.loss(*gathered, extra=ranks.gather_rows(negatives))

    sides = [
        Side(lambda one: unit(model.text(*one)), chunks_of(chunk, texts), model.text),
        Side(lambda one: unit(model.image(*one)), chunks_of(chunk, torch.cat([images, extra])), model.image),
    ]
    return backward_in_chunks(sides, loss, scale=lambda value: value / pieces)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_cases(ranks: Ranks, *, after=lambda model: None) -> dict[str, torch.Tensor]:
    """The gradients of each case by name; `after` runs when a step's last backward pass is done."""
    out = {}
    for case, chunk, seeds in (("cached", 2, (0,)), ("plain", 100, (0,)), ("accumulated", 3, (0, 1))):
        model = Towers()
        for seed in seeds:
            out[f"{case}:loss{seed}"] = step(model, ranks, seed=seed, chunk=chunk, pieces=len(seeds))
        after(model)
        out |= {f"{case}:{name}": gradient for name, gradient in gradients(model).items()}
    return out


def only_one_uses(ranks: Ranks) -> dict[str, torch.Tensor]:
    """A weight with a gradient of (6, 6) on rank 1 alone, and one with none anywhere."""
    model = Towers()
    if ranks.rank == 1:
        (6 * model.sometimes).sum().backward()
    ranks.average_gradients(model.parameters())
    return {f"uneven:{name}": gradient for name, gradient in gradients(model).items()}


def exchanged(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Rows with nothing on rank 1, numbers, and a model that differs between the ranks."""
    mine = torch.arange(EMPTY).reshape(-1, 1) + 10 if ranks.is_main else torch.empty(0, 1, dtype=torch.int64)
    model = Towers(seed=ranks.rank)
    ranks.broadcast_state(model)
    return {
        "rows": ranks.gather_rows(mine),
        "numbers": torch.tensor([ranks.from_main(ranks.rank + 0.1), ranks.least(ranks.rank + 5)], dtype=torch.float64),
        **{f"state:{name}": value.detach() for name, value in model.state_dict().items()},
    }


def work(rank: int, folder: str) -> None:
    """The body of one process: every case, its results as `rank0.safetensors` and `rank1.safetensors`."""
    torch.set_num_threads(1)
    with ProcessGroup(Place(rank, 2, rank, f"file://{folder}/meeting")) as ranks:
        out = all_cases(ranks, after=lambda model: ranks.average_gradients(model.parameters()))
        out |= only_one_uses(ranks) | exchanged(ranks)
        save_file({name: tensor.contiguous() for name, tensor in out.items()}, f"{folder}/rank{rank}.safetensors")

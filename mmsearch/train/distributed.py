"""Several processes as one batch: rows gathered across ranks, gradients averaged, equal to one process.

Every rank encodes its share of the batch, gathers the rows of all, and computes the loss of the whole batch. The
gradient that reaches its own rows is only its part of the whole, so `gather_rows` multiplies it by the number of
ranks; averaged over the ranks, the parts then add up to the gradient of one process on the joined batch, while
parameters of the loss itself (temperature, bias), which every rank sees in full, average to what they were.

Decisions:
- Gradients are averaged once a step by `average_gradients`, not by DistributedDataParallel: its hooks start at every
  backward pass, of which gradient caching has one a chunk and accumulation one a piece; it wants one `forward` for
  what here are two towers called apart; and at the size of these towers hiding the exchange behind the backward pass
  gains little.
- Every rank computes the whole loss. It costs b x b cosines and saves the exchange that a sharded loss needs.
- Ranks may bring batches of unlike length: a picture that could not be read shortens one of them.
- The environment is read by whoever calls `ranks_from(os.environ)`, not here, and only tensors travel: no pickle.
- NCCL for CUDA, gloo for the CPU. The all-reduce leaves the same bits on every rank, so weights do not drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmsearch.errors import UsageError

Thing = TypeVar("Thing")

# The others wait while the main rank evaluates and saves; a rank that died is noticed by torchrun, not by this clock.
_PATIENCE = timedelta(hours=2)
_BUCKET = 16 << 20  # numbers in one exchange: 64 MiB of float32


class Ranks:
    """The processes of one run; this class is the run of one: nobody to ask, nothing to wait for.

    `rank`: this process, 0 to `world` - 1. `is_main`: True on the one rank that writes files and talks, rank 0.
    `device`: where this rank computes. Methods that exchange something (all but `share`) are called by all ranks, in
    the same order. Give each rank's generators a seed of its own, or all ranks draw the same dropout masks.
    """

    rank, world, is_main = 0, 1, True

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def share(self, batch: Sequence[Thing]) -> Sequence[Thing]:
        """This rank's consecutive part of a batch; the parts, joined in the order of the ranks, are the batch.

        Known value: 5 over 2 ranks -> 3 and 2.
        """
        return batch

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(b, ...) of this rank -> (sum of b, ...), in the order of the ranks; any dtype, unlike b allowed, b = 0 too.

        A gradient reaches the own rows only, times the number of ranks (see the module's text). Extra images that
        are only negatives are gathered by a call of their own, or pair i would no longer be (text i, image i).
        """
        return rows

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each `.grad` by its mean over the ranks: once, after the last backward pass of a step.

        A parameter without a gradient counts as zero where another rank has one, and stays without where none has.
        Comes before unscaling (an overflow on one rank is then seen by all) and before clipping.
        """

    def broadcast_state(self, module: nn.Module) -> None:
        """Make every parameter and buffer what it is on the main rank."""

    def from_main(self, number: float) -> float:
        """The main rank's number, for what it alone decides (stop or go on); the others wait here for it."""
        return number

    def least(self, number: float) -> float:
        """The smallest number of all ranks: 0 when any rank says 0."""
        return number

    def close(self) -> None:
        """Leave the group; nothing can be exchanged afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProcessGroup(Ranks):
    """Ranks that torchrun started, joined by torch's process group."""

    def __init__(self, place: Place, *, device: str = "cpu") -> None:
        super().__init__(_device_of(place, device))
        self.rank, self.world, self.is_main = place.rank, place.world, place.rank == 0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            init_method=place.meeting,
            rank=place.rank,
            world_size=place.world,
            timeout=_PATIENCE,
        )

    def share(self, batch: Sequence[Thing]) -> Sequence[Thing]:
        """The ranks' parts differ by at most one; earlier ranks have the longer ones."""
        size, longer = divmod(len(batch), self.world)
        start = self.rank * size + min(self.rank, longer)
        return batch[start : start + size + (self.rank < longer)]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Exchange the lengths, then the rows, padded to the longest."""
        counts = self._gathered(torch.tensor([len(rows)])).flatten().tolist()
        gathered: Tensor = _Gather.apply(rows, self._gathered, counts, self.rank)
        return gathered

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchange who has a gradient, then the gradients, several to a bucket."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        present = present.to(self.device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        used = [parameter for parameter, here in zip(trained, present.tolist(), strict=True) if here]
        for bucket in _buckets(used):
            self._average(bucket)

    def broadcast_state(self, module: nn.Module) -> None:
        """One exchange a tensor."""
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                travelling = tensor.detach().to(self.device).contiguous()
                dist.broadcast(travelling.view(torch.uint8) if tensor.dtype == torch.bool else travelling, 0)
                tensor.copy_(travelling)

    def from_main(self, number: float) -> float:
        """One number in double precision travels."""
        sent = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(sent, 0)
        return float(sent.item())

    def least(self, number: float) -> float:
        """One number in double precision travels."""
        sent = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(sent, dist.ReduceOp.MIN)
        return float(sent.item())

    def close(self) -> None:
        """Leave torch's process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _gathered(self, tensor: Tensor) -> Tensor:
        """(m, ...) of the same shape on all ranks -> (world, m, ...)."""
        own = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
            parameter.grad = gradient


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward: the own part of the gradient, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        rows: Tensor,
        gathered: Callable[[Tensor], Tensor],
        counts: list[int],
        rank: int,
    ) -> Tensor:
        ctx.start, ctx.count, ctx.world = sum(counts[:rank]), counts[rank], len(counts)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = gathered(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 - torch's signature
        own: Tensor = gradients[0][ctx.start : ctx.start + ctx.count]
        return own * ctx.world, None, None, None


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands among `world`: its number, its number on this machine, and where they meet.

    `meeting`: address that torch.distributed understands, "tcp://host:port" or "file:///path" of no file yet.
    """

    rank: int
    world: int
    local_rank: int
    meeting: str


def place_from(environ: Mapping[str, str]) -> Place:
    """What torchrun says: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; without them a world of one.

    Raises UsageError naming a variable that is missing or cannot be.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return Place(0, 1, 0, "")
    world = _number(environ, "WORLD_SIZE", lowest=1, below=1 << 31)
    rank = _number(environ, "RANK", lowest=0, below=world)
    if world == 1:
        return Place(0, 1, 0, "")
    local_rank = _number(environ, "LOCAL_RANK", lowest=0, below=world) if "LOCAL_RANK" in environ else rank
    port = _number(environ, "MASTER_PORT", lowest=1, below=1 << 16)
    host = environ.get("MASTER_ADDR", "")
    if not host:
        raise UsageError("MASTER_ADDR", expected="the host of rank 0", got="nothing", do="Start the run with torchrun.")
    return Place(rank, world, local_rank, f"tcp://{f'[{host}]' if ':' in host else host}:{port}")


def ranks_from(environ: Mapping[str, str], *, device: str = "cpu") -> Ranks:
    """The run's ranks, joined: call with `os.environ`, use in a `with` block.

    `device`: "cpu", "cuda" (with several ranks: the card of LOCAL_RANK), or any other of torch in a world of one.
    Waits until all ranks are there. Raises UsageError for variables that cannot be and for a card that is not there.
    """
    place = place_from(environ)
    return Ranks(device) if place.world == 1 else ProcessGroup(place, device=device)


def _number(environ: Mapping[str, str], name: str, *, lowest: int, below: int) -> int:
    text = environ.get(name, "")
    if text.isdecimal() and lowest <= int(text) < below:
        return int(text)
    expected = f"a whole number from {lowest} to {below - 1}"
    raise UsageError(name, expected=expected, got=repr(text), do="Start the run with torchrun.")


def _device_of(place: Place, device: str) -> torch.device:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UsageError("device of several processes", expected="cpu or cuda", got=device)
    if kind == "cuda" and place.local_rank >= torch.cuda.device_count():
        here = torch.cuda.device_count()
        raise UsageError(
            f"rank {place.rank}",
            expected="a GPU of its own",
            got=f"{here} on this machine",
            do=f"Start at most {max(here, 1)} processes a machine (torchrun --nproc-per-node), or use --device cpu.",
        )
    return torch.device(kind, place.local_rank) if kind == "cuda" else torch.device(kind)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device at a time, at most `_BUCKET` numbers together unless one alone has more."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        for parameter in alike:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket

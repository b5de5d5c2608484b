"""Gradients of a big contrastive batch in the memory of a small one: gradient caching.

A contrastive loss needs the rows of the whole batch, but a row needs nothing of the others. So the rows are made
without a graph first, chunk by chunk; the loss gives the gradient of each row; then each chunk is encoded again with
a graph and handed its rows' gradient (Gao, Zhang, Han, Callan 2021, arXiv:2101.06983, "GradCache"). Memory is that
of one chunk's graph and of the rows; time is one more forward pass. The gradients are those of the whole batch, to
rounding.

Decisions:
- The second pass sees the same dropout masks: the state of torch's generators (CPU, and the current CUDA device) is
  kept in front of each chunk. Afterwards the generators stand where the first pass left them, so a run with chunks
  draws the same random numbers as one that encodes the chunks once.
- Buffers of `Side.module` are put back after the first pass: running statistics of batch norms count a batch once.
  In training mode such a layer normalises by the chunk, not by the batch; keep it in eval mode where that matters.
- A side that trains nothing (a locked tower, Zhai et al. 2022, LiT) is encoded once.
- One chunk a side is the plain way: one pass, with a graph.
- Autocast keeps casts of weights for as long as it lasts. In torch before 2.11 a cast made in the pass without a
  graph cut the weights off in the pass with one, silently (pytorch issues 65766, 158232), so the kept casts are
  dropped in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsearch.errors import UsageError

_GeneratorStates = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the batch: what encodes it, and the pieces it is cut into.

    `encode`: one chunk -> (c, d) rows; it is called twice a chunk and must give the same rows for the same state of
    torch's generators, so draw nothing from `random` or NumPy in it. `module`: the module that holds every trained
    parameter of `encode`; with it, batch-norm statistics are counted once and a frozen side is encoded once. Without
    it both are assumed to be no concern.
    """

    encode: Callable[[Any], Tensor]
    chunks: Sequence[Any]
    module: nn.Module | None = None

    @property
    def trains(self) -> bool:
        """False when `module` says that no gradient can arrive anywhere."""
        return self.module is None or any(parameter.requires_grad for parameter in self.module.parameters())


def backward_in_chunks(
    sides: Sequence[Side], loss: Callable[..., Tensor], *, scale: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Add the gradient of `loss(rows of side 0, rows of side 1, ...)` to every `.grad`; -> the loss, () detached.

    `loss` gets the (n_i, d) rows of each side, its chunks joined in order, and is called once; parameters inside it
    (the temperature) get their gradient, too, and it may gather rows across processes. `scale` is applied to the
    loss before the backward pass, but not to the returned value: a gradient scaler for half precision, or a division
    by the number of accumulated steps.
    Equals encoding all chunks with a graph and one backward pass. Raises UsageError without sides or chunks, and
    for a loss that is not one number.
    """
    for number, side in enumerate(sides):
        if not side.chunks:
            raise UsageError(f"side {number} of the batch", expected="at least one chunk", got="none")
    if not sides:
        raise UsageError("sides of the batch", expected="at least one", got="none")
    if all(len(side.chunks) == 1 for side in sides):
        return _backward(loss(*(_encode_at_once(side) for side in sides)), scale)
    return _backward_twice(sides, loss, scale)


def chunks_of(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of the same (b, ...) -> their pieces of at most `size` along the first axis, views, in order.

    Known value: 5 rows in pieces of 2 -> lengths 2, 2, 1. Raises UsageError for a size below 1 and for tensors
    of unlike lengths.
    """
    if size < 1:
        raise UsageError("size of a chunk", expected="at least 1", got=str(size))
    lengths = sorted({len(tensor) for tensor in tensors})
    if len(lengths) != 1:
        raise UsageError("tensors of a batch", expected="the same length", got=str(lengths))
    # No row at all is one empty piece: a rank whose pictures are all broken still takes part.
    starts = range(0, max(lengths[0], 1), size)
    return [tuple(tensor[start : start + size] for tensor in tensors) for start in starts]


def _encode_at_once(side: Side) -> Tensor:
    with torch.set_grad_enabled(side.trains):
        return side.encode(side.chunks[0])


def _backward(value: Tensor, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
    if value.ndim:
        raise UsageError("loss of a batch", expected="one number, shape ()", got=str(tuple(value.shape)))
    torch.autograd.backward(scale(value) if scale else value)
    return value.detach()


def _backward_twice(
    sides: Sequence[Side], loss: Callable[..., Tensor], scale: Callable[[Tensor], Tensor] | None
) -> Tensor:
    states: list[list[_GeneratorStates]] = []
    leaves: list[Tensor] = []
    for side in sides:
        rows, kept = _rows_without_graph(side)
        states.append(kept)
        leaves.append(rows.requires_grad_(side.trains))
    torch.clear_autocast_cache()
    value = _backward(loss(*leaves), scale)
    after = _generator_states()
    for side, leaf, kept in zip(sides, leaves, states, strict=True):
        if leaf.grad is not None:
            _backward_each(side, leaf.grad, kept)
    _restore(after)
    return value


def _rows_without_graph(side: Side) -> tuple[Tensor, list[_GeneratorStates]]:
    """The rows (n, d) of a side, and the generators' states in front of each chunk."""
    buffers = [] if side.module is None else [(buffer, buffer.clone()) for buffer in side.module.buffers()]
    rows, states = [], []
    with torch.no_grad():
        for chunk in side.chunks:
            states.append(_generator_states())
            rows.append(side.encode(chunk))
        if side.trains:  # the second pass counts them
            for buffer, before in buffers:
                buffer.copy_(before)
    return torch.cat(rows), states


def _backward_each(side: Side, gradient: Tensor, states: Sequence[_GeneratorStates]) -> None:
    """Encode each chunk again, with a graph, and send its rows' part of `gradient` (n, d) down."""
    start = 0
    for chunk, state in zip(side.chunks, states, strict=True):
        _restore(state)
        rows = side.encode(chunk)
        part = gradient[start : start + len(rows)]
        start += len(rows)
        if rows.requires_grad:
            torch.autograd.backward(rows, part)


def _generator_states() -> _GeneratorStates:
    # Asking CUDA for its state would start it; a run on the CPU must not.
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


def _restore(states: _GeneratorStates) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)

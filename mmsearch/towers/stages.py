"""A backbone as a row of stages from input to output: what is frozen, thawed or slowed down in one piece.

Decisions:
- Found by structure, not by a table of architectures: wrappers are opened, lists of blocks are opened, everything
  else is a piece of its own. A new timm model needs no line here.
- A piece without a matrix (a norm between two blocks) belongs to the stage before it: nobody wants to train
  "the last stage" and get 384 scales.
- Loose parameters of an opened module (class token, positions) belong to the first stage: they act on the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mmsearch.errors import ModelError

_LISTS = frozenset(
    {"blocks", "stages", "layers", "layer", "features", "encoder", "trunk", "trunk_output", "body", "transformer"}
)
"""Children of these names hold the stages; any other child is one."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of a backbone. `name`: dotted path of its first module in the backbone, e.g. "model.blocks.3".

    `modules` in order of running; `loose`: parameters that belong to no module of the stage (tokens, positions).
    """

    name: str
    modules: tuple[nn.Module, ...]
    loose: tuple[nn.Parameter, ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the stage, as it is now: adapters added later are found too."""
        yield from self.loose
        for module in self.modules:
            yield from module.parameters()


def stages(backbone: nn.Module) -> list[Stage]:
    """The stages of `backbone`, input first; each of its parameters is in exactly one of them.

    Known values: a BERT of n layers has n + 1 (embeddings, layers); EfficientNet-Lite2 of timm 9 (stem, seven
    blocks, head convolution); ResNet 5; a vision transformer of n blocks n + 1. `ModelError` when the backbone
    has no parameters at all.
    """
    loose: list[nn.Parameter] = []
    found: list[tuple[str, list[nn.Module]]] = []
    for name, module in _pieces(backbone, path="", loose=loose, is_list=False):
        # A norm after a convolution belongs to it, and one before the first convolution to the stem.
        if found and not (_has_matrix(module) and any(map(_has_matrix, found[-1][1]))):
            found[-1][1].append(module)
        else:
            found.append((name, [module]))
    if not found:
        raise ModelError("backbone", expected="modules with parameters", got=type(backbone).__name__)
    return [Stage(name, tuple(modules), tuple(loose) if i == 0 else ()) for i, (name, modules) in enumerate(found)]


def _pieces(
    module: nn.Module, *, path: str, loose: list[nn.Parameter], is_list: bool
) -> Iterator[tuple[str, nn.Module]]:
    """(dotted path, module) of all that is not opened further; the own parameters of what is opened go to `loose`."""
    loose.extend(module.parameters(recurse=False))
    children = _children(module)
    lists = [child for _, child in children if isinstance(child, nn.Sequential | nn.ModuleList)]
    for name, child in children:
        # The entries of a named list are stages, however few. Elsewhere a wrapper's only child is what it wraps, and
        # the only list among other modules is the row of blocks; several lists side by side are stages (ResNet).
        opened = name in _LISTS or (not is_list and (len(children) == 1 or lists == [child]))
        inner = f"{path}.{name}" if path else name
        if opened and _children(child):
            yield from _pieces(child, path=inner, loose=loose, is_list=name in _LISTS)
        else:
            yield inner, child


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())

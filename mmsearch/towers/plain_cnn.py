"""A small plain convolutional network: a backbone for trials, tests and machines without timm's models."""

from __future__ import annotations

from torch import Tensor, nn

from mmsearch.errors import ModelError

DEFAULT_WIDTHS = (32, 64, 128, 256)
_MAX_STAGES, _MAX_WIDTH = 6, 2048


class PlainCnn(nn.Module):
    """(b, 3, s, s) -> (b, w, s/2^n, s/2^n): n stages of convolution (stride 2), batch norm, ReLU.

    `architecture`: the stages' widths joined by commas, or "" for 32,64,128,256.
    """

    def __init__(self, architecture: str, *, size: int) -> None:
        super().__init__()
        widths = _widths(architecture)
        if size < 2 ** len(widths):
            raise ModelError("plain_cnn", expected=f"inputs of {2 ** len(widths)} pixels or more", got=str(size))
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths[:-1]), widths, strict=True):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.stages = nn.Sequential(*layers)
        self.width, self.prefix = widths[-1], 0

    def forward(self, images: Tensor) -> Tensor:
        """Features before pooling."""
        features: Tensor = self.stages(images)
        return features


def _widths(architecture: str) -> tuple[int, ...]:
    if not architecture:
        return DEFAULT_WIDTHS
    parts = architecture.split(",")
    if len(parts) > _MAX_STAGES or not all(p.isdecimal() and 0 < int(p[:9]) <= _MAX_WIDTH for p in parts):
        raise ModelError(
            "plain_cnn", expected=f"up to {_MAX_STAGES} widths of 1 to {_MAX_WIDTH} joined by commas", got=architecture
        )
    return tuple(int(p) for p in parts)

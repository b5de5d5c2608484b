"""The faster backward pass of wide depthwise convolutions: the same gradients, and only where it gains."""

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn import functional

from mmsearch.train.depthwise import _Depthwise, fast_depthwise

CHANNELS = 3


def depthwise(kind=nn.Conv2d, *, side: int = 5, stride: int = 1, seed: int = 0, **options) -> nn.Conv2d:
    torch.manual_seed(seed)
    padding = {} if kind is Conv2dSame else {"padding": side // 2}
    return kind(CHANNELS, CHANNELS, side, stride=stride, groups=CHANNELS, bias=False, **padding, **options)


def gradients(module, images, *, fast: bool):
    """(output, gradient of the images, gradient of the kernel) in bfloat16 under autocast."""
    images = images.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if fast:
            with fast_depthwise(module) as found:
                assert found == 1
                out = module(images)
        else:
            out = module(images)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out.float() * weights).sum().backward()
    return out.detach(), images.grad, module.weight.grad.clone()


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(9, 9), (12, 9), (8, 11)])
def test_gradients_are_those_of_the_plain_convolution(side, stride, shape):
    """In float64, to 1e-12, for odd and even sizes: with a stride the last rows may take no part."""
    torch.manual_seed(0)
    images = torch.randn(2, CHANNELS, *shape, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(CHANNELS, 1, side, side, dtype=torch.float64, requires_grad=True)
    plain = functional.conv2d(images, kernel, stride=stride, groups=CHANNELS)
    own = _Depthwise.apply(images, kernel, stride)
    assert torch.equal(own, plain)
    sent = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad(own, (images, kernel), sent),
        torch.autograd.grad(plain, (images, kernel), sent),
        strict=True,
    ):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-12


def test_gradcheck_agrees():
    """Against differences of values, not against another backward pass."""
    torch.manual_seed(1)
    images = torch.randn(1, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    for stride in (1, 2):
        assert torch.autograd.gradcheck(lambda a, b, s=stride: _Depthwise.apply(a, b, s), (images, kernel))


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_in_bfloat16_output_and_gradients_are_close(kind, stride, size):
    """Torch's padding and TensorFlow's, with and without stride; a pixel of wrong padding would be far off."""
    module = depthwise(kind, stride=stride)
    images = torch.randn(2, CHANNELS, size, size, generator=torch.Generator().manual_seed(2))
    plain, fast = gradients(module, images, fast=False), gradients(module, images, fast=True)
    for got, expected in zip(fast, plain, strict=True):
        assert got.shape == expected.shape
        assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_only_wide_depthwise_convolutions_are_changed():
    """3x3, dense, dilated, biased or circular ones keep torch's own."""
    others = [
        depthwise(side=3), nn.Conv2d(3, 3, 5, padding=2, bias=False), depthwise(dilation=2), depthwise(stride=3),
        nn.Conv2d(3, 3, 5, padding=2, groups=3), depthwise(padding_mode="circular"),
        nn.Conv2d(3, 6, 5, padding=2, groups=3, bias=False), nn.Conv2d(3, 3, 5, padding="same", groups=3, bias=False),
    ]  # fmt: skip
    with fast_depthwise(nn.Sequential(*others, depthwise(), depthwise(side=7), depthwise(Conv2dSame))) as found:
        assert found == 3
        assert not any("forward" in module.__dict__ for module in others)


def test_outside_bfloat16_and_without_gradients_nothing_changes():
    """float32, float16 and evaluation go the plain way, bit for bit."""
    module, images = depthwise(), torch.randn(1, CHANNELS, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(images)
    with fast_depthwise(module):
        out = module(images)
        assert out.grad_fn.name() == "ConvolutionBackward0"
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(images), low)
    assert torch.equal(out, module(images))


def test_afterwards_the_forwards_are_the_classes_own():
    """Also when the block ends with an error."""
    module = depthwise()
    with pytest.raises(ZeroDivisionError), fast_depthwise(module):
        assert "forward" in module.__dict__
        raise ZeroDivisionError
    assert "forward" not in module.__dict__

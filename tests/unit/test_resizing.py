"""Bilinear resizing: F.interpolate on the CPU to the last bit, a native kernel or two products on a GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from anomalib_lite.methods.resizing import resize, resize_by_products
from tests.helpers.fake_cuda import fake_cuda

SIZES = [((7, 5), (14, 11)), ((16, 9), (5, 20)), ((1, 4), (6, 1)), ((3, 3), (3, 3)), ((8, 8), (256, 31))]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("sizes", "align"), itertools.product(SIZES, (True, False)))
def test_products_are_interpolation(sizes, align):
    """Values and gradients, in float64."""
    (before, after), numbers = sizes, torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *before, dtype=torch.float64, generator=numbers, requires_grad=True)
    found, expected = (f(x) for f in (
        lambda x: resize_by_products(x, after, align),
        lambda x: F.interpolate(x, after, mode="bilinear", align_corners=align),
    ))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=numbers)
    gradients = [torch.autograd.grad((each * weights).sum(), x)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_products_of_bfloat16_are_rounded_once():
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_by_products(x, (13, 9), False)
    expected = F.interpolate(x.double(), (13, 9), mode="bilinear").bfloat16()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected.double(), rtol=2**-7, atol=1e-6)


def test_the_cpu_keeps_every_bit(deterministic):
    x = torch.randn(2, 3, 9, 7)
    for align in (True, False):
        assert torch.equal(resize(x, (20, 31), align), F.interpolate(x, (20, 31), mode="bilinear", align_corners=align))


class Operations(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.names += [name] * (name != "device")  # the tensor is asked where it lies
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", [False, True])
def test_on_a_gpu(gradient, deterministic):
    """One kernel without a gradient; with one, products, without gathers (as a backward pass needs scatters)."""
    with fake_cuda():
        x = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=gradient)
        with Operations() as called:
            y = resize(x, (16, 16))
    assert (y.shape, y.device.type) == ((2, 3, 16, 16), "cuda")
    if gradient:
        assert not {name for name in called.names if "upsample" in name or "index" in name or "gather" in name}
        assert "bmm" in called.names
        assert len(called.names) < 50
    else:
        assert called.names == ["upsample_bilinear2d"]

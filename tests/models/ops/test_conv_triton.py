"""The convolution kernels through Triton's interpreter, fp32. Oracle: the plain torch path in float64."""

import pytest
import torch

from models.ops.conv import causal_conv1d
from tests.models.ops.test_conv import make_inputs


@pytest.fixture
def kernel(interpreter, monkeypatch):
    """The convolution on small tiles, several of them a row."""
    from models.ops import conv_triton

    for config in (conv_triton.FORWARD, conv_triton.BACKWARD):
        monkeypatch.setitem(config, "BLOCK", 16)
        monkeypatch.setitem(config, "TOKENS", 16)
    return conv_triton.conv_triton


def with_gradients(operator, inputs):
    y = operator(**inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad((y.double() * weight).sum(), list(inputs.values()))]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("batch", "length", "width", "offsets"),
    [(2, 37, 4, None), (1, 2, 4, None), (1, 50, 3, [0, 1, 3, 3, 33, 50])],
)
def test_kernel_equals_plain_torch(kernel, batch, length, width, offsets, activation):
    sequences = len(offsets) - 1 if offsets else None
    cu_seqlens = torch.tensor(offsets) if offsets else None
    inputs = make_inputs(batch, length, channels=20, width=width, sequences=sequences)
    expected = with_gradients(
        lambda **i: causal_conv1d(**i, activation=activation, cu_seqlens=cu_seqlens)[0], inputs
    )
    single = {name: t.detach().float().requires_grad_() for name, t in inputs.items()}
    found = with_gradients(lambda **i: kernel(**i, activation=activation, cu_seqlens=cu_seqlens), single)
    for ours, exact in zip(found, expected):
        assert (ours.double() - exact).norm() < 1e-6 * exact.norm()

"""Every fused operator inside a checkpointed region, which hands out each saved tensor once and lets go."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("interpreter")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def assert_same_when_recomputed(function, inputs):
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).square().sum(), inputs)
    for got, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_convolution():
    from models.ops.conv_triton import _Convolution

    def function(x, weight, bias, state):
        return _Convolution.apply(x, weight, bias, state, None, True)

    inputs = [draw(1, 9, 16), draw(16, 4, seed=1), draw(16, seed=2), draw(1, 16, 3, seed=3)]
    assert_same_when_recomputed(function, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_ssd(packed):
    from models.ops.ssd_triton import split_packed, ssd_packed_triton, ssd_triton

    def function(xBC, dt, D, state):
        options = {"D": D, "initial_state": state, "output_final_state": False, "cu_seqlens": None}
        A = -torch.ones(2)
        if packed:
            return ssd_packed_triton(xBC, dt.exp(), A, 1, 16, **options)[0]
        x, B, C = split_packed(xBC, 2, 1, 16)
        return ssd_triton(x, dt.exp(), A, B, C, **options)[0]

    inputs = [draw(1, 20, 2 * 16 + 32), draw(1, 20, 2, seed=1), draw(2, seed=2), draw(1, 2, 16, 16, seed=3)]
    assert_same_when_recomputed(function, inputs)


def test_gla():
    from models.ops.gla_triton import gla_triton

    def function(q, k, v, gate, state):
        g = torch.nn.functional.logsigmoid(gate)
        return gla_triton(q, k, v, g, scale=0.25, initial_state=state)[0]

    inputs = [draw(1, 20, 1, 16, seed=seed) for seed in range(4)]
    assert_same_when_recomputed(function, [*inputs, draw(1, 1, 16, 16, seed=4)])


def test_gla_with_a_low_rank_gate():
    from models.ops.gla_triton import gla_triton

    def function(q, k, v, low_rank, weight, bias):
        return gla_triton(q, k, v, low_rank, scale=0.25, gate=(16.0, None), gate_map=(weight, bias))[0]

    inputs = [draw(1, 20, 1, 16, seed=seed) for seed in range(3)]
    inputs += [draw(1, 20, 4, seed=3), draw(16, 4, seed=4), draw(16, seed=5)]
    assert_same_when_recomputed(function, inputs)

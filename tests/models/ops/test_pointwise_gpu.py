"""Fused norms, SwiGLU, linear maps and cross-entropy on the GPU against plain torch in float64.

Relative error by norm. fp32 kernels differ from float64 by rounding (1e-5); products in fp32 by at most the
same, since the tests switch tf32 off; bf16 inputs and outputs carry 2**-9 each, and gradients a few of these
(2e-2).
"""

import pytest
import torch
import torch.nn.functional as F

from models.ops.activation import swiglu
from models.ops.cross_entropy import linear_cross_entropy
from models.ops.linear import gated_norm_linear, norm_linear, swiglu_mlp
from models.ops.norm import gated_rms_norm, rms_norm

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def exact_fp32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cuda()


def assert_same_function(function, inputs, dtype):
    """`function(..., backend)` on the GPU in `dtype` agrees with its plain torch form in float64."""
    low = [t.to(dtype).requires_grad_() for t in inputs]
    high = [t.detach().double().requires_grad_() for t in low]
    outputs, expected = function(*low, "triton"), function(*high, "torch")
    weights = [draw(*y.shape, seed=99) for y in expected]
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights))
    wanted = sum((y * w).sum() for y, w in zip(expected, weights))
    pairs = [*zip(outputs, expected), *zip(torch.autograd.grad(loss, low), torch.autograd.grad(wanted, high))]
    for got, target in pairs:
        assert torch.isfinite(got).all()
        error = (got.double() - target).norm() / target.norm()
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@dtypes
@pytest.mark.parametrize("width", [64, 2048, 4096, 5000])
def test_rms_norm(dtype, width):
    def function(x, weight, backend):
        return (rms_norm(x, weight, 1e-6, backend=backend),)

    assert_same_function(function, [draw(1, 1001, width), draw(width, seed=1)], dtype)


@dtypes
@pytest.mark.parametrize(
    ("groups", "shared", "norm_before_gate"), [(4, True, True), (1, False, False), (2, False, False)]
)
def test_gated_rms_norm(dtype, groups, shared, norm_before_gate):
    def function(x, gate, weight, backend):
        order = {"groups": groups, "norm_before_gate": norm_before_gate}
        return (gated_rms_norm(x, gate, weight, 1e-6, **order, backend=backend),)

    weight = draw(2048 // groups if shared else 2048, seed=2)
    assert_same_function(function, [draw(1, 999, 2048), draw(1, 999, 2048, seed=1), weight], dtype)


@dtypes
def test_swiglu(dtype):
    def function(gate, up, backend):
        return (swiglu(gate, up, backend=backend),)

    assert_same_function(function, [draw(3, 333, 704), draw(3, 333, 704, seed=1)], dtype)


@dtypes
def test_norm_linear(dtype):
    def function(x, norm, w1, w2, bias, backend):
        return norm_linear(x, norm, 1e-6, [w1, w2], [None, bias], backend=backend)

    weights = [draw(96, 256, seed=2), draw(160, 256, seed=3)]
    assert_same_function(function, [draw(2, 333, 256), draw(256, seed=1), *weights, draw(160, seed=4)], dtype)


@dtypes
def test_gated_norm_linear(dtype):
    def function(x, gate, norm, w, residual, backend):
        order = {"groups": 2, "norm_before_gate": True}
        return (gated_norm_linear(x, gate, norm, 1e-6, w, residual=residual, **order, backend=backend),)

    inputs = [draw(2, 333, 256), draw(2, 333, 256, seed=1), draw(128, seed=2)]
    assert_same_function(function, [*inputs, draw(96, 256, seed=3), draw(2, 333, 96, seed=4)], dtype)


@dtypes
@pytest.mark.parametrize("recompute", [False, True])
def test_swiglu_mlp(dtype, recompute):
    def function(x, norm, gate, up, down, backend):
        return (swiglu_mlp(x, norm, 1e-6, gate, up, down, recompute=recompute, backend=backend),)

    weights = [draw(704, 256, seed=2), draw(704, 256, seed=3), draw(256, 704, seed=4)]
    inputs = [draw(2, 333, 256), draw(256, seed=1), *(w / 16 for w in weights)]
    assert_same_function(function, inputs, dtype)


def test_fp32_weights_get_gradients_that_were_never_rounded_to_bf16():
    x, norm, weight = draw(1, 4096, 128).bfloat16(), draw(128, seed=1).float(), draw(128, 128, seed=2).float()
    weight.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, _ = norm_linear(x, norm, 1e-6, [weight])
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad != weight.grad.bfloat16().float()).any()


@dtypes
def test_linear_cross_entropy(dtype):
    labels = torch.randint(0, 3001, (2, 700), generator=torch.Generator().manual_seed(2)).cuda()
    labels[0, :50] = -100

    def function(hidden, weight, backend):
        return (linear_cross_entropy(hidden, weight, labels, chunk_size=256, backend=backend),)

    assert_same_function(function, [draw(2, 700, 128), draw(3001, 128, seed=1) * 0.2], dtype)


def test_cross_entropy_keeps_memory_far_below_the_logits():
    hidden, weight = draw(1, 65536, 256).bfloat16().requires_grad_(), draw(32000, 256, seed=1).bfloat16()
    weight.requires_grad_()
    labels = torch.randint(0, 32000, (1, 65536)).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 65536 * 32000 * 2 / 2


def test_cross_entropy_of_full_logits_agrees():
    hidden, weight = draw(300, 64), draw(997, 64, seed=1)
    labels = torch.arange(300).cuda()
    low = linear_cross_entropy(hidden.float(), weight.float(), labels, backend="triton")
    torch.testing.assert_close(low.double(), F.cross_entropy(hidden @ weight.T, labels), rtol=1e-5, atol=0)

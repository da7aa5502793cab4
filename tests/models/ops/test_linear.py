"""Fused linear maps against their composition from plain parts in float64, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.linear import gated_norm_linear, norm_linear, swiglu_mlp
from models.ops.norm import gated_rms_norm, rms_norm


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same_function(function, reference, inputs, tolerance):
    """`function` in fp32 agrees with `reference` in float64, outputs and gradients, relative error by
    norm."""
    low = [t.float().requires_grad_() for t in inputs]
    high = [t.requires_grad_() for t in inputs]
    outputs, expected = function(*low), reference(*high)
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    wanted = sum((y * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum() for y in expected)
    pairs = [*zip(outputs, expected), *zip(torch.autograd.grad(loss, low), torch.autograd.grad(wanted, high))]
    for got, target in pairs:
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        assert (got.double() - target).norm() <= tolerance * target.norm()


def kernels(name):
    """The fused class itself: `resolve` would refuse it on a CPU, where the interpreter runs it."""
    from models.ops import linear_triton

    return getattr(linear_triton, name).apply


X, NORM, W1, W2, B2 = (
    draw(2, 9, 24),
    draw(24, seed=1),
    draw(16, 24, seed=2),
    draw(40, 24, seed=3),
    draw(40, seed=4),
)


def plain_norm_linear(x, norm, w1, w2, b2):
    hidden = rms_norm(x, norm, 1e-6)
    return F.linear(hidden, w1), F.linear(hidden, w2, b2), x


@pytest.mark.parametrize("fused", [False, True])
def test_norm_linear_projects_the_normed_input_and_hands_x_through(fused, request):
    def function(x, norm, w1, w2, b2):
        if fused:
            return kernels("FusedNormLinear")(x, norm, 1e-6, torch.float32, 2, w1, w2, None, b2)
        return norm_linear(x, norm, 1e-6, [w1, w2], [None, b2])

    if fused:
        request.getfixturevalue("interpreter")
    assert_same_function(function, plain_norm_linear, [X, NORM, W1, W2, B2], 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_norm_linear_takes_gradients_through_some_outputs_only(fused, request):
    if fused:
        request.getfixturevalue("interpreter")
    x, norm, w1, w2, b2 = (t.detach().float().requires_grad_() for t in (X, NORM, W1, W2, B2))
    if fused:
        outputs = kernels("FusedNormLinear")(x, norm, 1e-6, torch.float32, 2, w1, w2, None, b2)
    else:
        outputs = norm_linear(x, norm, 1e-6, [w1, w2], [None, b2])
    outputs[1].square().sum().backward()
    assert w1.grad is None
    assert w2.grad.abs().sum() > 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm_linear_adds_the_residual(fused, norm_before_gate, request):
    def function(x, gate, norm, w, b, residual):
        if fused:
            fields = x, gate, norm, 1e-6, norm_before_gate, 2, torch.float32, w, b, residual, False
            return (kernels("FusedGatedNormLinear")(*fields),)
        order = {"norm_before_gate": norm_before_gate, "groups": 2}
        return (gated_norm_linear(x, gate, norm, 1e-6, w, b, residual=residual, **order),)

    def reference(x, gate, norm, w, b, residual):
        hidden = gated_rms_norm(x, gate, norm, 1e-6, norm_before_gate=norm_before_gate, groups=2)
        return (residual + F.linear(hidden, w, b),)

    if fused:
        request.getfixturevalue("interpreter")
    inputs = [X, draw(2, 9, 24, seed=5), NORM, W1, draw(16, seed=6), draw(2, 9, 16, seed=7)]
    assert_same_function(function, reference, inputs, 1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_swiglu_mlp_is_the_feed_forward_half_of_a_block(fused, recompute, request):
    def function(x, norm, gate, up, down):
        if fused:
            return (kernels("FusedSwiGLUMLP")(x, norm, 1e-6, torch.float32, recompute, gate, up, down),)
        return (swiglu_mlp(x, norm, 1e-6, gate, up, down, recompute=recompute),)

    def reference(x, norm, gate, up, down):
        hidden = rms_norm(x, norm, 1e-6)
        return (x + F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down),)

    if fused:
        request.getfixturevalue("interpreter")
    weights = [draw(40, 24, seed=3), draw(40, 24, seed=5), draw(24, 40, seed=6)]
    assert_same_function(function, reference, [X, NORM, *weights], 1e-5)


def test_a_region_that_ends_in_a_product_runs_again_without_it(interpreter, monkeypatch):
    """Gradients are those of the plain run, though the second run leaves the product out."""
    from models.blocks import recomputed
    from models.ops import linear, linear_triton

    monkeypatch.setattr(linear, "_fused", lambda *_: True)
    products = []
    product = linear_triton._product
    monkeypatch.setattr(linear_triton, "_product", lambda *fields: products.append(1) or product(*fields))
    inputs = [X, draw(2, 9, 24, seed=5), NORM, W1, draw(2, 9, 16, seed=7)]

    def region(x, gate, norm, w, residual):
        options = {"norm_before_gate": True, "ends_recomputation": True}
        return gated_norm_linear(torch.tanh(x), gate, norm, 1e-6, w, residual=residual, **options)

    gradients = []
    for run in (region, recomputed(region)):
        leaves = [t.detach().float().requires_grad_() for t in inputs]
        gradients.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected)
    assert len(products) == 2


def test_products_run_in_the_autocast_dtype_around_an_fp32_stream():
    x, norm, w1, w2 = (t.detach().float() for t in (X, NORM, W1, W2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, _, through = norm_linear(x, norm, 1e-6, [w1, w2])
        total = swiglu_mlp(x, norm, 1e-6, w2, w2, w2.T)
    assert first.dtype == torch.bfloat16
    assert through.dtype == total.dtype == torch.float32

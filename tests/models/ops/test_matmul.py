"""Products in float8: the torch twin against float64, kernels against the twin, whole operators with
gradients."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import matmul
from models.ops.matmul import (
    Scaled,
    input_gradient,
    product,
    quantise_columns,
    quantise_rows,
    weight_gradient,
)
from models.ops.norm import gated_rms_norm, rms_norm

BOUND = 0.045  # of a product of two factors in e4m3: rounding to 3 bits is 2.6 % of each, 3.7 % of both
USED = 0.02  # bf16 stays far below: who is above has used float8


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, expected) -> float:
    """Relative, by norm."""
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture
def fp8():
    matmul.set_products("fp8")
    yield
    matmul.set_products("bf16")


@pytest.fixture
def narrow_too(fp8, monkeypatch):
    """Small matrices in float8 as well, so that the interpreter has little to do."""
    monkeypatch.setattr(matmul, "_SMALLEST_SIDE", 32)


def test_products_are_bf16_unless_chosen():
    assert matmul.products() == "bf16"
    hidden, weight = draw(1024, 1024, dtype=torch.bfloat16), draw(1024, 1024, seed=1)
    assert torch.equal(product(hidden, weight, None, None), F.linear(hidden, weight.bfloat16()))
    with pytest.raises(ValueError, match="use one of bf16, fp8"):
        matmul.set_products("int8")


def test_fp8_is_refused_where_the_fused_operators_are_switched_off(monkeypatch):
    monkeypatch.setenv("STATEX_BACKEND", "torch")
    with pytest.raises(ValueError, match="STATEX_BACKEND=torch"):
        matmul.set_products("fp8")
    assert matmul.products() == "bf16"


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"NVIDIA A100 has compute capability 8\.0, and float8 needs 8\.9"):
        matmul.set_products("fp8")


# ------------------------------------------------------------------------------------------- quantisation


def test_every_row_uses_the_whole_range_and_is_off_by_half_a_step_at_most():
    x = draw(40, 96) * torch.logspace(-20, 20, 40).unsqueeze(1)
    values, scale = quantise_rows([x])
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.float().abs().amax(1), torch.full((40,), 448.0))
    off = (values.float() * scale - x).abs()
    # half a step: 2^-4 of the number, or half of the smallest float8, 2^-9
    assert (off <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.0001).all()
    assert error(values.float() * scale, x.double()) < 0.03


def test_joined_matrices_share_a_scale_and_columns_are_rows_of_the_transpose():
    a, b = draw(48, 32), 10 * draw(48, 64, seed=1)
    values, scale = quantise_rows([a, b])
    whole = quantise_rows([torch.cat([a, b], dim=1)])
    assert torch.equal(values.float(), whole.values.float())
    assert torch.equal(scale, whole.scale)
    values, scale = quantise_columns([a, draw(16, 32, seed=2)])
    assert values.shape == (32, 64)
    assert scale.shape == (32, 1)


def test_rows_of_zeros_stay_zero_and_what_is_not_finite_stays_so():
    x = draw(32, 32)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    left, right = quantise_rows([x]), quantise_rows([draw(32, 32, seed=1)])
    y = matmul.scaled_product(left, right, fast=True)
    assert (y[0] == 0).all()
    assert y[1:3].isnan().all()
    assert y[3:].isfinite().all()


def kernels_in_fp32(monkeypatch):
    """The kernels with fp32 in place of float8: the interpreter's cast to float8 does not carry into the
    exponent."""
    from models.ops import matmul_triton

    monkeypatch.setattr(matmul_triton, "FORMAT", torch.float32)
    return matmul_triton


def plain_in_fp32(parts) -> Scaled:
    joined = torch.cat([part.float() for part in parts], dim=1)
    amax = joined.abs().amax(1, keepdim=True).clamp(min=matmul.SMALLEST_AMAX)
    return Scaled(joined * (matmul.LARGEST / amax), amax / matmul.LARGEST)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_row_kernel_is_its_twin(count, interpreter, monkeypatch):
    wide = draw(9, 160, seed=7, dtype=torch.bfloat16)
    parts = [draw(9, 80, dtype=torch.bfloat16), wide[:, 32:80], draw(9, 2100, seed=1), draw(9, 16, seed=2)]
    parts[0][3], wide[3] = 0, 0
    parts = parts[:count]
    values, scale = kernels_in_fp32(monkeypatch).quantise_rows_kernel(parts)
    expected = plain_in_fp32(parts)
    torch.testing.assert_close(values, expected.values)
    torch.testing.assert_close(scale, expected.scale)


@pytest.mark.parametrize("rows", [[80], [64, 48], [16, 70, 33]])
def test_the_column_kernel_is_its_twin(rows, interpreter, monkeypatch):
    parts = [draw(count, 100, seed=count) for count in rows]
    parts[0][:, 5] = 0
    values, scale = kernels_in_fp32(monkeypatch).quantise_columns_kernel(parts)
    expected = plain_in_fp32([part.T for part in parts])
    torch.testing.assert_close(values, expected.values)
    torch.testing.assert_close(scale, expected.scale)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word for what is tested
def test_the_row_kernel_keeps_what_is_not_finite(interpreter, monkeypatch):
    x = draw(4, 64)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    values, scale = kernels_in_fp32(monkeypatch).quantise_rows_kernel([x])
    assert (values * scale)[0].isnan().any()
    assert (values * scale)[1].isnan().any()
    assert (values * scale)[2:].isfinite().all()


# ----------------------------------------------------------------------------------------------- products


def test_an_output_in_fp8_is_within_its_bound(fp8):
    hidden, weight = draw(1024, 1040, dtype=torch.bfloat16), draw(1024, 1040, seed=1)
    bias, residual = draw(1024, seed=2), draw(1024, 1024, seed=3)
    exact = hidden.double() @ weight.double().T
    assert USED < error(product(hidden, weight, None, None), exact) < BOUND
    for stream in (residual, residual.bfloat16()):
        y = product(hidden, weight, bias, stream)
        assert y.dtype == stream.dtype
        assert error(y - stream.double() - bias, exact) < BOUND
    assert torch.equal(residual, draw(1024, 1024, seed=3))


def test_an_input_gradient_in_fp8_is_within_its_bound(fp8):
    """Five wide products and a narrow one, of gradients that differ in size and have heavy tails."""
    dys, weights = [], []
    for i, width in enumerate((1024, 1040, 16, 1024, 1024, 1024)):
        tails = torch.exp(2 * draw(1024, width, seed=40 + i))
        dys.append((draw(1024, width, seed=i) * tails * 2.0**-i).bfloat16())
        weights.append(draw(width, 1024, seed=20 + i))
    exact = sum(dy.double() @ weight.double() for dy, weight in zip(dys, weights))
    assert USED < error(input_gradient(dys, weights), exact) < BOUND


@pytest.mark.parametrize(
    ("tokens", "width"), [(1024, 1008), (1008, 1024), (1024, 1032), (1032, 1024)], ids=str
)
def test_narrow_and_odd_products_stay_in_bf16(fp8, tokens, width):
    hidden, weight = draw(tokens, width, dtype=torch.bfloat16), draw(1024, width, seed=1)
    assert torch.equal(product(hidden, weight, None, None), F.linear(hidden, weight.bfloat16()))
    dy = draw(tokens, 1024, seed=2, dtype=torch.bfloat16)
    assert torch.equal(input_gradient([dy], [weight]), dy @ weight.bfloat16())


def test_weight_gradients_and_fp32_products_stay_as_they_are(fp8):
    hidden, dy = (draw(1024, 1024, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    assert torch.equal(weight_gradient(dy, hidden, hidden), dy.T @ hidden)
    assert torch.equal(product(hidden.float(), dy.float(), None, None), F.linear(hidden.float(), dy.float()))


def test_an_input_is_quantised_once_until_it_changes(narrow_too, monkeypatch):
    count = []
    monkeypatch.setattr(matmul, "quantise_rows", lambda parts: count.append(1) or quantise_rows(parts))
    hidden, weight = draw(32, 32, dtype=torch.bfloat16), draw(32, 32, seed=1)
    first = product(hidden, weight, None, None)
    assert torch.equal(product(hidden, weight, None, None), first)
    assert len(count) == 3  # the input, and the weight twice
    hidden.mul_(2)
    assert torch.equal(product(hidden, weight, None, None), 2 * first)
    with torch.inference_mode():
        assert torch.equal(product(hidden * 1, weight, None, None), 2 * first)


# ------------------------------------------------------------------------------ operators, with gradients


def assert_within(function, reference, inputs, bound):
    """Outputs and gradients of `function` in bf16 around fp32 leaves, against `reference` in float64."""
    low = [t.clone().requires_grad_() for t in inputs]
    high = [t.double().requires_grad_() for t in inputs]
    outputs, expected = function(*low), reference(*high)
    weights = [draw(*y.shape, seed=90 + i) for i, y in enumerate(expected)]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights))
    wanted = sum((y * w.double()).sum() for y, w in zip(expected, weights))
    pairs = [*zip(outputs, expected), *zip(torch.autograd.grad(loss, low), torch.autograd.grad(wanted, high))]
    errors = [error(got, target) for got, target in pairs]
    assert max(errors) < bound, errors
    assert max(errors) > USED, errors


def fused(name):
    from models.ops import linear_triton

    return getattr(linear_triton, name).apply


def test_norm_linear_in_fp8(interpreter, narrow_too):
    def function(x, norm, w1, w2, w3):
        weights = w1, w2, w3, None, None, None
        return fused("FusedNormLinear")(x, norm, 1e-6, torch.bfloat16, 3, *weights)

    def reference(x, norm, *weights):
        hidden = rms_norm(x, norm, 1e-6)
        return *(F.linear(hidden, w) for w in weights), x

    weights = [draw(rows, 64, seed=rows) / 8 for rows in (96, 48, 16)]  # the last is too narrow
    assert_within(function, reference, [draw(2, 24, 64), draw(64, seed=1), *weights], BOUND)


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm_linear_in_fp8(norm_before_gate, interpreter, narrow_too):
    def function(x, gate, norm, w, residual):
        fields = x, gate, norm, 1e-6, norm_before_gate, 2, torch.bfloat16, w, None, residual, None
        return (fused("FusedGatedNormLinear")(*fields),)

    def reference(x, gate, norm, w, residual):
        hidden = gated_rms_norm(x, gate, norm, 1e-6, norm_before_gate=norm_before_gate, groups=2)
        return (residual + F.linear(hidden, w),)

    x, gate, residual = draw(2, 24, 96), draw(2, 24, 96, seed=1), draw(2, 24, 64, seed=2)
    inputs = [x, gate, draw(96, seed=3), draw(64, 96, seed=4) / 10, residual]
    assert_within(function, reference, inputs, BOUND)


@pytest.mark.parametrize("recompute", [False, True])
def test_swiglu_mlp_in_fp8(recompute, interpreter, narrow_too):
    def function(x, norm, *weights):
        return (fused("FusedSwiGLUMLP")(x, norm, 1e-6, torch.bfloat16, recompute, *weights),)

    def reference(x, norm, gate, up, down):
        hidden = rms_norm(x, norm, 1e-6)
        return (x + F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down),)

    weights = [draw(96, 64, seed=3) / 8, draw(96, 64, seed=4) / 8, draw(64, 96, seed=5) / 10]
    # three products in a row
    assert_within(function, reference, [draw(2, 24, 64), draw(64, seed=1), *weights], 2 * BOUND)

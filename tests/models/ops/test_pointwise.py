"""Norms, SwiGLU and the chunked cross-entropy against their definitions in float64, gradients included.

The Triton kernels run on the CPU through Triton's interpreter (fp32 only: its bf16 arithmetic is unsound);
the same comparisons run on the GPU in `test_pointwise_gpu.py`.
"""

import pytest
import torch
import torch.nn.functional as F

from models.ops.activation import swiglu
from models.ops.cross_entropy import linear_cross_entropy
from models.ops.norm import gated_rms_norm, rms_norm


def draw(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def definition_of_rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_close(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.isfinite(got).all()
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


def test_rms_norm_is_its_definition_in_float64():
    x, weight = draw(3, 5, 24), draw(24, seed=1)
    assert_close(
        gradients(rms_norm(x, weight, 1e-6), (x, weight)),
        gradients(definition_of_rms_norm(x, weight, 1e-6), (x, weight)),
        1e-12,
    )


def test_rms_norm_adds_the_residual_first_and_keeps_its_dtype():
    x, weight = draw(4, 24, dtype=torch.bfloat16), draw(24, seed=1, dtype=torch.float32)
    residual = draw(4, 24, seed=2, dtype=torch.float32)
    y, total = rms_norm(x, weight, 1e-6, residual=residual)
    assert total.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(total, residual + x.float())
    torch.testing.assert_close(y, definition_of_rms_norm(total, weight, 1e-6).bfloat16())


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm_works_on_each_group(norm_before_gate):
    x, gate, weight = draw(2, 3, 32), draw(2, 3, 32, seed=1), draw(32, seed=2)
    y = gated_rms_norm(x, gate, weight, 1e-6, norm_before_gate=norm_before_gate, groups=2)
    expected = []
    for half in (slice(0, 16), slice(16, 32)):
        a, z, w = x[..., half], F.silu(gate[..., half]), weight[half]
        part = (
            definition_of_rms_norm(a, w, 1e-6) * z
            if norm_before_gate
            else definition_of_rms_norm(a * z, w, 1e-6)
        )
        expected.append(part)
    torch.testing.assert_close(y, torch.cat(expected, -1))


def test_gated_norm_refuses_a_weight_that_does_not_fit():
    with pytest.raises(ValueError, match="do not fit together"):
        gated_rms_norm(draw(2, 32), draw(2, 32), draw(12), 1e-6, norm_before_gate=True, groups=2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_cross_entropy_and_its_gradients_equal_those_of_full_logits(reduction, chunk_size):
    hidden, weight = draw(2, 7, 16), draw(29, 16, seed=1)
    labels = torch.randint(0, 29, (2, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = -100
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_size=chunk_size)
    expected = F.cross_entropy((hidden @ weight.T).transpose(1, 2), labels, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    assert_close(gradients(loss, (hidden, weight)), gradients(expected, (hidden, weight)), 1e-12)


def test_cross_entropy_without_any_label_is_zero_with_zero_gradients():
    hidden, weight = draw(4, 8), draw(11, 8, seed=1)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label", [-1, 11, 0.5])
def test_cross_entropy_refuses_labels_that_are_no_words(reduction, label):
    labels = torch.tensor([3, -100, label, 4])
    with pytest.raises(ValueError, match="labels must be"):
        linear_cross_entropy(draw(4, 8), draw(11, 8, seed=1), labels, reduction=reduction)


@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_the_kernel_makes_a_label_that_is_no_word_nan(interpreter, label):
    from models.ops.cross_entropy_triton import softmax_gradient_

    logits, labels = draw(3, 11, dtype=torch.float32).detach(), torch.tensor([3, label, -100])
    expected = F.cross_entropy(logits[:1], labels[:1])
    losses = softmax_gradient_(logits.clone(), labels, -100)
    torch.testing.assert_close(losses[0], expected)
    assert losses[1].isnan()
    assert losses[2] == 0


def test_cross_entropy_computes_in_the_autocast_dtype_and_returns_fp32_gradients_of_the_head():
    hidden, weight = draw(6, 8, dtype=torch.float32), draw(11, 8, seed=1, dtype=torch.float32)
    labels = torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels)
    assert abs(loss.item() - exact.item()) < 0.02  # bf16 logits: 2**-9 relative on values of a few units


def test_unknown_reduction_and_shapes_are_refused():
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(draw(4, 8), draw(11, 8), torch.zeros(4, dtype=torch.long), reduction="max")
    with pytest.raises(ValueError, match="do not fit together"):
        linear_cross_entropy(draw(4, 8), draw(11, 9), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("gate_order", "groups"), [(None, 1), ("after", 1), ("after", 2), ("before", 1), ("before", 2)]
)
def test_norm_kernel_equals_the_definition(interpreter, gate_order, groups):
    from models.ops.norm_triton import fused_norm

    # the gate is a slice of a wider projection, and 37 rows fill no whole tile
    wide = draw(37, 100, seed=1, dtype=torch.float32)
    x, gate = draw(37, 48, dtype=torch.float32), wide[:, 20:68]
    weight = draw(48 if groups == 2 else 48 // groups, seed=2, dtype=torch.float32)
    if gate_order is None:
        y, expected = fused_norm(x, weight, 1e-6)[0], rms_norm(x.double(), weight.double(), 1e-6)
        inputs = (x, weight)
    else:
        order = {"norm_before_gate": gate_order == "after", "groups": groups}
        y = fused_norm(x, weight, 1e-6, gate=gate, **order)[0]
        expected = gated_rms_norm(x.double(), gate.double(), weight.double(), 1e-6, **order)
        inputs = (x, wide, weight)
    assert_close([y], [expected], 1e-6)
    assert_close(gradients(y, inputs), gradients(expected, inputs), 1e-5)


def test_norm_kernel_shares_a_weight_between_groups_and_adds_a_residual(interpreter):
    from models.ops.norm_triton import fused_norm

    x, gate, weight = (
        draw(9, 48, dtype=torch.float32),
        draw(9, 48, seed=1, dtype=torch.float32),
        draw(16, seed=2),
    )
    weight = weight.detach().float().requires_grad_()
    y = fused_norm(x, weight, 1e-6, gate=gate, groups=3)[0]
    expected = gated_rms_norm(
        x.double(), gate.double(), weight.double(), 1e-6, norm_before_gate=True, groups=3
    )
    assert_close(gradients(y, (x, gate, weight)), gradients(expected, (x, gate, weight)), 1e-5)

    residual, weight = draw(9, 48, seed=3, dtype=torch.float32), draw(48, seed=4, dtype=torch.float32)
    y, total = fused_norm(x, weight, 1e-6, residual=residual)
    wanted, wanted_total = rms_norm(x.double(), weight.double(), 1e-6, residual=residual.double())
    inputs = (x, residual, weight)
    assert_close(gradients(y * total, inputs), gradients(wanted * wanted_total, inputs), 1e-5)


def test_swiglu_kernel_equals_the_definition(interpreter):
    from models.ops.activation_triton import fused_swiglu

    gate, up = draw(5, 700, dtype=torch.float32, scale=4), draw(5, 700, seed=1, dtype=torch.float32)
    y, expected = fused_swiglu(gate, up), swiglu(gate.double(), up.double())
    assert_close([y], [expected], 1e-6)
    assert_close(gradients(y, (gate, up)), gradients(expected, (gate, up)), 1e-5)


def test_softmax_gradient_kernel_equals_the_definition(interpreter):
    from models.ops.cross_entropy_triton import softmax_gradient_

    logits = draw(5, 5000, dtype=torch.float32, scale=5).detach()
    labels = torch.tensor([0, 4999, -100, 17, 4096])
    reference = logits.double().requires_grad_()
    expected = F.cross_entropy(reference, labels, reduction="none")
    expected.sum().backward()
    losses = softmax_gradient_(logits, labels, -100)
    assert_close([losses, logits], [expected, reference.grad], 1e-5)

"""GLA's Triton kernels through Triton's interpreter, in float32: against the chunked torch path in float64.

What only a GPU shows (bf16 operands, compiled code, full sizes) is in test_gla_gpu.py.
"""

from contextlib import contextmanager

import pytest
import torch

from models.ops.gla import gla, gla_gated
from models.ops.gla_triton_settings import default_wide

from .test_gla import assert_close, make_inputs, run

pytestmark = pytest.mark.usefixtures("interpreter")


def run_kernels(inputs, *, chunk=128, blocks=False, **options):
    """The kernels at a chosen chunk size, on float32 copies of the inputs; `blocks`: by descriptors."""
    from models.ops import gla_triton

    settings = default_wide(inputs[0].shape[-1], inputs[2].shape[-1])
    settings["chunk"]["size"] = chunk
    settings["march"]["BLOCKS"] = settings["grad"]["BLOCKS"] = blocks
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(gla_triton, "settings_for", lambda q, v: settings)
        return run(gla_triton.gla_triton, [x.detach().float().requires_grad_() for x in inputs], **options)


# one sequence of each length, and several end to end
GATE_MAP_CASES = [([0, length], 64) for length in (1, 63, 64, 65)]
GATE_MAP_CASES += [([0, 130], 128), ([0, 1, 64, 64, 130], 64)]


@contextmanager
def interpreted(chunk):
    """`gla_gated` on its kernels, though `resolve` would take plain torch on a CPU."""
    from models.ops import gla_triton

    settings = default_wide(16, 16)
    settings["chunk"]["size"] = chunk
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(gla_triton, "settings_for", lambda q, v: settings)
        patch.setattr("models.ops.gla.resolve", lambda *_: "triton")
        yield


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (65, 64), (128, 64), (70, 128), (300, 256)])
def test_kernels_equal_the_torch_path(length, chunk, blocks):
    inputs = make_inputs(2, length, 1, 16, 32, gate=0.1)
    assert_close(run_kernels(inputs, chunk=chunk, blocks=blocks), run(gla, inputs), 2e-6)


@pytest.mark.parametrize("gate", [0.5, 1.0, 2.0])
def test_kernels_pass_from_factored_chunks_to_halved_blocks(gate):
    # some 150 * gate powers of two a chunk: scores leave the factored form at 100, gradients at 200;
    # float32 holds an exponent of 100 to 4e-6
    inputs = make_inputs(1, 300, 1, 16, 16, gate=gate)
    assert_close(run_kernels(inputs, chunk=128), run(gla, inputs), 1e-5)


def test_kernels_halve_blocks_under_strong_gates():
    inputs = make_inputs(1, 150, 1, 16, 16, gate=50.0)
    assert_close(run_kernels(inputs), run(gla, inputs), 1e-4)


@pytest.mark.parametrize("strong", [slice(0, 32), slice(40, 64), slice(70, 71), slice(0, 128)])
def test_kernels_tell_strong_columns_from_mild_ones(strong):
    # 128 columns are four tiles, which one program of the strong gates' kernel looks at
    inputs = make_inputs(1, 100, 1, 128, 16, gate=0.01)
    g = inputs[3].detach().clone()
    g[..., strong] *= 5000
    inputs[3] = g.requires_grad_()
    assert_close(run_kernels(inputs), run(gla, inputs), 1e-4)


def test_kernels_stay_finite_and_exact_at_minus_fifty_a_token():
    inputs = make_inputs(1, 130, 1, 16, 16)
    inputs[3] = torch.full_like(inputs[3], -50.0).requires_grad_()
    got, want = run_kernels(inputs), run(gla, inputs)
    assert got.pop("dg").abs().max() < 1e-6  # its true size is exp(-50)
    want.pop("dg")
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize("blocks", [False, True])
def test_kernels_keep_sequences_apart(blocks):
    bounds = [0, 5, 134, 134, 200]
    q, k, v, g, _ = make_inputs(1, bounds[-1], 2, 16, 16, gate=0.1)
    state = torch.randn(len(bounds) - 1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    inputs, cu_seqlens = [q, k, v, g, state], torch.tensor(bounds)
    got = run_kernels(inputs, chunk=64, blocks=blocks, cu_seqlens=cu_seqlens)
    assert_close(got, run(gla, inputs, cu_seqlens=cu_seqlens), 2e-6)


@pytest.mark.parametrize("clamp_min", [None, -0.05])
def test_kernels_read_gate_logits_and_keep_what_they_made(clamp_min):
    q, k, v, gate, state = make_inputs(1, 100, 1, 16, 16)
    inputs = [q, k, v, (3 * gate + 2).detach().requires_grad_(), state]

    def torch_path(q, k, v, gate, **options):
        return gla_gated(q, k, v, gate, gate_logit_normalizer=16.0, clamp_min=clamp_min, **options)

    assert_close(run_kernels(inputs, gate=(16.0, clamp_min), keep=True), run(torch_path, inputs), 2e-6)


@pytest.mark.parametrize("clamp_min", [None, -0.05])
@pytest.mark.parametrize(("bounds", "chunk"), GATE_MAP_CASES)
def test_kernels_make_the_logits_from_a_low_rank(bounds, chunk, clamp_min):
    q, k, v, *_ = make_inputs(1, bounds[-1], 2, 16, 16)
    draw = torch.Generator().manual_seed(3)
    shapes = (len(bounds) - 1, 2, 16, 16), (1, bounds[-1], 5), (2 * 16, 5), (2 * 16,)
    state, *low_rank_and_map = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    options = {"clamp_min": clamp_min, "cu_seqlens": torch.tensor(bounds)}

    def gradients(dtype, backend, keep=False):
        leaves = [q, k, v, state, *low_rank_and_map]
        leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
        *inputs, state_in, low_rank, weight, bias = leaves
        more = {"initial_state": state_in, "output_final_state": True, "keep": keep, "backend": backend}
        o, last = gla_gated(*inputs, low_rank, gate_map=(weight, bias), scale=0.25, **more, **options)
        loss = (o * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).sum() + last.square().sum()
        return o, last, *torch.autograd.grad(loss, leaves)

    want = gradients(torch.float64, None)
    with interpreted(chunk):
        results = gradients(torch.float32, None), gradients(torch.float32, None, keep=True)
    for got in results:
        for mine, exact in zip(got, want, strict=True):
            assert mine.dtype == torch.float32
            assert (mine.double() - exact).norm() <= 5e-6 * exact.norm()


def test_kernels_run_without_states():
    q, k, v, g, _ = make_inputs(1, 70, 1, 16, 16, dtype=torch.float32)
    from models.ops.gla_triton import gla_triton

    o, last = gla_triton(q, k, v, g, scale=0.25)
    assert last is None
    torch.testing.assert_close(o, gla(q, k, v, g, scale=0.25)[0], rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(o.square().sum(), [q, k, v, g])
    want = torch.autograd.grad(gla(q, k, v, g, scale=0.25)[0].square().sum(), [q, k, v, g])
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

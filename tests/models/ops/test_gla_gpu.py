"""GLA on a GPU: kernels against the definition in float64, forward and every gradient, at full sizes."""

import pytest
import torch

from models.ops.gla import gla, gla_recurrent

from .test_gla import assert_close, make_inputs, run

pytestmark = pytest.mark.gpu

SHAPES = [(2, 256, 512), (1, 1024, 2048)]
LENGTHS = [1, 63, 64, 65, 1000, 8192]
# by norm: bf16 rounds to 2^-9, on the way in, to the tensor cores, and out; fla's float32 products are tf32
TOLERANCES = {("triton", torch.bfloat16): 1.5e-2, ("triton", torch.float32): 1e-4}
TOLERANCES |= {("fla", torch.bfloat16): 1.5e-2, ("fla", torch.float32): 3e-3}


def run_on_gpu(backend, inputs, **options):
    def operator(*inputs, **options):
        return gla(*inputs, backend=backend, **options)

    return run(operator, [x.detach().cuda().requires_grad_() for x in inputs], **options)


def expected(inputs, **options):
    exact = [x.detach().double().cuda().requires_grad_() for x in inputs]
    definition = gla_recurrent if inputs[0].shape[1] <= 65 else gla  # the CPU tests tie the two together
    return run(definition, exact, **options)


def inputs_at(shape, dtype, length):
    H, K, V = shape
    return make_inputs(1, length, H, K, V, dtype=dtype, gate=1 / 16)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=["K256", "K1024"])
def test_triton_equals_the_definition(shape, dtype, length):
    inputs = inputs_at(shape, dtype, length)
    backend = "triton" if length > 1 else None  # one token is a decoding step
    assert_close(run_on_gpu(backend, inputs), expected(inputs), TOLERANCES["triton", dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=["K256", "K1024"])
def test_fla_equals_the_definition(shape):
    pytest.importorskip("fla")
    inputs = inputs_at(shape, torch.bfloat16, 1000)
    assert_close(run_on_gpu("fla", inputs), expected(inputs), TOLERANCES["fla", torch.bfloat16])


@pytest.mark.parametrize("shape", SHAPES, ids=["K256", "K1024"])
def test_triton_keeps_sequences_apart(shape):
    H, K, V = shape
    bounds = [0, 300, 301, 301, 1000]
    q, k, v, g, _ = inputs_at(shape, torch.bfloat16, bounds[-1])
    state = make_inputs(len(bounds) - 1, 1, H, K, V)[-1].detach().float()
    inputs, cu_seqlens = [q, k, v, g, state], torch.tensor(bounds).cuda()
    want = expected(inputs, cu_seqlens=cu_seqlens)
    assert_close(run_on_gpu("triton", inputs, cu_seqlens=cu_seqlens), want, 1.5e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=["K256", "K1024"])
def test_triton_survives_gates_of_minus_fifty(shape):
    q, k, v, g, state = inputs_at(shape, torch.bfloat16, 500)
    sudden = torch.rand(g.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    inputs = [q, k, v, torch.where(sudden, -50.0, g.detach()), state]
    assert_close(run_on_gpu("triton", inputs), expected(inputs), 1.5e-2)

"""The Mamba2 mixer as one function on the GPU, bf16 products on an fp32 stream, against float64."""

import copy

import pytest
import torch

from tests.models.ops.test_mamba2_triton import mixer_and_norm

pytestmark = pytest.mark.gpu
# relative, by norm; A and dt sum over many tokens what bf16 has rounded
TOLERANCE = {"dt_bias": 2e-2, "A_log": 3e-2}


def outcome(mixer, norm, u, du, dtype, **options):
    mixer, norm = copy.deepcopy(mixer).cuda(), copy.deepcopy(norm).cuda()
    u = u.to("cuda", dtype).requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        out, _ = mixer.to(dtype)(u * 1.0, norm.to(dtype), **options)
    out.backward(du.to("cuda", dtype))
    gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    return {"out": out - u, "u": u.grad - du.to("cuda", dtype), "norm": norm.weight.grad, **gradients}


@pytest.mark.parametrize(
    ("recompute", "in_place"), [("none", True), ("conv", False), ("scan", True), ("full", True)]
)
@pytest.mark.parametrize(("state_size", "length"), [(128, 65), (128, 2048), (512, 1000), (512, 2048)])
def test_bf16_agrees_with_float64(state_size, length, recompute, in_place):
    shape = {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "use_bias": False, "state_size": state_size}
    mixer, norm = mixer_and_norm(**shape)
    generator = torch.Generator().manual_seed(0)
    u, du = (torch.randn(1, length, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = outcome(mixer, norm, u, du, torch.float64)
    assert not mixer.is_fused(u.cuda())
    found = outcome(mixer, norm, u, du, torch.float32, recompute=recompute, in_place=in_place)
    assert mixer.is_fused(u.float().cuda())
    for name, target in expected.items():
        assert torch.isfinite(found[name]).all(), name
        error = (found[name].double() - target).norm() / target.norm()
        assert error <= TOLERANCE.get(name, 1e-2), f"{name}: {error:.1e}"

"""The step sizes' kernels through Triton's interpreter against torch in float64."""

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 2.0)])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 3), (150, 8)])
def test_step_sizes_and_their_gradients(tokens, heads, limit, interpreter):
    from models.ops import steps_triton

    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(tokens, heads + 5, generator=generator, dtype=torch.float64) * 8
    raw, bias = wide[:, 5:].float(), torch.randn(heads, generator=generator)
    ddt = torch.randn(tokens, heads, generator=generator)
    exact_raw, exact_bias = raw.double().requires_grad_(), bias.double().requires_grad_()
    expected = F.softplus(exact_raw + exact_bias, threshold=1e9).clamp(*limit)
    expected.backward(ddt.double())

    found = steps_triton.step_sizes(raw, bias, limit)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=3e-6, atol=0)
    into = torch.full((tokens, heads + 2), 7.0)
    dbias = steps_triton.step_sizes_backward(raw, bias, ddt, into[:, :heads], limit)
    torch.testing.assert_close(into[:, :heads].double(), exact_raw.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dbias.double(), exact_bias.grad, rtol=1e-5, atol=1e-5)
    assert (into[:, heads:] == 7.0).all()

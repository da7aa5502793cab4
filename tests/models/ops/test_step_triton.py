"""The decoding kernels against their twins: compiled on a GPU, through Triton's interpreter elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.conv import causal_conv1d
from models.ops.gla import gla_recurrent, log_decay
from models.ops.ssd import ssd_recurrent
from models.ops.step import states_in_place

pytest.importorskip("triton", reason="triton is not installed (it exists on Linux only)")
from models.ops.step_triton import conv_step, gla_step, ssd_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)


def close(actual, expected, atol=1e-5, rtol=1e-5):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


# one block and several, whole ones and cut ones, tensors of their own and slices of wider ones
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 2, 16, 32), (3, 1, 300, 40), (2, 4, 48, 100)])
@pytest.mark.parametrize("clamp_min", [None, -0.05])
def test_gla(draw, B, H, K, V, clamp_min):
    q, k, gate = (t.unflatten(-1, (H, K)) for t in (draw(B, 1, 3 * H * K)).split(H * K, dim=-1))
    v, state = draw(B, 1, H, V), draw(B, H, K, V)
    options = {"gate_logit_normalizer": 4.0, "clamp_min": clamp_min, "scale": 0.3}
    for carried in (state, None):
        g = log_decay(gate, 4.0, clamp_min)
        expected = gla_recurrent(q, k, v, g, scale=0.3, initial_state=carried, output_final_state=True)
        close(gla_step(q, k, v, gate, **options, initial_state=carried), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "H", "P", "G", "N"), [(1, 4, 16, 1, 32), (3, 6, 12, 2, 24), (2, 2, 32, 2, 512)]
)
def test_ssd(draw, batch, H, P, G, N):
    x, B, C = draw(batch, 1, H * P + 2 * G * N).split([H * P, G * N, G * N], dim=-1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    dt, A, D, state = F.softplus(draw(batch, 1, H)), -draw(H).exp(), draw(H), draw(batch, H, P, N)
    for skip, carried in ((D, state), (None, None)):
        expected = ssd_recurrent(x, dt, A, B, C, D=skip, initial_state=carried, output_final_state=True)
        close(ssd_step(x, dt, A, B, C, D=skip, initial_state=carried), expected, atol=1e-4)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution(draw, width, activation):
    x, weight, bias = draw(3, 1, 400)[..., 50:250], draw(200, width), draw(200)
    state = draw(3, 200, width - 1)
    for b in (bias, None):
        options = {"activation": activation, "initial_state": state, "output_final_state": True}
        expected = causal_conv1d(x, weight, b, **options, backend="torch")
        close(conv_step(x, weight, b, activation, state), expected)


def test_states_stay_as_they_are_or_where_they_are(draw):
    x, weight, conv_state = draw(2, 1, 300), draw(300, 4), draw(2, 300, 3)
    q, k, v, gla_state = draw(2, 1, 2, 32), draw(2, 1, 2, 32), draw(2, 1, 2, 48), draw(2, 2, 32, 48)
    y, dt, A, ssd_state = draw(2, 1, 4, 8), F.softplus(draw(2, 1, 4)), -draw(4).exp(), draw(2, 4, 8, 16)
    B, C = draw(2, 1, 2, 16), draw(2, 1, 2, 16)
    options = {"gate_logit_normalizer": 16.0, "clamp_min": None, "scale": 1.0}
    steps = {
        "gla": (gla_state, lambda state: gla_step(q, k, v, q, **options, initial_state=state)),
        "ssd": (ssd_state, lambda state: ssd_step(y, dt, A, B, C, D=None, initial_state=state)),
        "conv": (conv_state, lambda state: conv_step(x, weight, None, None, state)),
    }
    for name, (state, step) in steps.items():
        before = state.clone()
        expected = step(state)
        assert torch.equal(state, before), name
        with states_in_place():
            strided = before.transpose(-1, -2).contiguous().transpose(-1, -2)
            close(step(strided), expected)
            assert torch.equal(strided, before), name
            result = step(state)
        assert result[1] is state, name
        close(result, expected)


def test_half_precision_in_and_out_states_in_fp32(draw):
    q, k, v, gate = (draw(2, 1, 2, 32).bfloat16() for _ in range(4))
    options = {"gate_logit_normalizer": 16.0, "clamp_min": None, "scale": 1.0}
    expected = gla_recurrent(q, k, v, log_decay(gate, 16.0), scale=1.0, output_final_state=True)
    close(gla_step(q, k, v, gate, **options, initial_state=None), expected, rtol=2**-7)

"""Gated linear attention on the CPU: the chunked path against the step-by-step definition in float64."""

from itertools import pairwise

import pytest
import torch

from models.ops.gla import gla, gla_recurrent

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]


def make_inputs(batch, length, heads, K, V, *, dtype=torch.float64, gate=1.0, seed=0):
    """q, k, v, g (log-sigmoid of normal draws, times gate) and an initial state, all wanting gradients."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k = normal(batch, length, heads, K), normal(batch, length, heads, K)
    v = normal(batch, length, heads, V)
    g = torch.nn.functional.logsigmoid(normal(batch, length, heads, K)) * gate
    state = normal(batch, heads, K, V)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, g, state = q.to(dtype), k.to(dtype), v.to(dtype), g.to(wide), state.to(wide)
    return [x.requires_grad_() for x in (q, k, v, g, state)]


def run(operator, inputs, **options):
    """Output, final state and the gradient of a fixed random function of both for every input."""
    q, k, v, g, state = inputs
    o, last = operator(
        q, k, v, g, scale=q.shape[-1] ** -0.5, initial_state=state, output_final_state=True, **options
    )
    draw = torch.Generator().manual_seed(1)
    weight_o = torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o)
    weight_s = torch.randn(last.shape, generator=draw, dtype=torch.float64).to(last)
    gradients = torch.autograd.grad((o * weight_o).sum() + (last * weight_s).sum(), inputs)
    return dict(zip(["o", "state", "dq", "dk", "dv", "dg", "dstate"], (o, last, *gradients)))


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}  # a NaN is bad
    assert not bad, f"relative errors above {tolerance}: {bad}"


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence(length):
    inputs = make_inputs(2, length, 2, 8, 12)
    assert_close(run(gla, inputs), run(gla_recurrent, inputs), 1e-12)


@pytest.mark.parametrize("gate", [0.01, 50.0])
def test_strong_and_weak_gates_equal_the_recurrence(gate):
    inputs = make_inputs(1, 130, 2, 8, 12, gate=gate)
    assert_close(run(gla, inputs), run(gla_recurrent, inputs), 1e-12)


def test_gates_of_minus_fifty_everywhere_are_finite_and_equal_the_recurrence():
    q, k, v, g, state = make_inputs(1, 130, 2, 8, 12)
    inputs = [q, k, v, torch.full_like(g, -50.0).requires_grad_(), state]
    got = run(gla, inputs)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, run(gla_recurrent, inputs), 1e-12)
    single = [x.detach().float().requires_grad_() for x in inputs]
    assert_close(run(gla, single), got, 1e-5)


BOUNDS = [[0, 70], [0, 1, 70], [0, 5, 64, 70], [0, 0, 65, 70, 70]]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("operator", [gla, gla_recurrent])
def test_sequences_end_to_end_equal_sequences_alone(operator, bounds):
    q, k, v, g, _ = make_inputs(1, bounds[-1], 2, 8, 12)
    state = torch.randn(len(bounds) - 1, 2, 8, 12, dtype=torch.float64, requires_grad=True)

    def one_by_one(q, k, v, g, *, initial_state, **options):
        pieces = [
            gla_recurrent(
                *(x[:, a:b] for x in (q, k, v, g)), initial_state=initial_state[n : n + 1], **options
            )
            for n, (a, b) in enumerate(pairwise(bounds))
        ]
        return torch.cat([o for o, _ in pieces], dim=1), torch.cat([last for _, last in pieces])

    inputs = [q, k, v, g, state]
    assert_close(run(operator, inputs, cu_seqlens=torch.tensor(bounds)), run(one_by_one, inputs), 1e-12)


def test_a_sequence_in_two_pieces_equals_the_whole():
    q, k, v, g, _ = make_inputs(2, 100, 2, 8, 12)
    whole, last = gla(q, k, v, g, scale=0.3, output_final_state=True)
    first, carried = gla(*(x[:, :37] for x in (q, k, v, g)), scale=0.3, output_final_state=True)
    second, end = gla(
        *(x[:, 37:] for x in (q, k, v, g)), scale=0.3, initial_state=carried, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", [gla, gla_recurrent])
def test_bf16_keeps_state_and_decay_in_float32(operator):
    inputs = make_inputs(2, 70, 2, 16, 16, dtype=torch.bfloat16)
    got = run(operator, inputs)
    assert got["o"].dtype == torch.bfloat16
    assert got["state"].dtype == torch.float32
    exact = run(gla_recurrent, [x.detach().double().requires_grad_() for x in inputs])
    assert_close(got, exact, 5e-3)  # outputs and gradients of bf16 inputs are rounded to 8 bits: 2 ** -9 each


def test_float64_stays_float64_and_no_state_is_returned_unasked():
    q, k, v, g, _ = make_inputs(1, 20, 1, 8, 8)
    o, state = gla(q, k, v, g, scale=1.0)
    assert o.dtype == torch.float64
    assert state is None


def test_misfitting_shapes_are_named():
    q, k, v, g, state = make_inputs(2, 8, 2, 8, 12)
    with pytest.raises(ValueError, match=r"one shape \[B, T, H, K\]"):
        gla(q, k[..., :4], v, g, scale=1.0)
    with pytest.raises(ValueError, match="batch of one"):
        gla(q, k, v, g, scale=1.0, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 12\)"):
        gla(q, k, v, g, scale=1.0, initial_state=state[:1])

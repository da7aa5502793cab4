"""The SSD operator in plain torch. Oracle: the recurrence itself, token by token, in float64."""

import pytest
import torch

from models.ops.ssd import ssd, ssd_packed, ssd_recurrent

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def make_inputs(
    batch, length, heads=4, groups=2, head_dim=16, state_size=8, sequences=None, seed=0, strength=1.0
):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {
        "x": normal(batch, length, heads, head_dim),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads)) * strength,
        "A": -torch.rand(heads, generator=draw, dtype=torch.float64) - 0.05,
        "B": normal(batch, length, groups, state_size),
        "C": normal(batch, length, groups, state_size),
        "D": normal(heads),
        "initial_state": normal(sequences or batch, heads, head_dim, state_size),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def results_and_gradients(operator, inputs, **options):
    y, state = operator(**inputs, output_final_state=True, **options)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (y, state)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, state), weights))
    given = {name: inputs[name] for name in NAMES if inputs[name] is not None}
    return {"y": y, "state": state, **dict(zip(given, torch.autograd.grad(loss, list(given.values()))))}


def assert_close(found, expected, tolerance):
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"  # false for NaN too


@pytest.mark.parametrize("length", [1, 5, 16, 33, 100])
@pytest.mark.parametrize("chunk_size", [16, 256])
def test_chunks_equal_the_recurrence(length, chunk_size):
    inputs = make_inputs(2, length)
    expected = results_and_gradients(ssd_recurrent, inputs)
    found = results_and_gradients(ssd, inputs, chunk_size=chunk_size, backend="torch")
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("offsets", [[0, 40], [0, 1, 17, 17, 40], [0, 16, 32, 40]])
def test_packed_sequences_do_not_see_each_other(offsets):
    inputs = make_inputs(1, 40, sequences=len(offsets) - 1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    expected = results_and_gradients(ssd_recurrent, inputs, cu_seqlens=cu_seqlens)
    found = results_and_gradients(ssd, inputs, cu_seqlens=cu_seqlens, chunk_size=16)
    assert_close(found, expected, 1e-12)
    alone = {n: t[:, offsets[-2] :] if n in ("x", "dt", "B", "C") else t for n, t in inputs.items()}
    alone["initial_state"] = inputs["initial_state"][-1:]
    torch.testing.assert_close(found["y"][:, offsets[-2] :], ssd(**alone)[0])


def test_strong_decay_neither_overflows_nor_loses_the_gradient():
    inputs = make_inputs(1, 70, strength=100.0)
    assert (inputs["dt"] * inputs["A"]).min() < -100
    expected = results_and_gradients(ssd_recurrent, inputs)
    # the gradient of A sums terms that cancel: exp(-100) of the signal is left
    assert_close(results_and_gradients(ssd, inputs), expected, 1e-10)
    single = {n: t.detach().float().requires_grad_() for n, t in inputs.items()}
    assert_close(results_and_gradients(ssd, single), expected, 1e-4)


def test_a_sequence_read_in_two_pieces_carries_its_state():
    inputs = make_inputs(2, 50)
    whole, final = ssd(**inputs, output_final_state=True, chunk_size=16)
    state, pieces = inputs["initial_state"], []
    for piece in (slice(0, 21), slice(21, 22), slice(22, 50)):
        part = {n: t[:, piece] if n in ("x", "dt", "B", "C") else t for n, t in inputs.items()}
        y, state = ssd(**{**part, "initial_state": state}, output_final_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_keep_an_fp32_state(autocast):
    inputs = make_inputs(1, 40)
    expected = results_and_gradients(ssd_recurrent, inputs)
    low = {n: t.detach().to(torch.bfloat16 if n in "xBC" else torch.float32) for n, t in inputs.items()}
    low = {n: t.requires_grad_() for n, t in low.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results_and_gradients(ssd, low)
    assert found["y"].dtype == torch.bfloat16
    assert found["state"].dtype == torch.float32
    assert_close(found, expected, 1e-2)


def test_defaults_are_no_skip_no_state():
    inputs = make_inputs(1, 20)
    y, state = ssd(*(inputs[n] for n in ("x", "dt", "A", "B", "C")))
    zeros = {"D": torch.zeros_like(inputs["D"]), "initial_state": torch.zeros_like(inputs["initial_state"])}
    torch.testing.assert_close(y, ssd_recurrent(**{**inputs, **zeros})[0])
    assert state is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(1, 8, 3)}, "dt has shape"),
        ({"B": torch.zeros(1, 8, 3, 8), "C": torch.zeros(1, 8, 3, 8)}, "cannot share 3 groups"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 9]), "initial_state": None}, "cu_seqlens must rise"),
        ({"backend": "triton"}, "triton"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = make_inputs(1, 8)
    with pytest.raises(ValueError, match=message):
        ssd(**{**inputs, **change})


@pytest.mark.parametrize("length", [1, 20])
def test_packed_inputs_are_split(length):
    inputs = make_inputs(2, length, groups=2, state_size=8)
    expected = results_and_gradients(ssd, inputs)

    def packed(x, dt, A, B, C, **options):
        xBC = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
        return ssd_packed(xBC, dt, A, groups=2, state_size=8, **options)

    assert_close(results_and_gradients(packed, inputs), expected, 1e-12)


def test_packed_inputs_of_a_wrong_width_are_named():
    with pytest.raises(ValueError, match="xBC has 31 channels"):
        ssd_packed(torch.zeros(1, 4, 31), torch.ones(1, 4, 2), -torch.ones(2), groups=1, state_size=8)

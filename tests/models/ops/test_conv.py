"""The short convolution in plain torch. Oracle: torch's own grouped convolution, one sequence at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from models.ops.conv import causal_conv1d


def make_inputs(batch, length, channels=6, width=4, sequences=None, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (sequences or batch, channels, width - 1),
    }
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def oracle(x, weight, bias, initial_state, activation):
    past = torch.cat([initial_state, x.transpose(1, 2)], dim=2)
    y = F.conv1d(past, weight.unsqueeze(1), bias, groups=x.shape[2])
    y = F.silu(y) if activation else y
    return y.transpose(1, 2), past[:, :, past.shape[2] - weight.shape[1] + 1 :]


def assert_same_with_gradients(found, expected, inputs):
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in expected]
    gradients = []
    for pair in (found, expected):
        loss = sum((t * w).sum() for t, w in zip(pair, weights))
        gradients.append(torch.autograd.grad(loss, list(inputs.values())))
    torch.testing.assert_close((*found, *gradients[0]), (*expected, *gradients[1]))


@pytest.mark.parametrize("length", [1, 2, 3, 20])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 4])
def test_equals_a_grouped_convolution(length, activation, width):
    inputs = make_inputs(2, length, width=width)
    found = causal_conv1d(**inputs, activation=activation, output_final_state=True)
    assert_same_with_gradients(found, oracle(**inputs, activation=activation), inputs)


@pytest.mark.parametrize("offsets", [[0, 12], [0, 1, 3, 3, 12], [0, 6, 12]])
def test_nothing_leaks_over_a_document_boundary(offsets):
    inputs = make_inputs(1, 12, sequences=len(offsets) - 1)
    found = causal_conv1d(
        **inputs,
        activation="silu",
        output_final_state=True,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
    )
    weight, bias, state = inputs["weight"], inputs["bias"], inputs["initial_state"]
    parts = [
        oracle(inputs["x"][:, first:last], weight, bias, state[i : i + 1], "silu")
        if first < last
        else (inputs["x"][:, :0], state[i : i + 1])
        for i, (first, last) in enumerate(pairwise(offsets))
    ]
    expected = torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])
    assert_same_with_gradients(found, expected, inputs)


def test_one_token_at_a_time_equals_the_whole():
    inputs = make_inputs(2, 9)
    whole, final = causal_conv1d(**inputs, activation="silu", output_final_state=True)
    state, tokens = inputs["initial_state"], []
    for t in range(9):
        step = {**inputs, "x": inputs["x"][:, t : t + 1], "initial_state": state}
        y, state = causal_conv1d(**step, activation="silu", output_final_state=True)
        tokens.append(y)
    torch.testing.assert_close(torch.cat(tokens, dim=1), whole)
    torch.testing.assert_close(state, final)


def test_without_a_state_the_past_is_zero_and_bias_is_optional():
    inputs = make_inputs(1, 5)
    y, state = causal_conv1d(inputs["x"], inputs["weight"])
    zeros = [torch.zeros_like(inputs[n]) for n in ("bias", "initial_state")]
    torch.testing.assert_close(y, oracle(inputs["x"], inputs["weight"], *zeros, None)[0])
    assert state is None


def test_a_slice_of_a_projection_in_bf16():
    inputs = make_inputs(1, 30, channels=8, dtype=torch.bfloat16)
    wide = torch.cat([inputs["x"], inputs["x"], inputs["x"]], dim=2)[:, :, 8:16]
    exact = oracle(*(inputs[n].double() for n in ("x", "weight", "bias", "initial_state")), "silu")[0]
    y, _ = causal_conv1d(**{**inputs, "x": wide}, activation="silu")
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"initial_state": torch.zeros(1, 6, 4)}, "initial_state has shape"),
        ({"activation": "gelu"}, "activation 'gelu' is unknown"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make_inputs(1, 4), **change})

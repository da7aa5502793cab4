"""The SSD kernels of this repository through Triton's interpreter, fp32. Oracle: the recurrence in float64.

The interpreter multiplies bf16 matrices wrongly and knows no tensor cores: bf16 belongs to the gpu tests.
"""

import json

import pytest
import torch

from models.ops.kernel_configs import FOLDER
from models.ops.ssd import ssd_recurrent
from tests.models.ops.test_ssd import assert_close, make_inputs, results_and_gradients

# values on the other side of the diagonal overflow before they are masked away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = {
    "chunk": {"Q": 32},
    "scores": {"ROWS": 16, "BLOCK_N": 16},
    "states": {"HEADS": 2, "BLOCK_K": 16, "BLOCK_N": 16},
    "march": {"BLOCK_K": 16, "BLOCK_N": 16, "STAGES": 2},
    "march_back": {"BLOCK_K": 16, "BLOCK_N": 16, "STAGES": 2},
    "pass": {"BLOCK": 128},
    "pass_gradients": {"BLOCK": 128},
    "outputs": {"ROWS": 16, "BLOCK_K": 16, "BLOCK_N": 16},
    "score_gradients": {"ROWS": 16, "STAGES": 2},
    "key_gradients": {"ROWS": 16, "BLOCK_K": 16, "BLOCK_N": 16, "STAGES": 2},
    "steps": {"HEADS": 2},
}


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """The operator on tiles so small that every loop and every edge is met by short sequences."""
    from models.ops import ssd_triton, ssd_triton_shape

    monkeypatch.setitem(ssd_triton_shape.CONFIGS, 4, SMALL)
    return ssd_triton.ssd_triton


def single(inputs):
    return {name: t.detach().float().requires_grad_() for name, t in inputs.items()}


@pytest.mark.parametrize(("batch", "length", "groups"), [(1, 1, 1), (1, 50, 1), (2, 33, 2)])
def test_kernels_equal_the_recurrence(kernels, batch, length, groups):
    inputs = make_inputs(batch, length, groups=groups, state_size=32)
    expected = results_and_gradients(ssd_recurrent, inputs)
    found = results_and_gradients(kernels, single(inputs), cu_seqlens=None)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (2, 2)])
def test_large_states_take_marches_and_batched_products(kernels, batch, groups, monkeypatch):
    from models.ops import ssd_triton

    monkeypatch.setattr(ssd_triton, "LARGE_STATE", 16)
    for kernel in ("states_kernel", "pass_states_kernel", "pass_gradients_kernel"):
        monkeypatch.setattr(ssd_triton, kernel, None)  # not taken
    inputs = make_inputs(batch, 64, groups=groups, state_size=32)  # two tiles of BLOCK_N
    expected = results_and_gradients(ssd_recurrent, inputs)
    assert_close(results_and_gradients(kernels, single(inputs), cu_seqlens=None), expected, 2e-5)


def test_without_the_skip(kernels):
    inputs = {name: t for name, t in make_inputs(1, 50, state_size=16).items() if name != "D"}
    expected = results_and_gradients(ssd_recurrent, {**inputs, "D": None})
    found = results_and_gradients(kernels, {**single(inputs), "D": None}, cu_seqlens=None)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize(("rows", "large"), [(16, False), (32, False), (16, True)])
def test_packed_sequences_do_not_see_each_other(kernels, rows, large, monkeypatch):
    from models.ops import ssd_triton

    if large:
        monkeypatch.setattr(ssd_triton, "LARGE_STATE", 16)
        monkeypatch.setattr(ssd_triton, "pass_states", None)  # not taken
    for kernel in ("outputs", "key_gradients"):
        monkeypatch.setitem(SMALL, kernel, {**SMALL[kernel], "ROWS": rows})
    cu_seqlens = torch.tensor([0, 1, 33, 33, 70])
    inputs = make_inputs(1, 70, sequences=4, state_size=32 if large else 16)
    expected = results_and_gradients(ssd_recurrent, inputs, cu_seqlens=cu_seqlens)
    found = results_and_gradients(kernels, single(inputs), cu_seqlens=cu_seqlens)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("large", [False, True])
def test_what_is_no_number_stays_in_its_sequence(kernels, large, monkeypatch):
    from models.ops import ssd_triton

    monkeypatch.setattr(ssd_triton, "LARGE_STATE", 16 if large else 1024)
    cu_seqlens = torch.tensor([0, 20, 45, 70])
    inputs = single(make_inputs(1, 70, sequences=3, state_size=16))
    expected = results_and_gradients(kernels, inputs, cu_seqlens=cu_seqlens)
    spoiled = single(inputs)
    with torch.no_grad():
        for name in ("x", "B", "C"):
            spoiled[name][:, 20:45] = torch.nan
    found = results_and_gradients(kernels, spoiled, cu_seqlens=cu_seqlens)
    for name in ("y", "x", "dt", "B", "C"):
        for tokens in (slice(0, 20), slice(45, 70)):
            torch.testing.assert_close(found[name][:, tokens], expected[name][:, tokens], rtol=0, atol=0)


def test_strong_decay_stays_finite(kernels):
    inputs = make_inputs(1, 70, strength=50.0, state_size=16)
    expected = results_and_gradients(ssd_recurrent, inputs)
    found = results_and_gradients(kernels, single(inputs), cu_seqlens=None)
    # the gradient of A sums what exp(-50) leaves: its running sums keep fp32 accuracy, not more
    assert_close({**found, "A": expected["A"]}, expected, 2e-5)
    assert_close({"A": found["A"]}, {"A": expected["A"]}, 5e-3)


@pytest.mark.parametrize("before", [0, 1])  # columns: with one, no row is aligned
@pytest.mark.parametrize("large", [False, True])
def test_slices_of_a_projection_are_read(kernels, before, large, monkeypatch):
    from models.ops import ssd_triton

    monkeypatch.setattr(ssd_triton, "LARGE_STATE", 16 if large else 1024)
    inputs = make_inputs(1, 40, state_size=16)
    lead = torch.zeros(1, 40, before)

    def sliced(x, B, **others):
        wide = torch.cat([lead, x.flatten(2), B.flatten(2)], dim=2)
        _, x_slice, B_slice = wide.split([before, x[0, 0].numel(), B[0, 0].numel()], dim=2)
        return kernels(x=x_slice.view(x.shape), B=B_slice.view(B.shape), **others)

    expected = results_and_gradients(kernels, single(inputs), cu_seqlens=None)
    found = results_and_gradients(sliced, single(inputs), cu_seqlens=None)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_packed_inputs_get_one_packed_gradient(kernels):
    from models.ops.ssd_triton import ssd_packed_triton

    inputs = make_inputs(2, 40, groups=2, state_size=16)
    expected = results_and_gradients(ssd_recurrent, inputs)

    def packed(x, dt, A, B, C, **options):
        xBC = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
        return ssd_packed_triton(xBC, dt, A, 2, 16, **options)

    assert_close(results_and_gradients(packed, single(inputs), cu_seqlens=None), expected, 2e-5)


@pytest.mark.parametrize("gpu", sorted(path.parent.name for path in FOLDER.glob("*/ssd.json")))
def test_tuned_settings_are_the_kernels_own_and_their_tiles_fit(interpreter, gpu):
    from models.ops.ssd_triton_shape import CONFIGS

    for shape, tuned in json.loads((FOLDER / gpu / "ssd.json").read_text()).items():
        config = {kernel: dict(settings) for kernel, settings in CONFIGS[2].items()}
        for kernel, settings in tuned.items():
            assert set(settings) <= set(config[kernel]), (shape, kernel)
            config[kernel].update(settings)
        # a step wider than a tile would run from the tiles beside the diagonal into the one on it
        assert config["outputs"]["ROWS"] % config["outputs"]["BLOCK_K"] == 0
        for kernel in ("scores", "outputs", "score_gradients", "key_gradients"):
            assert config["chunk"]["Q"] % config[kernel]["ROWS"] == 0
        for kernel in ("states", "march", "march_back", "key_gradients"):
            assert config["chunk"]["Q"] % config[kernel]["BLOCK_K"] == 0

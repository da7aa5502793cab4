"""What each Mamba2 mode makes of a layer. Oracles: the tensors before, and the SSM's definition."""

import pytest
import torch
import torch.nn.functional as F

import models.mamba2
from models.expansion import expand_state
from tests.models.tiny_models import snapshot, tiny, tokens

HEADS, INNER, G, N, HIDDEN, KERNEL = 4, 32, 2, 6, 16, 4
ROWS = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias")
DECAY = ("A_log", "dt_bias", "norm.weight")
PREFIX = "backbone.layers.0."


def expanded_layer(mode: str, dtype: torch.dtype = torch.float32, **wishes):
    """(tensors of layer 0's mixer before, after, model); the norm in front is `front`."""

    def layer() -> dict[str, torch.Tensor]:
        tensors = {
            name.removeprefix(PREFIX): t for name, t in snapshot(model).items() if name.startswith(PREFIX)
        }
        return {name.removeprefix("mixer."): t for name, t in tensors.items() if name != "norm.weight"} | {
            "front": tensors["norm.weight"]
        }

    model = tiny("mamba2", dtype=dtype)
    before = layer()
    expand_state(model, layers=[0], drop_mode=mode, **wishes)
    return before, layer(), model


def split(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts z, x, dt [rows, ...] and B, C [G, N, ...] of a tensor."""
    before = 2 * INNER if name.startswith("in_proj") else INNER
    after = HEADS if name.startswith("in_proj") else 0
    bc = (len(tensor) - before - after) // 2
    rest, B, C, dt = tensor.split([before, bc, bc, after])
    return {
        "zx": rest,
        "B": B.view(G, bc // G, *B.shape[1:]),
        "C": C.view(G, bc // G, *C.shape[1:]),
        "dt": dt,
    }


def assert_inherited(before, after, names) -> None:
    for name in names:
        assert torch.equal(after[name], before[name]), name


def assert_other_rows_inherited(before, after) -> None:
    for name in ROWS:
        old, new = split(name, before[name]), split(name, after[name])
        assert torch.equal(new["zx"], old["zx"]), name
        assert torch.equal(new["dt"], old["dt"]), name


@pytest.mark.parametrize(("mode", "factor"), [("mamba2", 2), ("mamba4", 4)])
def test_mamba_modes_draw_B_and_C_anew_and_reset_the_decay(mode, factor):
    before, after, _ = expanded_layer(mode)
    assert_other_rows_inherited(before, after)
    assert_inherited(before, after, ("D", "out_proj.weight", "out_proj.bias", "front"))
    for name in ROWS:
        bound = (HIDDEN if name.startswith("in_proj") else KERNEL) ** -0.5
        for part in "BC":
            rows = split(name, after[name])[part]
            assert rows.shape[1] == factor * N
            assert 0.6 * bound < rows.abs().max() <= bound, (name, part)
            assert rows.unique().numel() == rows.numel()
    dt, A = F.softplus(after["dt_bias"]), after["A_log"].exp()
    assert ((dt >= 0.99e-3) & (dt <= 0.101)).all()
    assert ((A >= 1) & (A <= 16)).all()
    assert A.unique().numel() == HEADS
    assert torch.equal(after["norm.weight"], torch.ones(INNER))


@pytest.mark.parametrize("mode", ["mamba2", "mamba4", "merge_copy", "merge_zero"])
def test_published_resets_only_the_decay_and_the_gated_norm(mode):
    _, standard, _ = expanded_layer(mode)
    _, published, _ = expanded_layer(mode, reinit="published")
    assert torch.equal(published["A_log"], torch.arange(1.0, HEADS + 1).log())
    assert torch.equal(published["dt_bias"], torch.ones(HEADS))
    assert torch.equal(published["norm.weight"], torch.ones(INNER))
    assert_inherited(standard, published, standard.keys() - set(DECAY))


@pytest.mark.parametrize("mode", ["merge_copy", "merge_zero"])
def test_merge_modes_inherit_every_tensor_with_a_counterpart(mode):
    before, after, _ = expanded_layer(mode)
    assert_other_rows_inherited(before, after)
    assert_inherited(before, after, before.keys() - set(ROWS))
    for name in ROWS:
        for part in "BC":
            old, new = split(name, before[name])[part], split(name, after[name])[part]
            blocks = new.unflatten(1, (4, N))  # [G, 4, N, ...]: growth is inside each group
            assert torch.equal(blocks[:, 0], old)
            for copy in range(1, 4):
                expected = old if mode == "merge_copy" else torch.zeros_like(old)
                assert torch.equal(blocks[:, copy], expected), (name, part, copy)


def test_merge_copy_multiplies_what_is_read_from_the_state_by_4(monkeypatch):
    model = tiny("mamba2", dtype=torch.float64)
    expanded = tiny("mamba2", dtype=torch.float64)
    expand_state(expanded, drop_prop=1, drop_mode="merge_copy")
    ssd_packed = models.mamba2.ssd_packed

    def four_times(xBC, dt, A, *, D, **options):
        y, state = ssd_packed(xBC, dt, A, D=None, **options)  # [B, T, H, P]
        x = xBC[..., : y[0, 0].numel()].view_as(y)
        return 4 * y + D[:, None] * x, state

    ours = expanded(tokens()).logits
    monkeypatch.setattr(models.mamba2, "ssd_packed", four_times)
    torch.testing.assert_close(ours, model(tokens()).logits, rtol=0, atol=1e-10)


def test_merge_zero_changes_no_logit_and_its_new_rows_get_no_gradient():
    model = tiny("mamba2", dtype=torch.float64)
    before = model(tokens()).logits
    expand_state(model, drop_prop=1, drop_mode="merge_zero")
    output = model(tokens(), labels=tokens())
    torch.testing.assert_close(output.logits, before, rtol=0, atol=1e-10)
    output.loss.backward()
    for name in ROWS:
        gradient = model.blocks[0].mixer.get_parameter(name).grad
        for part in "BC":
            old, new = split(name, gradient)[part].split([N, 3 * N], dim=1)
            assert (old != 0).all(), (name, part)
            assert (new == 0).all(), (name, part)


def test_lora_4_adds_maps_and_inherits_the_rest():
    before, after, model = expanded_layer("lora_4")
    for side in "BC":
        weight, bias = after.pop(f"{side}_map.weight"), after.pop(f"{side}_map.bias")
        assert weight.shape == (4 * N, N)
        assert weight.std().item() == pytest.approx(0.5 * (2 / (5 * N)) ** 0.5, rel=0.25)  # 144 draws
        assert torch.equal(bias, torch.zeros(4 * N))
    assert_inherited(before, after, before.keys())
    assert (model.config.layer_shape(0).state_size, model.config.layer_shape(0).state_map) == (N, 4)


def test_lora_4_with_maps_that_only_embed_is_the_model_before():
    model = tiny("mamba2", dtype=torch.float64)
    before = model(tokens()).logits
    expand_state(model, drop_prop=1, drop_mode="lora_4")
    with torch.no_grad():
        for block in model.blocks:
            for side in (block.mixer.B_map, block.mixer.C_map):
                side.weight.copy_(torch.eye(4 * N, N))
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", [None, 2, 8])
def test_extend_adds_audible_B_and_silent_C_inside_each_group(factor):
    before, after, _ = expanded_layer("extend", expand_factor=factor)
    assert_other_rows_inherited(before, after)
    assert_inherited(before, after, before.keys() - set(ROWS))
    for name in ROWS:
        for part in "BC":
            old, new = split(name, before[name])[part], split(name, after[name])[part]
            assert new.shape[1] == (factor or 4) * N
            assert torch.equal(new[:, :N], old), (name, part)
            silent = part == "C" and name != "conv1d.weight"
            assert (new[:, N:] == 0).all() if silent else (new[:, N:] != 0).all(), (name, part)

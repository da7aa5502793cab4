"""What each GLA mode makes of a layer. Oracles: the tensors before, and the recurrence by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.expansion import expand_state
from tests.models.tiny_models import snapshot, tiny, tokens

H, K, V, HIDDEN = 2, 8, 16, 32
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gk_proj.0.weight", "gk_proj.1.weight")


def expanded_layer(mode: str, dtype: torch.dtype = torch.float32, **wishes):
    """(tensors of layer 0 before, after, model); the norm in front is `attn_norm.weight`."""
    model = tiny("gla", dtype=dtype)
    before = {name.removeprefix("model.layers.0."): t for name, t in snapshot(model).items()}
    expand_state(model, layers=[0], drop_mode=mode, **wishes)
    after = {name.removeprefix("model.layers.0."): t for name, t in snapshot(model).items()}
    return before, after, model


def is_fresh_xavier(tensor: torch.Tensor, old: torch.Tensor) -> bool:
    bound = 2**-2.5 * math.sqrt(6 / sum(tensor.shape))
    fills_the_range = 0.9 * bound < tensor.abs().max() <= bound
    return fills_the_range and not torch.equal(tensor, old)


def test_gla_makes_the_whole_mixer_and_its_norm_anew():
    before, after, _ = expanded_layer("gla")
    for name in (*PROJECTIONS, "g_proj.weight", "o_proj.weight"):
        assert is_fresh_xavier(after["attn." + name], before["attn." + name]), name
    assert torch.equal(after["attn.gk_proj.1.bias"], torch.zeros(H * K))
    assert torch.equal(after["attn.g_norm_swish_gate.weight"], torch.ones(H * V))
    assert torch.equal(after["attn_norm.weight"], torch.ones(HIDDEN))


def test_merge_inherits_every_tensor_and_tiles_the_gated_norm():
    before, after, _ = expanded_layer("merge")
    norm = "attn.g_norm_swish_gate.weight"
    assert torch.equal(after.pop(norm), torch.cat([before.pop(norm)] * H))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_published_merge_resets_the_norm_in_front_and_nothing_else():
    _, standard, _ = expanded_layer("merge")
    _, published, _ = expanded_layer("merge", reinit="published")
    assert torch.equal(published["attn_norm.weight"], torch.ones(HIDDEN))
    differing = [name for name in standard if not torch.equal(standard[name], published[name])]
    assert differing == ["attn_norm.weight"]


def test_qk_gla_makes_q_k_v_and_the_gate_anew_and_inherits_the_rest():
    before, after, _ = expanded_layer("qk_gla")
    for name in PROJECTIONS:
        assert is_fresh_xavier(after["attn." + name], before["attn." + name]), name
    assert torch.equal(after["attn.gk_proj.1.bias"], torch.zeros(H * K))
    for name in ("attn.g_proj.weight", "attn.o_proj.weight", "attn_norm.weight"):
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(
        after["attn.g_norm_swish_gate.weight"], before["attn.g_norm_swish_gate.weight"].repeat(H)
    )


def test_lora_4_adds_maps_and_inherits_the_rest():
    before, after, model = expanded_layer("lora_4")
    for name in ("attn.q_map", "attn.k_map", "attn.gk_map"):
        drawn = after.pop(name)
        assert drawn.shape == (H, K, 4 * K)
        std = 0.5 * math.sqrt(2 / (5 * K))
        assert drawn.std().item() == pytest.approx(std, rel=0.15)  # 512 draws: four standard errors
    assert all(torch.equal(after[name], before[name]) for name in before)
    shape = model.config.layer_shape(0)
    assert (shape.num_heads, shape.head_k_dim, shape.state_map) == (H, K, 4)
    assert shape.query_scale == (4 * K) ** -0.5


def test_lora_4_with_maps_that_only_embed_is_the_model_before():
    """Queries mapped by (2 I, 0, 0, 0) make up for the scale, which falls from K ** -0.5 to (4 K) ** -0.5."""
    model = tiny("gla", dtype=torch.float64)
    before = model(tokens()).logits
    expand_state(model, drop_prop=1, drop_mode="lora_4")
    embed = torch.eye(K, 4 * K, dtype=torch.float64).expand(H, K, 4 * K)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_map.copy_(2 * embed)
            block.attn.k_map.copy_(embed)
            block.attn.gk_map.copy_(embed)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-10)


def one_head_by_hand(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Merged GLA layer on [T, D], token by token: H * K keys and H * V values."""

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    u = rms(x, tensors["attn_norm.weight"])
    q, k, v, gate = (u @ tensors[f"attn.{name}_proj.weight"].T for name in "qkvg")
    low_rank = u @ tensors["attn.gk_proj.0.weight"].T
    logits = low_rank @ tensors["attn.gk_proj.1.weight"].T + tensors["attn.gk_proj.1.bias"]
    decay = torch.exp(F.logsigmoid(logits) / 16)
    state, outputs = torch.zeros(H * K, H * V, dtype=x.dtype), []
    for t in range(len(x)):
        state = decay[t][:, None] * state + k[t][:, None] * v[t][None, :]
        outputs.append((H * K) ** -0.5 * q[t] @ state)
    # the inherited gated-norm weight [V] serves the values of every former head
    weight = torch.cat([tensors["attn.g_norm_swish_gate.weight"]] * H)
    o = rms(torch.stack(outputs), weight) * F.silu(gate)
    return x + o @ tensors["attn.o_proj.weight"].T


def test_merge_computes_one_head_over_all_keys_and_values():
    before, _, model = expanded_layer("merge", dtype=torch.float64)
    x = torch.randn(11, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = model.blocks[0]
    ours, _ = block.attn(x[None], block.attn_norm)
    torch.testing.assert_close(ours[0], one_head_by_hand(before, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", [None, 2, 8])
def test_extend_grows_the_keys_of_each_head(factor):
    before, after, model = expanded_layer("extend", expand_factor=factor)
    f = factor or 4
    for name in ("q_proj", "k_proj"):
        rows = after[f"attn.{name}.weight"].view(H, f * K, HIDDEN)
        assert torch.equal(rows[:, :K], before[f"attn.{name}.weight"].view(H, K, HIDDEN))
        assert (rows[:, K:] == 0).all() == (name == "q_proj")
    gate, bias = after["attn.gk_proj.1.weight"].view(H, f, K, -1), after["attn.gk_proj.1.bias"].view(H, f, K)
    for copy in range(f):
        assert torch.equal(gate[:, copy], before["attn.gk_proj.1.weight"].view(H, K, -1))
        assert torch.equal(bias[:, copy], before["attn.gk_proj.1.bias"].view(H, K))
    grown = {"attn.q_proj.weight", "attn.k_proj.weight", "attn.gk_proj.1.weight", "attn.gk_proj.1.bias"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - grown)
    shape = model.config.layer_shape(0)
    assert (shape.num_heads, shape.head_k_dim, shape.head_v_dim) == (H, f * K, V)
    assert shape.query_scale == K**-0.5


def test_extend_takes_a_layer_of_one_head():
    model = tiny("gla", num_heads=1)
    before = model(tokens()).logits
    report = expand_state(model, drop_prop=2, drop_mode="extend", expand_factor=2)
    assert report.after.total_elements == 1.5 * report.before.total_elements
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-5)

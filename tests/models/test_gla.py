"""The GLA model against flash-linear-attention 0.6.0 (tests/golden/gla-tiny-a, in fp32), and its config."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import build_model, load_pretrained, read_config
from models.gla import GLAConfig
from tests.models.tiny_models import tiny, tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "gla-tiny-a"


@pytest.fixture
def golden():
    return load_pretrained(GOLDEN), load_file(GOLDEN / "expected.safetensors")


def test_logits_and_loss_are_those_of_flash_linear_attention(golden):
    model, expected = golden
    output = model(expected["input_ids"], labels=expected["input_ids"])
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, expected["loss"][0], atol=1e-5, rtol=0)


def test_gradient_norms_are_those_of_flash_linear_attention(golden):
    model, expected = golden
    model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    assert {f"grad_norm.{name}" for name in norms} == {k for k in expected if k.startswith("grad_norm.")}
    for name, norm in norms.items():
        torch.testing.assert_close(norm, expected[f"grad_norm.{name}"][0], atol=0, rtol=1e-3)


def test_float64_stays_float64(golden):
    model, expected = golden
    output = model.double()(expected["input_ids"], labels=expected["input_ids"])
    assert output.logits.dtype == output.loss.dtype == torch.float64
    torch.testing.assert_close(output.logits, expected["logits"].double(), atol=1e-4, rtol=0)


def test_the_published_shape_has_the_published_size_and_state():
    model = build_model("configs/models/gla-1.3B.json", device="meta")
    assert model.num_parameters() == 1_365_514_240
    assert sum(block.token_mixer.state_elements() for block in model.blocks) == 12_582_912
    assert all(parameter.is_meta for parameter in model.parameters())


def test_intermediate_size_is_the_multiple_of_256_at_or_above_two_thirds_of_the_ratio():
    assert GLAConfig(hidden_size=2048).intermediate_size == 5632
    assert GLAConfig(hidden_size=64).intermediate_size == 256
    assert GLAConfig(hidden_size=96, hidden_ratio=4).intermediate_size == 256
    assert GLAConfig(hidden_size=64, intermediate_size=100).intermediate_size == 100


def test_clamp_min_bounds_the_log_gate_after_the_division_by_16():
    free, clamped = tiny("gla", clamp_min=None), tiny("gla", clamp_min=-1e-9)
    for block in [*free.blocks, *clamped.blocks]:
        torch.nn.init.constant_(block.attn.gk_proj[1].bias, -1000.0)  # forgets at once, unless clamped
    ids = tokens(1)
    swapped = ids.clone()
    swapped[0, 0] = (ids[0, 0] + 1) % 61
    difference = [(m(ids).logits - m(swapped).logits)[0, -1].abs().max() for m in (free, clamped)]
    assert difference[0] < 1e-6 < 1e-3 < difference[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn", {"layers": [0]}),
        ("num_kv_heads", 1),
        ("feature_map", "relu"),
        ("use_short_conv", True),
        ("use_output_gate", False),
        ("elementwise_affine", False),
        ("attnres_block_size", 2),
        ("hidden_act", "gelu"),
    ],
)
def test_a_published_field_that_is_not_supported_is_refused_by_name(field, value):
    raw = json.loads((GOLDEN / "config.json").read_text()) | {field: value}
    with pytest.raises(ValueError, match=field):
        read_config(raw)


def test_published_fields_without_meaning_here_are_ignored():
    raw = json.loads((GOLDEN / "config.json").read_text())
    raw |= {"attn_mode": "fused_chunk", "fuse_swiglu": False, "something_new": [1, 2]}
    assert not hasattr(read_config(raw), "something_new")


@pytest.mark.parametrize("field", ["hidden_size", "num_heads", "num_hidden_layers", "vocab_size"])
def test_a_shape_that_cannot_be_is_refused(field):
    with pytest.raises(ValueError, match=field):
        GLAConfig(**{"hidden_size": 64, "num_heads": 2, field: 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", "2"),
        ("num_heads", True),
        ("num_heads", None),
        ("hidden_size", 64.0),
        ("intermediate_size", -5),
        ("hidden_ratio", -4),
        ("expand_k", None),
        ("expand_k", 0),
        ("expand_v", -1.0),
        ("norm_eps", "small"),
        ("norm_eps", -1e-6),
        ("clamp_min", "low"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_a_field_of_another_type_or_sign_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        GLAConfig(**{"hidden_size": 64, "num_heads": 2, field: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("head_k_dim", "8"), ("head_k_dim", -8), ("query_scale", None), ("state_map", 0), ("drop_mode", 3)],
)
def test_an_entry_of_layers_must_be_a_shape(key, value):
    layers = GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=2).layers
    layers[1][key] = value
    with pytest.raises(ValueError, match=rf"layers\[1\]\.{key}={value!r} must be"):
        GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=2, layers=layers)


@pytest.mark.parametrize("entry", [None, 3, [1, 2], {1: 2, "a": 3}])
def test_an_entry_of_layers_that_is_no_shape_at_all_is_shown(entry):
    with pytest.raises(ValueError, match=r"layers\[0\] .*expected a dict with"):
        GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, layers=[entry])


def test_layers_must_describe_every_layer_with_known_keys():
    good = GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=2)
    with pytest.raises(ValueError, match="num_hidden_layers=2, but layers describes 1"):
        GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=2, layers=good.layers[:1])
    with pytest.raises(ValueError, match=r"layers\[0\].*heads"):
        GLAConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, layers=[{"heads": 1}])


def test_initialisation_is_normal_with_initializer_range():
    model = build_model("configs/models/gla-tiny.json", initializer_range=0.5)
    assert abs(model.blocks[0].attn.q_proj.weight.std() - 0.5) < 0.02
    assert (model.blocks[0].attn.gk_proj[1].bias == 0).all()
    assert (model.blocks[0].attn_norm.weight == 1).all()

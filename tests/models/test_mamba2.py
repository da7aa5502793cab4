"""The Mamba2 model against transformers' own with random weights, its config and its initialiser."""

import inspect
import math

import pytest
import torch
import transformers

from models import build_model, load_pretrained, read_config, save_published
from models.mamba2 import Mamba2Config

BASE = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 32}
SHAPES = {
    "plain": {},
    "two groups": {"n_groups": 2},
    "no convolution bias": {"use_conv_bias": False},
    "linear bias": {"use_bias": True, "n_groups": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim 16": {"head_dim": 16, "num_heads": 8, "n_groups": 4},
    "head_dim 64": {"head_dim": 64, "num_heads": 2},
    "clamped time steps": {"time_step_limit": (0.01, 0.05)},
    "other kernel and eps": {"conv_kernel": 3, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
}


GatedNorm = transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated


def theirs(**changes) -> transformers.Mamba2ForCausalLM:
    """transformers' model; every tensor is moved, so that none is at a special value."""
    if changes.get("n_groups", 1) > 1 and "group_size" not in inspect.signature(GatedNorm).parameters:
        pytest.skip("this transformers has no grouped norm, unlike mamba_ssm and later versions")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**BASE | {"num_hidden_layers": 2, "vocab_size": 97} | changes)
    model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers_and_back_again(shape, tmp_path):
    model = theirs(**SHAPES[shape])
    model.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ids = torch.randint(97, (2, 77), generator=torch.Generator().manual_seed(1))  # no multiple of the chunk
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=0)
        save_published(ours, tmp_path / "ours")
        again = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-6, rtol=0)


def test_gradients_are_those_of_transformers(tmp_path):
    model = theirs(n_groups=2)
    model.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids = torch.randint(97, (2, 45), generator=torch.Generator().manual_seed(1))
    for each in (model, ours):
        each(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: {error}"


def test_the_published_shape_has_the_published_size_and_state():
    model = build_model("configs/models/mamba2-1.3B.json", device="meta")
    assert model.num_parameters() == 1_343_757_312
    assert sum(block.token_mixer.state_elements() for block in model.blocks) == 25_165_824


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (None, [0.0, math.inf]),
        ([0.0, {"__float__": "Infinity"}], [0.0, math.inf]),
        ([0.0, math.inf], [0.0, math.inf]),
        (["0.0", "inf"], [0.0, math.inf]),
        ((0.01, 0.1), [0.01, 0.1]),
    ],
)
def test_time_step_limit_is_read_in_every_form_in_use(written, limit):
    assert Mamba2Config(**BASE, time_step_limit=written).time_step_limit == limit


@pytest.mark.parametrize("written", [[0.1], 5, [0.2, 0.1], [0.0, "wide"], [-1.0, 1.0]])
def test_another_time_step_limit_is_refused(written):
    with pytest.raises(ValueError, match="time_step_limit"):
        Mamba2Config(**BASE, time_step_limit=written)


ORIGINAL = {
    "d_model": 64,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 93,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 32, "d_state": 16},
    "attn_layer_idx": [],
    "rms_norm": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def test_the_original_config_is_read_with_a_padded_vocabulary():
    config = read_config(ORIGINAL)
    assert (config.vocab_size, config.num_heads, config.num_hidden_layers) == (96, 4, 3)
    assert (config.tie_word_embeddings, config.n_groups, config.chunk_size) == (True, 1, 256)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("ssm_cfg.layer", {"ssm_cfg": {}}),
        ("attn_layer_idx", {"attn_layer_idx": [1]}),
        ("d_intermediate", {"d_intermediate": 128}),
        ("rms_norm", {"rms_norm": False}),
        ("norm_before_gate", {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}),
        ("D_has_hdim", {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}),
    ],
)
def test_an_original_field_that_is_not_supported_is_refused_by_name(field, change):
    with pytest.raises(ValueError, match=field):
        read_config(ORIGINAL | change)


@pytest.mark.parametrize(
    ("field", "change"),
    [("num_heads", {"num_heads": 3}), ("n_groups", {"n_groups": 3}), ("hidden_act", {"hidden_act": "gelu"})],
)
def test_a_shape_that_cannot_be_is_refused(field, change):
    with pytest.raises(ValueError, match=field):
        Mamba2Config(**BASE | change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", "4"),
        ("head_dim", None),
        ("state_size", 0),
        ("conv_kernel", -1),
        ("chunk_size", 0),
        ("expand", "2"),
        ("time_step_min", 0),
        ("time_step_min", 0.5),
        ("use_bias", "no"),
    ],
)
def test_a_field_of_another_type_or_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Mamba2Config(**BASE | {field: value})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("d_model", {"d_model": "64"}),
        ("vocab_size", {"vocab_size": None}),
        ("pad_vocab_size_multiple", {"pad_vocab_size_multiple": 0}),
        ("ssm_cfg", {"ssm_cfg": "Mamba2"}),
        ("ssm_cfg.headdim", {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}),
        ("attn_layer_idx", {"attn_layer_idx": 3}),
    ],
)
def test_an_original_field_that_is_no_size_is_refused_by_name(field, change):
    with pytest.raises(ValueError, match=field):
        read_config(ORIGINAL | change)


def test_an_original_config_without_a_vocabulary_has_the_authors_default():
    silent = {name: value for name, value in ORIGINAL.items() if name != "vocab_size"}
    assert read_config(silent).vocab_size == 50288  # 50277, padded to a multiple of 16


def test_initialisation_is_the_authors_and_ignores_the_initializer_range():
    model = build_model({"model_type": "mamba2", **BASE, "num_hidden_layers": 4, "initializer_range": 9.0})
    for block in model.blocks:
        mixer = block.mixer
        steps, A = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
        assert steps.min() >= 1e-4 * 0.999
        assert steps.max() <= 0.1 * 1.001
        assert A.min() >= 1
        assert A.max() <= 16
        assert (mixer.D == 1).all()
        bounds = {"in_proj": 64**-0.5, "out_proj": 128**-0.5 / 2, "conv1d": 0.5}  # out_proj: / sqrt(4 layers)
        for name, bound in bounds.items():
            largest = getattr(mixer, name).weight.abs().max()
            assert 0.9 * bound < largest <= bound * 1.001, name
    assert abs(model.backbone.embeddings.weight.std() - 0.02) < 1e-3

"""Planning and applying a state expansion: what is true of every mode of every family."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from models.expansion import expand_state, freeze_all_but_expanded, plan_expansion
from models.gla import GLALayerShape
from models.modes import MODES, Mode, register_modes
from models.report import state_report
from tests.models.tiny_models import ALL_MODES, snapshot, tiny, tiny_config, tokens

EXPANDED = (0, 2)  # of four layers, with drop_prop=2


def in_expanded_layer(model, name: str) -> bool:
    """Whether a parameter belongs to the mixer of an expanded layer, or to the norm in front of it."""
    blocks = [model.blocks[layer] for layer in EXPANDED]
    mine = {
        id(p) for block in blocks for part in (block.token_mixer, block.mixer_norm) for p in part.parameters()
    }
    return id(model.get_parameter(name)) in mine


def test_plan_is_pure_data_that_says_which_layer_becomes_what():
    config = tiny_config("gla")
    before = copy.deepcopy(config.layers)
    plan = plan_expansion(config, drop_prop=2)
    assert [step.layer for step in plan] == [0, 2]
    assert plan[0].mode == "gla"
    assert plan[0].old == GLALayerShape(2, 8, 16, query_scale=8**-0.5)
    assert plan[0].new == GLALayerShape(1, 16, 32, query_scale=16**-0.5, drop_mode="gla")
    assert config.layers == before


@pytest.mark.parametrize(("family", "mode"), [("gla", "gla"), ("mamba2", "mamba4")])
def test_each_family_has_a_default_mode(family, mode):
    assert {step.mode for step in plan_expansion(tiny_config(family), drop_prop=1)} == {mode}


@pytest.mark.parametrize(
    ("family", "wishes", "message"),
    [
        ("gla", {}, "give either drop_prop .* or layers; neither"),
        ("gla", {"drop_prop": 2, "layers": [0]}, "both were given"),
        ("gla", {"drop_prop": 3}, "does not divide the 4 layers; use one of 1, 2, 4"),
        ("gla", {"drop_prop": 0}, "use one of 1, 2, 4"),
        ("gla", {"drop_prop": True}, "use one of 1, 2, 4"),
        ("gla", {"layers": []}, "distinct layer numbers from 0 to 3"),
        ("gla", {"layers": [4]}, "distinct layer numbers from 0 to 3"),
        ("gla", {"layers": [-1]}, "distinct layer numbers from 0 to 3"),
        ("gla", {"layers": [1, 1]}, "distinct layer numbers from 0 to 3"),
        ("gla", {"layers": "12"}, "distinct layer numbers from 0 to 3"),
        (
            "gla",
            {"drop_prop": 2, "drop_mode": "mamba4"},
            "gla family; use one of gla, merge, qk_gla, lora_4, extend",
        ),
        (
            "mamba2",
            {"drop_prop": 2, "drop_mode": "merge"},
            "mamba2, mamba4, merge_copy, merge_zero, lora_4, extend",
        ),
        ("gla", {"drop_prop": 2, "expand_factor": 2}, "expand_factor=2 was given, but drop_mode='gla'"),
        ("gla", {"drop_prop": 2, "expand_factor": 4}, "expand_factor=4 was given, but drop_mode='gla'"),
        ("gla", {"drop_prop": 2, "drop_mode": "extend", "expand_factor": 3}, "must be one of 2, 4, 8"),
        ("mamba2", {"drop_prop": 2, "reinit": "fancy"}, "use one of standard, published"),
        ("mamba2", {"drop_prop": 2, "drop_mode": ["mamba4"]}, "is no mode of the mamba2 family"),
        ("gla", {"drop_prop": 2, "seed": "x"}, "seed='x' must be a whole number"),
        ("gla", {"drop_prop": 2, "seed": 2**64}, "must be a whole number from 0 to"),
    ],
)
def test_wishes_that_do_not_fit_are_refused_and_change_nothing(family, wishes, message):
    model = tiny(family)
    before, config = snapshot(model), copy.deepcopy(model.config.layers)
    with pytest.raises(ValueError, match=message):
        expand_state(model, **wishes)
    assert model.config.layers == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_a_model_of_another_library_is_refused():
    with torch.device("meta"):
        theirs = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=1))
    for ask in (state_report, lambda model: expand_state(model, drop_prop=1)):
        with pytest.raises(ValueError, match=r"Mamba2Config of another library.*load_pretrained"):
            ask(theirs)


def test_layers_may_be_numbers_of_numpy():
    report = expand_state(tiny("gla"), layers=np.arange(0, 4, 2))
    assert [step["layer"] for step in json.loads(json.dumps(report.to_dict()))["plan"]] == [0, 2]


def test_expanding_a_layer_twice_is_refused():
    model = tiny("mamba2")
    expand_state(model, layers=[1])
    with pytest.raises(ValueError, match="layer 1 is already expanded \\(drop_mode='mamba4'\\)"):
        expand_state(model, layers=[0, 1])
    assert model.config.layer_shape(0).drop_mode is None
    expand_state(model, layers=[0])  # another layer is no second time
    assert [shape["drop_mode"] for shape in model.config.layers] == ["mamba4", "mamba4", None, None]


@pytest.mark.parametrize("mode", ["gla", "merge", "qk_gla"])
def test_one_head_modes_refuse_a_layer_of_one_head(mode):
    with pytest.raises(ValueError, match=f"{mode}.*layer 0: it has one head.*extend"):
        expand_state(tiny("gla", num_heads=1), drop_prop=2, drop_mode=mode)


def test_a_mode_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch):
    def fails_on_the_second_layer(old, step, config, draw):
        if step.layer > 0:
            raise RuntimeError("out of memory")
        return MODES["gla"]["gla"].fill(old, step, config, draw)

    broken = Mode(MODES["gla"]["gla"].reshape, fails_on_the_second_layer)
    monkeypatch.setitem(MODES["gla"], "broken", broken)
    model = tiny("gla")
    before, parameters, config = snapshot(model), list(model.parameters()), model.config
    with pytest.raises(RuntimeError, match="out of memory"):
        expand_state(model, drop_prop=2, drop_mode="broken", freeze_rest=True)
    assert model.config is config
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters))
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_a_mode_of_wrong_shapes_names_the_tensor(monkeypatch):
    wrong = Mode(MODES["gla"]["gla"].reshape, lambda old, step, config, draw: {})
    monkeypatch.setitem(MODES["gla"], "wrong", wrong)
    with pytest.raises(
        ValueError, match=re.escape("layer 0: g_norm_swish_gate.weight is (16,) but must be (32,)")
    ):
        expand_state(tiny("gla"), drop_prop=2, drop_mode="wrong")


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_untouched_parameters_are_bit_identical(family, mode):
    model = tiny(family)
    before = snapshot(model)
    expand_state(model, drop_prop=2, drop_mode=mode)
    untouched = [name for name, _ in model.named_parameters() if not in_expanded_layer(model, name)]
    assert len(untouched) > len(before) // 3
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in untouched)


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_expanded_model_runs_and_every_parameter_is_finite(family, mode):
    model = tiny(family)
    expand_state(model, drop_prop=2, drop_mode=mode)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_a_seed_means_the_same_bits_in_every_dtype(family, mode):
    def expanded(seed, dtype=torch.float32):
        model = tiny(family, dtype=dtype)
        expand_state(model, layers=[0, 3], drop_mode=mode, seed=seed)
        return snapshot(model)

    first, again, other = expanded(3), expanded(3), expanded(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    draws_nothing = mode in ("merge", "merge_copy", "merge_zero")
    assert draws_nothing == all(torch.equal(first[name], other[name]) for name in first)
    for name, tensor in expanded(3, torch.bfloat16).items():
        assert torch.equal(tensor, first[name].to(tensor.dtype)), name


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_a_seed_means_the_same_bits_on_a_gpu(family, mode):
    here, there = tiny(family), tiny(family).to("cuda")
    for model in (here, there):
        expand_state(model, drop_prop=2, drop_mode=mode, seed=3)
    assert all(parameter.is_cuda for parameter in there.parameters())
    assert all(torch.equal(tensor.cpu(), snapshot(here)[name]) for name, tensor in snapshot(there).items())


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_dtypes_follow_the_replaced_parameters(family, mode):
    model = tiny(family, dtype=torch.bfloat16)
    dtype_of = {name.split(".", 3)[-1]: p.dtype for name, p in model.named_parameters() if ".layers." in name}
    expand_state(model, drop_prop=1, drop_mode=mode)
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            assert parameter.dtype == dtype_of.get(name.split(".", 3)[-1], torch.bfloat16), name


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_on_meta_only_shapes_change_and_they_are_the_real_ones(family, mode):
    real, meta = tiny(family), tiny(family).to("meta")
    for model in (real, meta):
        expand_state(model, drop_prop=2, drop_mode=mode)
    assert all(parameter.is_meta for parameter in meta.parameters())
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (real, meta)]
    assert shapes[0] == shapes[1]


def test_a_config_shared_with_another_model_is_not_touched():
    first = tiny("gla")
    second = type(first)(first.config)
    assert second.config is first.config
    expand_state(first, drop_prop=2)
    assert first.config is not second.config
    assert all(shape["drop_mode"] is None for shape in second.config.layers)
    assert [shape["drop_mode"] for shape in first.config.layers] == ["gla", None, "gla", None]
    assert type(first)(first.config).state_dict().keys() == first.state_dict().keys()
    second(tokens())


@pytest.mark.parametrize(("family", "mode"), ALL_MODES)
def test_the_config_alone_rebuilds_the_expanded_shapes(family, mode):
    model = tiny(family)
    expand_state(model, drop_prop=2, drop_mode=mode)
    rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict()))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_freeze_rest_leaves_the_expanded_mixers_and_the_norms_before_them(family):
    model = tiny(family)
    expand_state(model, drop_prop=2, freeze_rest=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == in_expanded_layer(model, name), name


def test_freezing_a_model_without_an_expanded_layer_is_refused():
    with pytest.raises(ValueError, match="no layer of it is expanded"):
        freeze_all_but_expanded(tiny("gla"))


def test_reports_hold_plan_before_and_after():
    model = tiny("gla")
    report = expand_state(model, layers=[1], drop_mode="merge")
    assert [step.layer for step in report.plan] == [1]
    assert report.after.total_elements == report.before.total_elements + 2 * 8 * 16
    assert "1 layer expanded, 3 as they were; recurrent state x1.25" in str(report)


def test_a_new_mode_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(MODES, "gla", dict(MODES["gla"]))
    merge = MODES["gla"]["merge"]

    def loud(old, step, config, draw):
        return {"g_norm_swish_gate.weight": 2 * old["g_norm_swish_gate.weight"].repeat(step.old.num_heads)}

    register_modes("gla", {"loud": Mode(merge.reshape, loud)})
    model = tiny("gla")
    old = model.blocks[0].attn.g_norm_swish_gate.weight.detach().clone()
    expand_state(model, layers=[0], drop_mode="loud")
    assert torch.equal(model.blocks[0].attn.g_norm_swish_gate.weight, 2 * old.repeat(2))
    assert [step.mode for step in plan_expansion(tiny_config("gla"), drop_prop=2)] == ["gla", "gla"]

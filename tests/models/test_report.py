"""The state report: sizes counted by hand, and a table that stays short for deep models."""

import json

import pytest

from models.expansion import expand_state
from models.report import state_report
from tests.models.tiny_models import VOCABULARY, tiny


def test_gla_numbers_by_hand():
    report = state_report(tiny("gla"))
    hidden, heads, keys, values, mlp = 32, 2, 8, 16, 40
    layer = report.layers[1]
    assert layer.state_elements == heads * keys * values
    assert layer.state_bytes == 4 * layer.state_elements
    assert layer.conv_elements == 0
    projections = hidden * heads * (2 * keys + 2 * values) + heads * values * hidden
    gate = 16 * hidden + 16 * heads * keys
    matrices = projections + gate + 3 * hidden * mlp
    assert layer.parameters == matrices + heads * keys + values + 2 * hidden  # gate bias, gated norm, norms
    assert layer.flops_per_token == 2 * matrices + 4 * layer.state_elements
    assert report.other_parameters == 2 * VOCABULARY * hidden + hidden
    assert report.other_flops_per_token == 2 * VOCABULARY * hidden


def test_mamba2_numbers_by_hand():
    report = state_report(tiny("mamba2", use_bias=False))
    hidden, inner, heads, groups, state = 16, 32, 4, 2, 6
    layer = report.layers[0]
    channels = inner + 2 * groups * state
    assert layer.state_elements == inner * state
    assert layer.conv_elements == 3 * channels
    matrices = hidden * (inner + channels + heads) + inner * hidden + 4 * channels
    assert layer.parameters == matrices + channels + 3 * heads + inner + hidden
    assert layer.flops_per_token == 2 * matrices + 4 * layer.state_elements


@pytest.mark.parametrize("tied", [True, False])
def test_totals_count_every_parameter_once(tied):
    model = tiny("mamba2", tie_word_embeddings=tied)
    report = state_report(model)
    assert report.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.total_elements == 4 * 32 * 6
    assert report.total_bytes == 4 * report.total_elements
    assert (
        report.flops_per_token == sum(layer.flops_per_token for layer in report.layers) + 2 * VOCABULARY * 16
    )


def test_dict_is_json_and_holds_the_totals():
    model = tiny("gla")
    expansion = expand_state(model, drop_prop=2)
    report = json.loads(json.dumps(expansion.to_dict()))
    assert report["after"]["total"]["state_elements"] == state_report(model).total_elements
    assert [layer["drop_mode"] for layer in report["after"]["layers"]] == ["gla", None, "gla", None]
    assert report["plan"][1]["layer"] == 2
    assert report["plan"][1]["new"]["num_heads"] == 1


def test_equal_neighbours_share_a_line_only_in_deep_models():
    shallow, deep = tiny("gla", num_hidden_layers=8), tiny("gla", num_hidden_layers=24)
    for model in (shallow, deep):
        expand_state(model, layers=[0, 6])
    assert len(str(state_report(shallow)).splitlines()) == 5 + 8 + 1
    rows = [line.split()[0] for line in str(state_report(deep)).splitlines()]
    assert rows[3:7] == ["0", "1-5", "6", "7-23"]


def test_columns_are_aligned():
    lines = str(state_report(tiny("mamba2"))).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1

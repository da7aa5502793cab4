"""Sizes at the shapes of the published 1.3B checkpoints, on the meta device. Oracle: the paper's numbers."""

import pytest
import torch

from models.expansion import expand_state
from models.gla import GLAConfig, GLAForCausalLM
from models.mamba2 import Mamba2Config, Mamba2ForCausalLM
from models.report import state_report


def gla_1_3b() -> GLAForCausalLM:
    config = GLAConfig(vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_heads=4)
    with torch.device("meta"):
        return GLAForCausalLM(config)


def mamba2_1_3b() -> Mamba2ForCausalLM:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64, "state_size": 128}
    config = Mamba2Config(vocab_size=50288, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        return Mamba2ForCausalLM(config)


@pytest.mark.parametrize(("build", "parameters"), [(gla_1_3b, 1_365_514_240), (mamba2_1_3b, 1_343_757_312)])
def test_parameters_of_the_published_checkpoints(build, parameters):
    assert state_report(build()).total_parameters == parameters


@pytest.mark.parametrize(
    ("build", "mode", "drop_prop", "before", "after"),
    [
        (gla_1_3b, None, 6, 12_582_912, 18_874_368),
        (gla_1_3b, "lora_4", 6, 12_582_912, 18_874_368),
        (gla_1_3b, "extend", 6, 12_582_912, 18_874_368),
        (mamba2_1_3b, None, 6, 25_165_824, 37_748_736),
        (mamba2_1_3b, None, 1, 25_165_824, 100_663_296),
        (mamba2_1_3b, "mamba2", 1, 25_165_824, 50_331_648),
        (mamba2_1_3b, "extend", 6, 25_165_824, 37_748_736),
    ],
)
def test_state_elements(build, mode, drop_prop, before, after):
    report = expand_state(build(), drop_prop=drop_prop, drop_mode=mode)
    assert (report.before.total_elements, report.after.total_elements) == (before, after)


def test_merged_gla_grows_by_nothing_but_the_wider_gated_norm():
    report = expand_state(gla_1_3b(), drop_prop=6)
    assert report.after.total_parameters - report.before.total_parameters == 4 * 3 * 512

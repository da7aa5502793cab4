"""The choice of recomputation levels, from given costs; the measurement itself runs on the GPU."""

from dataclasses import replace

import pytest
import torch

from models.report import state_report
from models.trunk import GROUP
from training.activation_probe import LevelCost, assign_levels, least_bytes, probe_layers
from training.config import RunConfig
from training.memory import estimate_memory
from training.recompute import choose_levels

LAYER = [
    LevelCost("none", kept=100.0, working=50.0, seconds=1.0),
    LevelCost("mlp", kept=40.0, working=60.0, seconds=1.2),
    LevelCost("full", kept=10.0, working=80.0, seconds=1.5),
]


def test_ample_memory_recomputes_nothing():
    assert assign_levels([LAYER] * 4, tokens=1, budget=1e9) == ["none"] * 4


def test_scarce_memory_recomputes_everything():
    assert assign_levels([LAYER] * 4, tokens=1, budget=0) == ["full"] * 4


def test_memory_goes_first_where_it_buys_most_time():
    # 4 x 10 + 80 are taken; mlp costs 30 more a layer and saves 0.3 s, none 60 on top and saves 0.2 s
    assert sorted(assign_levels([LAYER] * 4, tokens=1, budget=185)) == ["full", "full", "mlp", "mlp"]
    assert sorted(assign_levels([LAYER] * 4, tokens=1, budget=320)) == ["mlp", "mlp", "mlp", "none"]


def test_memory_is_not_left_over_where_noise_hides_the_gain():
    noisy = [replace(LAYER[0], seconds=1.3), LAYER[1], LAYER[2]]
    assert assign_levels([noisy] * 4, tokens=1, budget=1e9) == ["none"] * 4
    # 2 x 40 + 60 are taken by mlp, which the measured times prefer; none keeps 60 more
    assert sorted(assign_levels([noisy] * 2, tokens=1, budget=200)) == ["mlp", "none"]
    assert assign_levels([noisy] * 2, tokens=1, budget=145) == ["mlp", "mlp"]
    slow = [LAYER[0], replace(LAYER[1], seconds=1.6), LAYER[2]]
    assert assign_levels([slow] * 2, tokens=1, budget=145) == ["mlp", "mlp"]  # full does all of it too


def test_levels_that_recompute_different_parts_are_told_apart_by_time_alone():
    mixer = LevelCost("mixer", kept=30.0, working=60.0, seconds=1.1)
    costs = [LAYER[0], LAYER[1], mixer, LAYER[2]]
    assert assign_levels([costs] * 2, tokens=1, budget=145) == ["mixer", "mixer"]


def test_gradients_that_come_as_activations_go_are_counted():
    costs = [replace(cost, gradients=50) for cost in LAYER]
    wide = [replace(cost, working=cost.working + 100) for cost in costs]
    stack = [wide, costs, costs, costs]
    # all full: at the first 10 + 180, and the gradients of all four
    assert least_bytes(stack, tokens=1) == 10 + 180
    assert least_bytes(stack, tokens=1, late_gradients=True) == 10 + 180 + 4 * 50
    assert assign_levels(stack, tokens=1, budget=220) == ["mlp"] * 4
    assert assign_levels(stack, tokens=1, budget=395, late_gradients=True)[0] == "full"
    assert assign_levels(stack, tokens=1, budget=400, late_gradients=True)[0] == "mlp"


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_assignment_fits_for_any_number_of_tokens(tokens):
    levels = assign_levels([LAYER] * 5, tokens=tokens, budget=300 * tokens)
    costs = [next(cost for cost in LAYER if cost.level == level) for level in levels]
    assert max(sum(c.kept for c in costs[: i + 1]) + costs[i].working for i in range(5)) <= 300


def test_a_large_backward_pass_early_in_the_stack_leaves_memory_to_the_layers_behind_it():
    wide = [replace(cost, working=cost.working + 100) for cost in LAYER]
    # at the second 40 x 2 + 160 are taken, for those behind it are done; at the last 40 x 4 + 60
    assert assign_levels([LAYER, wide, LAYER, LAYER], tokens=1, budget=240) == ["mlp"] * 4
    # at the end of the stack the same pass comes on top of what all of them keep
    assert assign_levels([LAYER, LAYER, LAYER, wide], tokens=1, budget=240).count("mlp") == 1


def test_the_least_is_every_layers_least():
    assert least_bytes([LAYER] * 4, tokens=2) == 2 * (4 * 10 + 80)


# peaks of benchmarks.throughput at 262,144 tokens (docs/performance.md), where full did not fit into 80 GB
@pytest.mark.parametrize(("family", "measured"), [("gla", 50.5e9), ("mamba2", 64.8e9)])
def test_estimates_of_groups_stay_above_what_was_measured(family, measured):
    from models import build_model

    model = build_model(f"configs/models/{family}-1.3B.json", device="meta")
    config = RunConfig(launch="ddp", max_len=262144, batch_size=1, grad_accum_steps=1)
    levels = choose_levels(model, state_report(model), config, 1, 80 * 10**9)
    assert set(levels) == {GROUP}
    assert measured < estimate_memory(state_report(model), model.config, config, 1, levels).total < 84.9e9


def test_groups_are_not_taken_where_layers_keep_less():
    from models import build_model

    config = RunConfig(launch="ddp", max_len=2**24, batch_size=1)
    for layers, leanest in ((2, "full"), (16, GROUP)):
        model = build_model("configs/models/mamba2-tiny.json", device="meta", num_hidden_layers=layers)
        assert set(choose_levels(model, state_report(model), config, 1, 10**9)) == {leanest}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_groups_keep_fewer_streams_than_layers(family):
    from models import build_model

    # of 16 layers, 4 groups: 4 streams instead of 16, though an fp32 stream is twice what a layer keeps of it
    model = build_model(f"configs/models/{family}-tiny.json", device="cuda", num_hidden_layers=16).train()
    tokens = torch.randint(0, model.config.vocab_size, (1, 32768), device="cuda")
    kept = {}
    for level in ("full", GROUP):
        model.set_recompute(level)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            before = torch.cuda.memory_allocated()
            y = model.trunk.run(model.trunk.embeddings(tokens), *_no_cache())
            kept[level] = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        y.float().sum().backward()
        del y
    assert kept[GROUP] < 0.75 * kept["full"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_the_predicted_memory_is_what_a_training_step_takes(family):
    from models import build_model

    device = torch.device("cuda")
    model = build_model(f"configs/models/{family}-tiny.json", device="cuda").train()
    costs = probe_layers(model.config, model.block_class, device, autocast=True)
    tokens = torch.randint(0, model.config.vocab_size, (1, 32768), device=device)
    stream = torch.float32 if model.config.residual_in_fp32 else torch.bfloat16
    for level in model.block_class.recompute_levels:
        model.set_recompute(level)
        predicted = 32768 * sum(next(c.kept for c in layer if c.level == level) for layer in costs)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            before = torch.cuda.memory_allocated()
            inputs = [model.trunk.embeddings(tokens).to(stream)]  # freed unless a layer keeps it
            y = model.trunk.run(inputs.pop(), *_no_cache())
            kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        # linear in tokens but for the allocator's rounding and what does not grow with them
        assert kept == pytest.approx(predicted, rel=0.2), level
        del y


def _no_cache():
    from models.cache import RecurrentCache

    return RecurrentCache(), None, False, None

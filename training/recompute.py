"""Which layers recompute what in the backward pass: memory against time."""

import torch

from models.language_model import LanguageModel
from models.report import StateReport, state_report
from models.trunk import GROUP
from training.activation_probe import assign_levels, least_bytes, probe_layers
from training.config import RunConfig
from training.memory import (
    estimate_memory,
    gradients_come_late,
    head_bytes,
    kept_bytes,
    optimizer_bytes,
)

_USABLE = 0.95  # of a GPU's memory; the rest goes to the CUDA context, NCCL and gaps between segments


def choose_recompute(
    model: LanguageModel,
    config: RunConfig,
    world_size: int,
    device: torch.device,
    memory: float | None = None,
) -> list[str]:
    """A level for each layer: what `recompute` says; with `auto` none on CPU, the fastest that fits on GPU.

    Where not even layers that are recomputed as a whole fit, groups of layers are. Costs are measured on the
    GPU itself (training.activation_probe). All ranks must follow one rank's answer: under ZeRO-3 the
    recomputation gathers weights, in the same order everywhere. `memory` stands for the bytes of a smaller
    GPU than the one at hand.
    """
    report = state_report(model)
    if config.recompute != "auto" or device.type != "cuda":
        return choose_levels(model, report, config, world_size, None)
    costs = probe_layers(model.config, type(model.blocks[0]), device, autocast=config.dtype == "bf16")
    torch.cuda.empty_cache()
    usable = _USABLE * (memory or torch.cuda.get_device_properties(device).total_memory)
    taken = optimizer_bytes(report.total_parameters, config, world_size) + head_bytes(model.config, config)
    tokens, late = config.max_len * config.batch_size, gradients_come_late(config, world_size)
    if least_bytes(costs, tokens, late_gradients=late) > usable - taken:
        return [_leanest(model, config)] * len(costs)
    return assign_levels(costs, tokens, usable - taken, late_gradients=late)


def choose_levels(
    model: LanguageModel, report: StateReport, config: RunConfig, world_size: int, memory: int | None
) -> list[str]:
    """`choose_recompute` from shapes alone, for the plan; without `memory` (bytes) nothing is recomputed."""
    count = len(report.layers)
    if config.recompute != "auto":
        return [config.recompute] * count
    if memory is None:
        return ["none"] * count
    for level in model.recompute_levels:
        estimate = estimate_memory(report, model.config, config, world_size, [level] * count)
        if estimate.total < _USABLE * memory:
            return [level] * count
    return [_leanest(model, config)] * count


def _leanest(model: LanguageModel, config: RunConfig) -> str:
    """Groups of few layers keep more than the layers."""
    kept = {level: kept_bytes(model.config, config, [level] * len(model.blocks)) for level in ("full", GROUP)}
    return min(kept, key=kept.__getitem__)

"""Which layers recompute what in the backward pass: memory against time."""

from typing import Any

import torch
from torch import nn

from models.report import StateReport, state_report
from training.config import RunConfig
from training.memory import LEVELS, estimate_memory

_USABLE = 0.92  # of a GPU's memory; the rest goes to the allocator's gaps and NCCL


def choose_recompute(
    model: nn.Module, config: RunConfig, world_size: int = 1, device: torch.device | None = None
) -> list[str]:
    """A level of LEVELS for each layer: what `recompute` says, or with `auto` the least that fits into the memory."""
    report = state_report(model)
    total = torch.cuda.get_device_properties(device).total_memory if device and device.type == "cuda" else None
    return choose_levels(report, model.config, config, world_size, total)


def choose_levels(
    report: StateReport, model_config: Any, config: RunConfig, world_size: int, memory: int | None
) -> list[str]:
    """`choose_recompute` from shapes alone; `memory` in bytes, None on a CPU, where nothing is recomputed."""
    count = len(report.layers)
    if config.recompute != "auto":
        return [config.recompute] * count
    if memory is None:
        return ["none"] * count
    for level in LEVELS:
        if estimate_memory(report, model_config, config, world_size, [level] * count).total < _USABLE * memory:
            return [level] * count
    return ["full"] * count

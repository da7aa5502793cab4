"""What a run would do, from shapes alone: `plan=true` prints it without weights, corpus or GPU."""

import math
import os
from dataclasses import dataclass, replace

import torch

from models.expansion import expand_state
from models.report import StateReport, state_report
from training.config import RunConfig
from training.memory import MemoryEstimate, estimate_memory, optimizer_bytes
from training.progress import short
from training.recompute import choose_levels
from training.rules import accumulation, slots_per_step
from training.start import expansion_arguments, shape_model

_ASSUMED_GPU_BYTES = 80 * 10**9  # where no GPU is visible, recompute=auto plans for this


@dataclass(frozen=True)
class RunPlan:
    """Sizes of a run."""

    config: RunConfig
    world_size: int
    before: StateReport
    after: StateReport
    expansion: str | None  # the expansion's own table
    memory: MemoryEstimate
    levels: list[str]
    trained_parameters: int

    @property
    def slots(self) -> int:
        return slots_per_step(self.config, self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.slots * self.config.max_len

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and two fp32 moments of what trains."""
        return 4 * self.after.total_parameters + 8 * self.trained_parameters

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward, without recomputation; what MFU counts."""
        return 3 * self.after.flops_per_token

    def __str__(self) -> str:
        return "\n".join(f"{name:<22}{text}" if name else text for name, text in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        config = self.config
        total = self.tokens_per_step * config.n_train_steps
        count = (math.ceil if config.save_last else math.floor)(config.n_train_steps / config.save_interval)
        size, every = self.checkpoint_bytes / 1e9, config.save_interval
        kept = min(count, config.keep_last) if config.keep_last else count
        gpu = "process" if config.launch == "cpu" else "GPU"
        products = ", fp8 products" if config.products == "fp8" else ""
        lines = [
            ("run", str(config.run_dir)),
            ("model", f"{config.model_label} ({self.after.model_type}), init_from={config.init_from}"),
            ("method", self._method()),
            ("parameters", _change(self.before.total_parameters, self.after.total_parameters)),
            ("trained parameters", f"{self.trained_parameters:,}"),
            ("state elements", _change(self.before.total_elements, self.after.total_elements)),
            ("FLOPs a token", f"{self.training_flops_per_token:.4g} (forward and backward)"),
            ("launch", f"{config.launch} on {self.world_size} {gpu}(s), {config.dtype} compute{products}"),
            *self._hint(),
            ("memory a " + gpu, f"about {self.memory.total / 1e9:.1f} GB, recompute={_levels(self.levels)}"),
            ("tokens a step", self._accumulation()),
            ("steps", f"{config.n_train_steps:,}, {total:,} tokens in total ({short(total)})"),
            ("learning rate", f"{config.lr_scheduler} {config.lr:g} -> {config.min_lr:g}"),
            ("warm-up", f"{config.n_warmup_steps:,} steps"),
            ("data", f"{config.data_name}: {config.data_path}"),
            ("checkpoints", f"{size:.2f} GB every {every} steps, {kept} kept: {kept * size:.1f} GB"),
        ]  # fmt: skip
        return [*lines, ("", self.expansion)] if self.expansion else lines

    def _hint(self) -> list[tuple[str, str]]:
        """DeepSpeed keeps a second master copy, which a single GPU has nobody to share with."""
        if self.world_size > 1 or not self.config.launch.startswith("zero"):
            return []
        alone = replace(self.config, launch="ddp")
        parameters = self.after.total_parameters
        saved = optimizer_bytes(parameters, self.config, 1) - optimizer_bytes(parameters, alone, 1)
        return [("", f"{'':22}(on one GPU launch=ddp does the same in {saved / 1e9:.1f} GB less)")]

    def _method(self) -> str:
        config = self.config
        if not config.expands:
            return "LPT (no expansion)"
        mode = next(layer.drop_mode for layer in self.after.layers if layer.drop_mode)
        layers = [layer.layer for layer in self.after.layers if layer.drop_mode]
        frozen = ", all else frozen" if config.freeze_rest else ""
        return f"StateX, drop_mode={mode}, {len(layers)} layers ({', '.join(map(str, layers))}){frozen}"

    def _accumulation(self) -> str:
        config = self.config
        rounds = accumulation(config, self.world_size)
        return (
            f"{self.tokens_per_step:,} = {self.world_size} x {config.batch_size} sequence(s)"
            f" x {config.max_len:,} tokens x {rounds} micro-batch(es)"
        )


def make_plan(config: RunConfig, world_size: int) -> RunPlan:
    """Work out a run on meta tensors.

    Raises:
        ConfigError: an unknown model, or tokens_per_step that does not divide.
        ValueError: an expansion that the model does not allow.
    """
    model = shape_model(config)
    before = state_report(model)
    expansion = None
    if config.expands:
        expansion = str(expand_state(model, **expansion_arguments(config)))
    after = state_report(model)
    memory = _device_memory(config)
    levels = choose_levels(model, after, config, world_size, memory)
    estimate = estimate_memory(after, model.config, config, world_size, levels)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return RunPlan(config, world_size, before, after, expansion, estimate, levels, trained)


def planned_world_size(config: RunConfig) -> int:
    """Processes that the run has, or would have: what the launcher started, n_gpus, or what is visible."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return config.n_gpus or (max(1, torch.cuda.device_count()) if config.launch != "cpu" else 1)


def _device_memory(config: RunConfig) -> int | None:
    if config.launch == "cpu":
        return None
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return _ASSUMED_GPU_BYTES


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / before:.2f}x)"


def _levels(levels: list[str]) -> str:
    kinds = sorted(set(levels))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{kind} x{levels.count(kind)}" for kind in kinds)

"""A run in progress: everything the loop holds, and how it becomes a checkpoint and comes back from one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from data import merge_states
from training.carry import CarriedStates
from training.checkpoint import (
    TRAINER_FILE,
    checkpoint_bytes,
    full_state_dict,
    prune,
    read_trainer_state,
    save_checkpoint,
)
from training.config import ConfigError, RunConfig
from training.distribution import Distribution
from training.metrics import MetricsLog
from training.optimizer_state import load_optimizer_state, save_optimizer_state
from training.progress import Console
from training.rng import load_rng, save_rng

_ONE_FILE = "1000GB"  # model.safetensors is never split


@dataclass
class Progress:
    """How far a run is; the numbers a checkpoint holds."""

    step: int = 0
    tokens: int = 0  # read, over all processes
    updates: int = 0  # steps that moved the parameters; AdamW's own count
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0


@dataclass
class Run:
    """What the loop works on."""

    config: RunConfig
    distribution: Distribution
    model: nn.Module  # unwrapped; distribution.engine is what computes
    tokenizer: Any
    loader: Any
    validation: Any  # None without validation data
    carried: CarriedStates | None  # state_passing
    progress: Progress
    console: Console
    metrics: MetricsLog | None = None  # on rank 0, once the loop begins

    @property
    def rank(self) -> int:
        return self.distribution.rank


def save_run(run: Run) -> Path:
    """Write the checkpoint of the current step and delete what keep_last and keep_every do not want.

    Raises:
        RunError: it could not be written; the earlier ones are as they were.
    """
    position = merge_states(run.distribution.gather_objects(run.loader.state_dict()))
    writers = [
        lambda folder: _write_model(run, folder),
        lambda folder: save_optimizer_state(run.distribution, folder / "state", run.progress.updates),
        lambda folder: _write_own(run, folder / "state"),
        lambda folder: _write_progress(run, folder, position),
    ]
    needed = int(1.05 * checkpoint_bytes(run.model)) + 2**20
    folder = save_checkpoint(run.distribution, run.config.run_dir, run.progress.step, writers, needed)
    if run.distribution.is_main:
        prune(run.config.run_dir, run.progress.step, run.config.keep_last, run.config.keep_every)
    return folder


def restore_run(run: Run, folder: Path) -> None:
    """Continue from a checkpoint; the model's weights were read from it already."""
    saved = read_trainer_state(folder)
    run.progress = Progress(**saved["progress"])
    state = folder / "state"
    load_optimizer_state(run.distribution, state, run.progress.updates)
    try:
        run.loader.load_state_dict(saved["data"])
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if run.carried:
        run.carried.load(state, run.distribution.device)
    own = state / f"rng-{run.rank}.safetensors"
    if own.is_file() and saved["world_size"] == run.distribution.world_size:
        load_rng(own, run.distribution.device)


def _write_model(run: Run, folder: Path) -> None:
    weights = full_state_dict(run.distribution, run.model)
    if weights is None:
        return
    transformers_logging.disable_progress_bar()
    run.model.save_pretrained(folder, state_dict=weights, max_shard_size=_ONE_FILE)
    run.tokenizer.save_pretrained(folder)


def _write_own(run: Run, folder: Path) -> None:
    save_rng(folder / f"rng-{run.rank}.safetensors", run.distribution.device)
    if run.carried:
        run.carried.save(folder / f"carried-{run.rank}.safetensors")


def _write_progress(run: Run, folder: Path, position: dict[str, Any]) -> None:
    if not run.distribution.is_main:
        return
    values = {
        "progress": asdict(run.progress),
        "world_size": run.distribution.world_size,
        "launch": run.config.launch,
        "data": position,
    }
    (folder / TRAINER_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")
    if run.metrics:
        run.metrics.sync()

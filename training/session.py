"""Around the loop: the run's folder, what the user is told first, the plot at the end."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from models.language_model import LanguageModel
from training.checkpoint import checkpoints, newest_complete, remove_leftovers
from training.config import ConfigError, RunConfig, RunError, to_json
from training.distribution import Distribution
from training.metrics import read_metrics
from training.plan import RunPlan
from training.plot import plot_losses
from training.progress import Console
from training.signals import clear_requeue_note
from training.start import started_with


def on_main(distribution: Distribution, action: Callable[[], Path | None]) -> Path | None:
    """Run `action` on rank 0 alone; its result, or its ConfigError or RunError, reaches every rank."""
    result, error = None, None
    if distribution.is_main:
        try:
            result = action()
        except (ConfigError, RunError) as caught:
            error = caught
    result, error = distribution.broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def open_run(config: RunConfig, console: Console) -> Path | None:
    """Make or find the run's folder; answers the checkpoint to go on from.

    Raises:
        ConfigError: the folder cannot be made.
        RunError: the run has checkpoints, and all of them are damaged.
    """
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={config.output_dir}: cannot be written ({error})") from None
    clear_requeue_note(run_dir)
    remove_leftovers(run_dir)
    checkpoint = newest_complete(run_dir, console.say)
    if checkpoint is None and checkpoints(run_dir):
        raise RunError(f"{run_dir}: no checkpoint is complete; use another run_name to start again")
    if checkpoint is not None:
        _say_changes(config, console)
    return checkpoint


def _say_changes(config: RunConfig, console: Console) -> None:
    """Keys that a continuation may change: whoever did so without meaning to should see it."""
    before = started_with(config) or {}
    changed = [
        f"{key} {before[key]} -> {now}"
        for key, now in to_json(config).items()
        if key != "resume" and key in before and before[key] != now
    ]
    if changed:
        console.say(f"changed since this run was last started: {', '.join(changed)}")


def write_description(config: RunConfig, model: LanguageModel) -> None:
    """args.json, enough to start the run again, and model_config.json, the model's shape."""
    _write_json(config.run_dir / "args.json", to_json(config))
    _write_json(config.run_dir / "model_config.json", model.config.to_dict())


def announce(
    console: Console, plan: RunPlan, distribution: str, checkpoint: Path | None, levels: list[str]
) -> None:
    console.say(f"{plan}\n{'distribution':<22}{distribution}")
    if sorted(set(levels)) != sorted(set(plan.levels)):
        kinds = ", ".join(f"{kind} x{levels.count(kind)}" for kind in sorted(set(levels)))
        console.say(f"recompute, measured on this GPU: {kinds}")
    console.say(f"going on from {checkpoint}" if checkpoint else "starting at step 0")


def draw_losses(config: RunConfig, console: Console) -> None:
    """loss.png beside the records, where there are any."""
    if not read_metrics(config.run_dir / "metrics.jsonl"):
        return
    target = plot_losses([config.run_dir], config.run_dir / "loss.png")
    console.say(f"records {config.run_dir / 'metrics.jsonl'}, plot {target}")


def _write_json(path: Path, values: dict) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)

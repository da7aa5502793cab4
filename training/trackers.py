"""TensorBoard, wandb, swanlab and trackio, through accelerate's wrappers."""

import importlib.util
from pathlib import Path
from typing import Any

from training.config import ConfigError, RunConfig

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio"}


def check_trackers(config: RunConfig) -> None:
    """Every tracker of `report_to` must be installed.

    Raises:
        ConfigError: one is not; the message says how to install it.
    """
    for name in config.report_to:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"report_to={name}: not installed; pip install {_PACKAGES[name]}, or report_to=none"
            )


def open_tracker(name: str, config: RunConfig, run_dir: Path, step: int) -> Any:
    """A started tracker with `log(values, step=)` and `finish()`; `step` is where training goes on from."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name == "tensorboard":
        # purge_step hides the events that a crashed run wrote beyond the checkpoint
        tracker = LOGGER_TYPE_TO_CLASS[name](name, logging_dir=str(run_dir), purge_step=step + 1)
    else:
        tracker = LOGGER_TYPE_TO_CLASS[name](config.proj_name, name=config.run_name)
    tracker.start()
    return tracker

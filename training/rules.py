"""What the values of a configuration may be, checked without opening any file."""

import math
import os
from collections.abc import Callable

from training.config import ConfigError, RunConfig

SCHEDULERS = ("cosine", "constant", "wsd", "cosine_restarts")
LAUNCHES = ("zero1", "zero2", "zero3", "ddp", "cpu")
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")

_CHOICES: dict[str, tuple[str, ...]] = {
    "init_from": ("pretrained", "scratch"),
    "reinit": ("standard", "published"),
    "resume": ("never", "auto"),
    "lr_scheduler": SCHEDULERS,
    "launch": LAUNCHES,
    "dtype": ("bf16", "fp32"),
    "products": ("bf16", "fp8"),
    "grad_comm_dtype": ("fp32", "bf16"),
    # families have some of these levels
    "recompute": ("auto", "none", "mixer", "conv", "scan", "mlp", "full", "group"),
}

_AT_LEAST: dict[str, float] = {
    "max_len": 2, "batch_size": 1, "grad_accum_steps": 1, "tokens_per_step": 2, "num_workers": 0,
    "n_train_steps": 1, "n_warmup_steps": 0, "n_decay_steps": 1, "n_restarts": 1, "stop_at_step": 1,
    "weight_decay": 0, "grad_clip": 0, "min_lr": 0, "beta1": 0, "beta2": 0, "max_nonfinite_steps": 1,
    "seed": 0, "n_gpus": 0, "save_interval": 1, "keep_last": 0, "keep_every": 0, "log_interval": 1,
    "val_interval": 0, "val_batches": 1, "drop_prop": 1, "expand_factor": 2,
}  # fmt: skip

_BELOW: dict[str, float] = {"beta1": 1, "beta2": 1, "seed": 2**63}


def check_rules(config: RunConfig) -> None:
    """Ranges, choices and combinations.

    Raises:
        ConfigError: the first rule that is broken, naming the key and what is allowed.
    """
    for rule in (_check_choices, _check_ranges, _check_names, *_COMBINATIONS):
        rule(config)


def _check_choices(config: RunConfig) -> None:
    for key, allowed in _CHOICES.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value}: use one of {', '.join(allowed)}")
    for name in config.report_to:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to={name}: use some of {', '.join(TRACKERS)}, joined by commas, or none"
            )


def _check_ranges(config: RunConfig) -> None:
    for key, least in _AT_LEAST.items():
        value = getattr(config, key)
        if value is not None and not value >= least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    for key, bound in _BELOW.items():
        if not getattr(config, key) < bound:
            raise ConfigError(f"{key}={getattr(config, key)}: must be below {bound}")
    for key in ("lr", "min_lr", "weight_decay", "grad_clip"):
        if not math.isfinite(getattr(config, key)):
            raise ConfigError(f"{key}={getattr(config, key)}: must be finite")
    if not config.lr > 0:
        raise ConfigError(f"lr={config.lr}: must be above 0")


def _check_names(config: RunConfig) -> None:
    for key in ("proj_name", "run_name"):
        value = getattr(config, key)
        if value is not None and (value in (".", "..") or os.sep in value):
            raise ConfigError(f"{key}={value}: must be one folder name, without {os.sep!r}")


def _check_schedule(config: RunConfig) -> None:
    if config.n_warmup_steps > config.n_train_steps:
        raise ConfigError(
            f"n_warmup_steps={config.n_warmup_steps}: the run has only n_train_steps={config.n_train_steps}"
        )
    if config.min_lr > config.lr:
        raise ConfigError(f"min_lr={config.min_lr}: must not be above lr={config.lr}")
    if config.n_decay_steps is not None and config.lr_scheduler != "wsd":
        raise ConfigError(f"n_decay_steps={config.n_decay_steps}: only lr_scheduler=wsd has a final decay")
    span = config.n_train_steps - config.n_warmup_steps
    if config.lr_scheduler == "cosine_restarts" and 2 * config.n_restarts > span:
        raise ConfigError(
            f"n_restarts={config.n_restarts}: a cycle needs two steps, and {span} come after the warm-up"
        )
    decay = config.n_decay_steps or 0
    if decay + config.n_warmup_steps > config.n_train_steps:
        raise ConfigError(
            f"n_decay_steps={decay}: warm-up and decay together exceed n_train_steps={config.n_train_steps}"
        )


def _check_expansion(config: RunConfig) -> None:
    if config.drop_prop is not None and config.layers is not None:
        raise ConfigError("drop_prop and layers exclude each other; give one of them")
    if config.expands:
        return
    for key, unset in (("drop_mode", None), ("expand_factor", None), ("freeze_rest", False)):
        if getattr(config, key) != unset:
            raise ConfigError(
                f"{key}={getattr(config, key)}: nothing is expanded; give drop_prop or layers too"
            )


def _check_start(config: RunConfig) -> None:
    if config.init_from == "scratch" and config.ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path={config.ckpt_path}: init_from=scratch reads no weights; drop ckpt_path, or use"
            " init_from=pretrained"
        )


def _check_tokens(config: RunConfig) -> None:
    if config.tokens_per_step is not None and config.tokens_per_step % config.max_len:
        raise ConfigError(
            f"tokens_per_step={config.tokens_per_step}: must be a multiple of max_len={config.max_len}"
        )
    if config.n_gpus:
        accumulation(config, config.n_gpus)


def _check_states(config: RunConfig) -> None:
    if config.state_passing and config.compile:
        raise ConfigError("compile=true: not together with state_passing=true")
    if config.state_passing and config.reset_at_documents and config.batch_size > 1:
        raise ConfigError(
            "state_passing with reset_at_documents needs batch_size=1; accumulate with tokens_per_step"
        )


def _check_machine(config: RunConfig) -> None:
    if config.grad_comm_dtype == "bf16" and not config.launch.startswith("zero"):
        raise ConfigError("grad_comm_dtype=bf16: needs launch=zero1, zero2 or zero3")
    if config.grad_comm_dtype == "bf16" and config.dtype != "bf16":
        raise ConfigError("grad_comm_dtype=bf16: needs dtype=bf16")
    if config.products == "fp8":
        _check_fp8(config)


def _check_fp8(config: RunConfig) -> None:
    if config.dtype != "bf16":
        raise ConfigError(f"products=fp8: needs dtype=bf16, not dtype={config.dtype}")
    if config.launch == "cpu":
        raise ConfigError(
            "products=fp8: needs a GPU of compute capability 8.9 or more (Ada, Hopper, or newer), and"
            " launch=cpu uses none; leave products=bf16"
        )
    if config.compile:
        raise ConfigError("products=fp8: not together with compile=true")


_COMBINATIONS: tuple[Callable[[RunConfig], None], ...] = (
    _check_schedule, _check_expansion, _check_start, _check_tokens, _check_states, _check_machine,
)  # fmt: skip


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one optimiser step on each of `world_size` processes.

    Raises:
        ConfigError: `tokens_per_step` does not divide into whole micro-batches.
    """
    if config.tokens_per_step is None:
        return config.grad_accum_steps
    round_tokens = config.max_len * config.batch_size * world_size
    if config.tokens_per_step % round_tokens:
        raise ConfigError(
            f"tokens_per_step={config.tokens_per_step}: {world_size} process(es) x"
            f" batch_size={config.batch_size} x max_len={config.max_len} make {round_tokens} tokens, which do"
            " not divide it; change batch_size or n_gpus"
        )
    return config.tokens_per_step // round_tokens


def slots_per_step(config: RunConfig, world_size: int) -> int:
    """Sequences of one optimiser step over all processes."""
    return accumulation(config, world_size) * config.batch_size * world_size


def cpu_rehearsal() -> bool:
    """Tests run DeepSpeed on a CPU; nobody else should: it is slow, and accelerate does not support it.

    scripts/common.sh then starts more CPU processes than there are cores, too.
    """
    return os.environ.get("STATEX_CPU_REHEARSAL") == "1"

"""All checks of a run in one process, before anything is launched or written.

    python -m training.validate key=value ...     # exit status 0, or 2 and one line that says what to change

Launchers turn every exit status into 1 and print a traceback, so the scripts check before they start one.
`plan=true` prints the plan.
"""

import os
import sys
from collections.abc import Sequence

import torch

from training.config import ConfigError, RunConfig, RunError, parse_arguments
from training.rules import accumulation, cpu_rehearsal


def check_arguments(config: RunConfig) -> None:
    """What can be said without opening a checkpoint or a corpus: sizes, the expansion, the machine.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    from training.plan import planned_world_size

    accumulation(config, planned_world_size(config))
    _check_model_arguments(config)
    if config.launch != "cpu" and not config.plan and not cpu_rehearsal():
        _check_gpus(config)


def check_files(config: RunConfig) -> None:
    """Output folder, starting weights, tokenizer and corpus.

    Raises:
        ConfigError: what is missing or does not fit, and what to do.
    """
    from training.feeding import check_data
    from training.plan import planned_world_size
    from training.start import check_output, check_weights

    check_output(config)
    check_weights(config)
    check_data(config, planned_world_size(config))


def _check_gpus(config: RunConfig) -> None:
    present = torch.cuda.device_count()
    if present == 0:
        raise ConfigError(
            f"launch={config.launch}: no GPU is visible. Either run on a machine with GPUs (does nvidia-smi"
            " list them? is CUDA_VISIBLE_DEVICES empty?), or run the same path with a tiny model on the CPU:"
            " scale=tiny with the scripts, launch=cpu with train.py"
        )
    # n_gpus counts the GPUs of all machines; scripts and launchers say how many of them are on this one
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or config.n_gpus or 0)
    if here > present:
        raise ConfigError(
            f"n_gpus={config.n_gpus}: that is {here} on this machine, and {present} are visible; with fewer,"
            " tokens_per_step is kept by accumulating more"
        )
    if config.products == "fp8":
        _check_fp8()


def _check_fp8() -> None:
    from models.ops.matmul import fp8_problem

    if problem := fp8_problem():
        raise ConfigError(f"products=fp8: {problem}; or leave products=bf16")


def _check_model_arguments(config: RunConfig) -> None:
    from models.expansion import plan_expansion
    from training.start import shape_model

    model = shape_model(config)
    levels = model.recompute_levels
    if config.recompute not in ("auto", *levels):
        raise ConfigError(f"recompute={config.recompute}: this model offers auto, {', '.join(levels)}")
    if not config.expands:
        return
    try:
        plan_expansion(
            model.config,
            config.drop_prop,
            config.drop_mode,
            layers=config.layers,
            expand_factor=config.expand_factor,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when the run could start."""
    try:
        config = parse_arguments(arguments)
        check_arguments(config)
        if config.plan:
            from training.plan import make_plan, planned_world_size

            print(make_plan(config, planned_world_size(config)))
            return 0
        check_files(config)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

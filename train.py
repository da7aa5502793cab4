"""Post-train a linear RNN, with a larger recurrent state (StateX) or without (LPT).

    python train.py launch=cpu model_name=gla-tiny init_from=scratch tokenizer=FOLDER data_path=FOLDER train_config=tiny/...
    accelerate launch --config_file configs/launch/zero1.yaml --num_processes 8 train.py key=value ...

All keys stand in training/config.py; the scripts in scripts/ choose them. arguments -> model -> expansion -> data -> loop.
"""

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402

import torch  # noqa: E402

from training.carry import CarriedStates  # noqa: E402
from training.checkpoint import newest_complete, remove_leftovers  # noqa: E402
from training.config import ConfigError, RunConfig, RunError, parse_arguments, to_json  # noqa: E402
from training.distribution import Distribution, start_distribution  # noqa: E402
from training.feeding import build_loader, build_validation, load_tokenizer, own_groups  # noqa: E402
from training.loop import train  # noqa: E402
from training.metrics import MetricsLog  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402
from training.plan import RunPlan, make_plan, planned_world_size  # noqa: E402
from training.plot import plot_losses  # noqa: E402
from training.progress import Console, Throughput, peak_flops  # noqa: E402
from training.recompute import choose_recompute  # noqa: E402
from training.rng import seed_everything  # noqa: E402
from training.rules import accumulation  # noqa: E402
from training.signals import REQUEUE_STATUS, StopRequest, clear_requeue_note, leave_requeue_note  # noqa: E402
from training.start import start_model  # noqa: E402
from training.state import Progress, Run, restore_run  # noqa: E402
from training.validate import check_arguments, check_files  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Run; answers the exit status: 0 done, 1 the run failed, 2 the arguments are wrong, 75 stopped by a signal."""
    try:
        config = parse_arguments(arguments)
        check_arguments(config)
        if config.plan:
            print(make_plan(config, planned_world_size(config)))
            return 0
        if config.validate_only:
            check_files(config)
            return 0
        return run(config)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def run(config: RunConfig) -> int:
    """One run from its first or its saved step to its last."""
    stop = StopRequest()
    distribution = start_distribution(config)
    try:
        distribution.main_first(lambda: check_files(config))
        plan = make_plan(config, distribution.world_size)
        checkpoint = distribution.broadcast_object(prepare_folder(config, plan) if distribution.is_main else None)
        seed_everything(config.seed + distribution.rank)

        # model, grown where the run asks for it
        model, report = start_model(config, checkpoint)
        model.to(distribution.device)
        model.set_recompute(choose_recompute(model, config, distribution.world_size, distribution.device))
        if config.compile:
            model.compile()
        distribution.prepare(model, build_optimizer(model, config))

        # data: this rank's slots of every step
        tokenizer = load_tokenizer(config)
        groups = own_groups(config, distribution.rank, distribution.world_size)
        loader = build_loader(config, tokenizer, distribution.rank, distribution.world_size)
        validation = build_validation(config, tokenizer, distribution.rank, distribution.world_size)
        carried = CarriedStates(groups) if config.state_passing else None

        console = Console(distribution.is_main, config.last_step)
        training = Run(config, distribution, model, tokenizer, loader, validation, carried, Progress(), console)
        if checkpoint is not None:
            restore_run(training, checkpoint)
        announce(training, plan, report)
        stopped = loop(training, plan, stop)
    finally:
        distribution.close()
    return REQUEUE_STATUS if stopped else 0

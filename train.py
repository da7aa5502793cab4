"""Post-train a linear RNN, with a larger recurrent state (StateX) or without (LPT).

    accelerate launch --config_file configs/launch/zero1.yaml --num_processes 8 train.py key=value ...
    python train.py launch=cpu model_name=gla-tiny init_from=scratch train_config=tiny tokenizer=A data_path=B

Every key stands in training/config.py with its meaning. The story: arguments -> model -> expansion -> loop.
Exit status: 0 done, 1 failed, 2 wrong arguments (nothing written), 75 stopped by a signal (resume=auto).
"""

import errno
import gc
import sys
import time
from collections.abc import Sequence

# ruff: noqa: E402
STARTED = time.perf_counter()  # the imports below belong to the time to the first step
gc.disable()  # they leave no garbage worth a fifth of their time

from training.carry import CarriedStates
from training.config import ConfigError, RunConfig, RunError, parse_arguments
from training.distribution import start_distribution
from training.feeding import build_loader, build_validation, load_tokenizer, own_groups
from training.loop import train
from training.metrics import MetricsLog
from training.optimizer import build_optimizer
from training.plan import make_plan, planned_world_size
from training.progress import Console, StartClock, Throughput, peak_flops
from training.recompute import choose_recompute
from training.rng import seed_everything
from training.rules import accumulation
from training.session import announce, draw_losses, on_main, open_run, write_description
from training.signals import REQUEUE_STATUS, StopRequest, leave_requeue_note
from training.start import end_with, start_model_beside, start_shape
from training.state import Progress, Run, restore_run
from training.validate import check_arguments, check_files

gc.freeze()
gc.enable()


def main(arguments: Sequence[str]) -> int:
    """Answers the exit status."""
    try:
        config = parse_arguments(arguments)
        check_arguments(config)
        if config.plan:
            print(make_plan(config, planned_world_size(config)))
        elif config.validate_only:
            check_files(config)
        else:
            return run(config)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({error}); free some space, then resume=auto", file=sys.stderr)
        return 1
    return 0


def run(config: RunConfig) -> int:
    """One run, from its first or its saved step to its last."""
    start, stop = StartClock(STARTED), StopRequest()
    coming = start_model_beside(config, None) if config.resume == "never" else None  # no checkpoint to find
    distribution = start_distribution(config)
    try:
        rank, world_size, device = distribution.rank, distribution.world_size, distribution.device
        console = Console(distribution.is_main, config.last_step)
        plan = make_plan(config, world_size)
        on_main(distribution, lambda: check_files(config))
        checkpoint = on_main(distribution, lambda: open_run(config, console))
        coming = coming or start_model_beside(config, checkpoint)
        seed_everything(config.seed + rank)
        start.done("checks")

        # ------------------------------------------------------------ beside the weights: recomputation, data
        shape = start_shape(config, checkpoint)
        levels = distribution.broadcast_object(choose_recompute(shape, config, world_size, device))
        start.done("recomputation")
        tokenizer = load_tokenizer(config)
        loader = build_loader(config, tokenizer, rank, world_size, console)  # this rank's slots of every step
        validation = build_validation(config, tokenizer, rank, world_size)
        carried = CarriedStates(own_groups(config, rank, world_size)) if config.state_passing else None
        start.done("data")

        # ------------------------------------------------------------ model, expanded where asked for
        model = coming.result().to(device)
        model.set_recompute(levels)
        start.done("model")
        if config.compile:
            model.compile()
        distribution.prepare(model, build_optimizer(model, config))

        # ------------------------------------------------------------ loop
        state = Run(config, distribution, model, tokenizer, loader, validation, carried, Progress(), console)
        if checkpoint is not None:
            restore_run(state, checkpoint)
        start.done("engine")
        if distribution.is_main:
            write_description(config, model)
            state.metrics = MetricsLog(config, config.run_dir, state.progress.step)
        announce(console, plan, distribution.describe(), checkpoint, levels)
        throughput = Throughput(world_size, plan.training_flops_per_token, peak_flops(device))
        stopped = train(state, accumulation(config, world_size), throughput, stop, start)
        if distribution.is_main:
            state.metrics.close()
            draw_losses(config, console)
            if stopped:
                leave_requeue_note(config.run_dir, state.progress.step)
        return REQUEUE_STATUS if stopped else 0
    finally:
        distribution.close()


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))

"""The loop: micro-batches -> gradients -> update -> records -> checkpoints."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from models.language_model import IGNORED
from training.config import RunError
from training.heldout import heldout_loss, model_inputs
from training.optimizer import set_learning_rate
from training.progress import StartClock, Throughput, duration, format_record, memory_gb
from training.schedule import learning_rate
from training.signals import StopRequest
from training.state import Run, save_run


@dataclass(frozen=True)
class StepResult:
    """One optimiser step, the same numbers on every rank."""

    loss: float  # mean over all predicted tokens of the global batch, nats
    grad_norm: float  # before clipping
    moved: bool  # False: the step was skipped
    stop: bool  # a rank was asked to stop
    losses: tuple[torch.Tensor, ...]  # this rank's micro-batches, summed loss each


def train(run: Run, rounds: int, throughput: Throughput, stop: StopRequest, start: StartClock) -> bool:
    """Train to the last step, or until a signal asks to stop, which saves the state first.

    Args:
        rounds: micro-batches of a step on this rank.
        start: has run since the program began, for the time to the first step.

    Returns:
        whether a signal stopped the run before its last step.

    Raises:
        RunError: a checkpoint could not be written, or too many steps in a row were not finite.
    """
    config, progress = run.config, run.progress
    batches = iter(run.loader)
    stopped = False
    throughput.since = time.perf_counter()
    while progress.step < config.last_step and not stopped:
        micro_batches, waited = take(batches, rounds)
        lr = learning_rate(config, progress.step + 1)
        result = run_step(run, micro_batches, lr, stop)
        count_step(run, result, micro_batches)
        throughput.add(config.max_len * len_of(micro_batches) * run.distribution.world_size, waited)
        if progress.step in (1, config.last_step) or progress.step % config.log_interval == 0:
            record_step(run, result, lr, throughput)
        run.console.first_step(start)
        stopped = result.stop
        finish_step(run, throughput, stopped)
    return stopped and progress.step < config.last_step


def take(batches: Iterator[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], float]:
    """The next micro-batches and the seconds spent waiting for them.

    Raises:
        RunError: the corpus cannot be read any more, too many of its lines are broken, or a worker died.
    """
    began = time.perf_counter()
    try:
        taken = [next(batches) for _ in range(count)]
    except (ValueError, OSError) as error:
        raise RunError(f"data_path: {' '.join(str(error).split())}") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"{' '.join(str(error).split())}: ended from outside, or for lack of memory (then fewer "
            "num_workers); resume=auto goes on from the last checkpoint"
        ) from None
    return taken, time.perf_counter() - began


def run_step(run: Run, micro_batches: list[dict[str, Any]], lr: float, stop: StopRequest) -> StepResult:
    """Forward, backward and update; gradients of the mean loss over the global batch's predicted tokens."""
    distribution = run.distribution
    # the count is reduced before the backward pass, so that 1 rank and 8 give every token the same weight
    count = torch.tensor([sum(predicted_tokens(batch) for batch in micro_batches)], dtype=torch.float64)
    count = distribution.sum(count.to(distribution.device))
    scale = (distribution.world_size / count).float()
    losses = []
    for index, batch in enumerate(micro_batches):
        with distribution.accumulating(last=index == len(micro_batches) - 1):
            loss = forward_loss(run, batch)
            # a loss that is not finite must reach every rank's gradients, whatever its own gradient is
            distribution.backward(loss * torch.where(torch.isfinite(loss), scale[0], math.nan))
        losses.append(loss.detach())
    stats = torch.stack([torch.stack(losses).double().sum(), count.new_tensor(float(stop.asked))])
    distribution.sum(stats)
    set_learning_rate(distribution.optimizer, lr)
    grad_norm, moved = distribution.update()
    if run.carried:
        run.carried.end_step(keep=moved)
    loss_sum, stops, tokens = torch.cat([stats, count]).tolist()
    return StepResult(loss_sum / tokens, grad_norm, moved, stops > 0, tuple(losses))


def forward_loss(run: Run, batch: dict[str, Any]) -> torch.Tensor:
    """Summed loss of one micro-batch."""
    inputs = model_inputs(batch, run.distribution.device)
    cache = run.carried.before(batch["slots"]) if run.carried else None
    with run.distribution.autocast():
        output = run.distribution.engine(
            **inputs,
            loss_reduction="sum",
            logits_to_keep=1,  # the loss needs none
            past_key_values=cache,
            use_cache=cache is not None,
        )
    if run.carried:
        inside = [position["token"] > 0 for position in batch["positions"]]
        run.carried.after(
            batch["slots"], output.past_key_values, inside if run.config.reset_at_documents else None
        )
    return output.loss.float()


def predicted_tokens(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def len_of(micro_batches: list[dict[str, Any]]) -> int:
    """Sequences in some micro-batches."""
    return sum(len(batch["slots"]) for batch in micro_batches)


def count_step(run: Run, result: StepResult, micro_batches: list[dict[str, Any]]) -> None:
    """Advance the run by a step, and end it after too many skipped ones.

    Raises:
        RunError: max_nonfinite_steps in a row were not finite.
    """
    progress = run.progress
    progress.step += 1
    progress.tokens += run.config.max_len * len_of(micro_batches) * run.distribution.world_size
    if result.moved:
        progress.updates += 1
        progress.skipped_in_a_row = 0
        return
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    where = "; ".join(
        text
        for rank, texts in enumerate(run.distribution.gather_objects(suspects(result, micro_batches)))
        for text in (f"rank {rank}: {text}" for text in texts)
    )
    line = (
        f"step {progress.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite,"
        f" step skipped ({progress.skipped_in_a_row} in a row); batches at {where}"
    )
    run.console.say(line)
    if progress.skipped_in_a_row >= run.config.max_nonfinite_steps:
        raise RunError(f"{line}; max_nonfinite_steps={run.config.max_nonfinite_steps} reached, the run ends")


def suspects(result: StepResult, micro_batches: list[dict[str, Any]]) -> list[str]:
    """Corpus positions of the micro-batches whose loss is not finite; of all when only a gradient is not."""
    pairs = list(zip(micro_batches, result.losses))
    bad = [batch for batch, loss in pairs if not math.isfinite(float(loss))]
    return [str(batch["positions"]) for batch in bad or micro_batches]


def record_step(run: Run, result: StepResult, lr: float, throughput: Throughput) -> None:
    progress, config = run.progress, run.config
    record = {
        "step": progress.step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped_steps,
        "memory_gb": memory_gb(run.distribution.device),
        **throughput.record(config.last_step - progress.step),
    }
    run.console.say(format_record(record, config.n_train_steps))
    if run.metrics:
        run.metrics.write(record)
    run.console.advance(progress.step, result.loss)


def finish_step(run: Run, throughput: Throughput, stopped: bool) -> None:
    """Validation and checkpoint, where this step asks for them."""
    began = time.perf_counter()
    config, step = run.config, run.progress.step
    last = step == config.last_step
    if stopped:
        save(run)  # first of all: who sent the signal may not wait for a validation
    if run.validation and (last or (config.val_interval and step % config.val_interval == 0)):
        validate(run)
    if not stopped and ((last and config.save_last) or step % config.save_interval == 0):
        save(run)
    throughput.exclude(time.perf_counter() - began)


def save(run: Run) -> None:
    began = time.perf_counter()
    folder = save_run(run)
    run.console.say(f"saved {folder} in {duration(time.perf_counter() - began)}")


def validate(run: Run) -> None:
    result = heldout_loss(run.distribution, run.validation, run.config.max_len)
    positions = result["val_loss_by_position"].items()
    # held-out text shorter than a sequence reaches no far position
    far = ", ".join(f"{name}: {loss:.4f}" for name, loss in positions if loss is not None)
    run.console.say(f"step {run.progress.step}: held-out loss {result['val_loss']:.4f} (by position {far})")
    if run.metrics:
        run.metrics.write({"step": run.progress.step, "tokens": run.progress.tokens, **result})

"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from training.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of optimiser step `step`, counted from 1.

    Warm-up reaches `lr` at step `n_warmup_steps`; a decay reaches `min_lr` at step `n_train_steps`.
    """
    if step <= config.n_warmup_steps:
        return config.lr * step / config.n_warmup_steps
    done = step - config.n_warmup_steps
    span = max(1, config.n_train_steps - config.n_warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * _SHAPES[config.lr_scheduler](config, done, span)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _cosine_once(config: RunConfig, done: int, span: int) -> float:
    return _cosine(done / span)


def _constant(config: RunConfig, done: int, span: int) -> float:
    return 1.0


def _wsd(config: RunConfig, done: int, span: int) -> float:
    """Warm-up, stable, decay: flat, then linear to the end (MiniCPM, arXiv 2404.06395)."""
    decay = min(span, config.n_decay_steps or max(1, config.n_train_steps // 10))
    return min(1.0, (span - done) / decay)


def _cosine_restarts(config: RunConfig, done: int, span: int) -> float:
    """Equal cosine cycles, each from the peak down (SGDR, arXiv 1608.03983)."""
    # the last step closes the last cycle instead of opening another
    position = (done - 1) * config.n_restarts / span
    cycle_start = math.floor(position) * span / config.n_restarts
    return _cosine((done - cycle_start) * config.n_restarts / span)


_SHAPES = {
    "cosine": _cosine_once,
    "constant": _constant,
    "wsd": _wsd,
    "cosine_restarts": _cosine_restarts,
}

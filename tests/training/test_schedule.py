"""Learning rates by step, against values worked out by hand."""

import pytest

from training.config import RunConfig
from training.schedule import learning_rate


def schedule(kind: str, **keys) -> RunConfig:
    return RunConfig(
        **{"lr_scheduler": kind, "lr": 1.0, "min_lr": 0.0, "n_train_steps": 110, "n_warmup_steps": 10, **keys}
    )


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd", "cosine_restarts"])
def test_warm_up_is_linear_and_reaches_the_peak(kind):
    config = schedule(kind)
    assert [learning_rate(config, step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_falls_to_min_lr_at_the_last_step():
    config = schedule("cosine", min_lr=0.2)
    assert learning_rate(config, 60) == pytest.approx(0.6)  # half-way
    assert learning_rate(config, 110) == pytest.approx(0.2)


def test_the_published_schedule_ends_at_zero():
    config = RunConfig()
    assert learning_rate(config, 1000) == pytest.approx(3e-4)
    assert learning_rate(config, 20000) == pytest.approx(0.0, abs=1e-12)


def test_constant_stays():
    assert learning_rate(schedule("constant"), 110) == 1.0


def test_wsd_is_flat_then_linear_to_min_lr():
    config = schedule("wsd", n_decay_steps=20)
    assert learning_rate(config, 90) == 1.0
    assert learning_rate(config, 100) == pytest.approx(0.5)
    assert learning_rate(config, 110) == pytest.approx(0.0)


def test_restarts_fall_to_the_end_and_jump_back_in_every_cycle():
    config = schedule("cosine_restarts", n_restarts=4)  # cycles of 25 steps
    ends = [learning_rate(config, 10 + 25 * cycle) for cycle in (1, 2, 3, 4)]
    firsts = [learning_rate(config, 11 + 25 * cycle) for cycle in (1, 2, 3)]
    assert ends == pytest.approx([0.0] * 4, abs=1e-12)
    assert min(firsts) > 0.99


def test_no_warm_up_starts_at_the_top():
    assert learning_rate(schedule("cosine", n_warmup_steps=0), 1) > 0.99

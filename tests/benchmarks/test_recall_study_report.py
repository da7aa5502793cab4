"""From the recall study's records to verdicts: plateau, intervals, recovery, what the page says."""

import pytest

from benchmarks.recall_study import page
from benchmarks.recall_study.arms import Arm, parse_arm
from benchmarks.recall_study.runs import _plateau
from benchmarks.recall_study.settings import to_dict
from benchmarks.recall_study.statistics import estimate, paired
from benchmarks.recall_study.summary import family_results, recommended, recovered_at, verdicts
from tests.benchmarks.test_recall_study import micro


def point(step: int, recall: float, loss: float = 3.0) -> dict:
    return {"step": step, "recall": {"2": recall, "4": recall}, "text_loss": loss}


def test_the_plateau_is_learned_and_flat_or_out_of_steps():
    settings = micro(plateau_window=2, plateau_gain=0.01, plateau_learned=0.5, base_steps=20)
    flat = [point(5 * i, 0.6) for i in range(4)]
    assert _plateau(flat, settings) == {"reached": True, "step": 15, "gain": 0.0, "over_steps": 10}
    assert _plateau([point(5 * i, 0.1) for i in range(4)], settings) is None  # flat, but nothing learned yet
    assert _plateau([point(5 * i, 0.5 + 0.1 * i) for i in range(4)], settings) is None
    assert _plateau([*flat[:3], point(20, 0.9)], settings)["reached"] is False


def test_intervals_are_students_t():
    """t(2 degrees, 97.5 %) = 4.303; the standard error of 1, 2, 3 is 1 / sqrt(3)."""
    three = estimate([1.0, 2.0, 3.0])
    assert (three.mean, three.n) == (2.0, 3)
    assert three.half == pytest.approx(4.303 / 3**0.5)
    assert three.sign == 0
    assert estimate([5.0]).half is None
    assert paired({0: 2.0, 1: 3.1, 2: 4.0, 9: 0.0}, {0: 1.0, 1: 2.0, 2: 3.0}).sign == 1
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_recovery_is_from_the_step_that_lasts():
    curve = [point(0, 0, 9.0), point(5, 0, 3.0), point(10, 0, 3.2), point(20, 0, 3.02), point(30, 0, 2.9)]
    assert recovered_at(curve, 3.0) == 20
    assert recovered_at(curve[:3], 3.0) is None


def records_of(recalls: dict[str, list[float]], losses: dict[str, float]) -> list[dict]:
    records = [{"kind": "settings", "fingerprint": "f", "settings": to_dict(micro(first_seeds=2))}]
    for arm, values in recalls.items():
        for seed, value in enumerate(values):
            curve = [point(0, 0.1, 4.0), point(30, value, losses[arm] + 0.001 * seed)]
            records.append(
                {"kind": "arm", "fingerprint": "f", "family": "gla", "seed": seed, "arm": arm, "curve": curve}
            )
    return records


def test_verdicts_follow_the_paired_interval():
    recalls = {
        "LPT": [0.40, 0.50, 0.60],
        "extend": [0.50, 0.61, 0.70],
        "gla": [0.20, 0.30, 0.41],
        "merge": [0.3, 0.7, 0.5],
    }
    losses = {"LPT": 3.0, "extend": 3.0, "gla": 3.0, "merge": 3.0}
    result = family_results(records_of(recalls, losses))[0]
    assert verdicts(result) == {"above": ["extend"], "below": ["gla"], "open": ["merge"]}
    assert recommended(result) == "extend"
    # a gain that is paid for in text loss is none
    seeds = {"LPT": [0.1, 0.2], "extend": [0.3, 0.41]}
    assert recommended(family_results(records_of(seeds, {"LPT": 3.0, "extend": 3.0}))[0]) is not None
    assert recommended(family_results(records_of(recalls, {**losses, "extend": 3.4}))[0]) is None


def test_an_arm_has_a_name_that_says_all():
    assert Arm("mamba4", "published", 1).name == "mamba4:published/prop1"
    assert parse_arm("LPT").mode is None


def test_the_page_says_how_a_base_begins():
    assert page._own_lines(micro()) == []
    own = {"gla": {"first_gate_width": 8, "curriculum_steps": 9, "base_lr": 0.5}}
    lines = " ".join(page._own_lines(micro(own=own)))
    assert all(part in lines for part in ("8 times as wide", "over 9 steps", "base_lr 0.5"))
    assert page._few_keys(micro()) == ""
    assert "the first 4 times as many" in " ".join(page._few_keys(micro(keys_per_pair=4)).split())

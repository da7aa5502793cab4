"""The loss-curve benchmark at toy size on a CPU, and its judgement."""

import itertools
import json

import pytest
import torch

from benchmarks import loss_curve
from benchmarks.loss_curve_report import (
    RESEEDED,
    WINDOW,
    compare,
    difference,
    run_to_run_noise,
    smoothed,
    summary,
    within_noise,
)

TOY = {"steps": 3, "length": 32, "batch": 2, "hidden": 64, "workers": 1}
PLAIN = [5.0 - 0.01 * step for step in range(60)]


def shifted(by: float) -> list[float]:
    return [loss + by for loss in PLAIN]


def reseeded(fast: list[float], *shifts: float) -> dict[str, list[float]]:
    return {name: [loss + by for loss in fast] for name, by in zip(RESEEDED, shifts, strict=True)}


def test_smoothing_is_a_mean_over_a_window():
    assert smoothed(PLAIN)[0] == pytest.approx(sum(PLAIN[:WINDOW]) / WINDOW)
    assert len(smoothed(PLAIN)) == len(PLAIN) - WINDOW + 1
    assert smoothed([1.0, 3.0]) == [2.0]


def test_a_curve_that_stopped_early_is_compared_as_far_as_it_goes():
    gap = difference(shifted(0.5)[:30], PLAIN)
    assert gap["steps"] == 30
    assert gap["max"] == pytest.approx(0.5)


def test_within_noise_means_no_larger_than_reseeded_runs_differ():
    fast = shifted(0.001)
    curves = {"plain": PLAIN, "fast": fast, "moved": shifted(1e-5), **reseeded(fast, 0.02, 0.03, -0.04)}
    result = compare(curves)
    assert within_noise(result, "fast") is True
    assert within_noise(result, "fp8") is None
    assert run_to_run_noise(result["differences"])["mean"] == pytest.approx(0.03)
    text = summary("gla", result, curves, 200)
    assert "ok gla fast: within run-to-run noise" in text
    assert "only 60 of 200 steps" in text


@pytest.mark.parametrize("fast", [shifted(0.2), [*PLAIN[:40], *[float("nan")] * 20]])
def test_a_curve_outside_the_noise_fails(fast):
    curves = {"plain": PLAIN, "fast": fast, **reseeded(fast, 0.05, 0.05, 0.3)}
    result = compare(curves)
    assert within_noise(result, "fast") is False
    assert "FAIL gla fast: outside" in summary("gla", result, curves, 60)


def test_a_missing_run_is_a_failure_and_named():
    curves = {"plain": PLAIN, "fast": "RuntimeError: no kernel", **reseeded(PLAIN, 0.1, 0.1, 0.1)}
    result = compare(curves)
    assert within_noise(result, "fast") is False
    assert "FAIL gla fast: RuntimeError: no kernel" in summary("gla", result, curves, 60)


def test_noise_of_too_few_runs_is_no_noise():
    curves = {
        "plain": PLAIN,
        "fast": PLAIN,
        RESEEDED[0]: shifted(0.1),
        RESEEDED[1]: "RuntimeError: no memory",
    }
    assert within_noise(compare(curves), "fast") is False


def test_runs_share_weights_unless_they_say_otherwise():
    arguments = loss_curve.Arguments(**TOY)
    runs = {run.name: run for run in loss_curve.RUNS}
    weights = {
        name: torch.nn.utils.parameters_to_vector(loss_curve.make_model("gla", run, arguments).parameters())
        for name, run in runs.items()
    }
    assert torch.equal(weights["plain"], weights["fast"])
    change = (weights["moved"] - weights["plain"]).norm() / weights["plain"].norm()
    assert 0 < change < 1e-5
    different = ["plain", *RESEEDED]
    for left, right in itertools.combinations(different, 2):
        assert (weights[left] - weights[right]).norm() > 0.1 * weights["plain"].norm()


def test_one_layer_of_each_family_is_expanded():
    arguments = loss_curve.Arguments(**TOY)
    for family in ("gla", "mamba2"):
        model = loss_curve.make_model(family, loss_curve.RUNS[0], arguments)
        sizes = [block.token_mixer.state_elements() for block in model.blocks]
        assert sizes[0] > sizes[1] == sizes[2] == sizes[3]


def test_the_text_is_the_same_every_time():
    rows = loss_curve.read_rows(32, 6)
    assert rows.shape == (6, 32)
    assert torch.equal(rows, loss_curve.read_rows(32, 6))
    with pytest.raises(ValueError, match="fewer steps"):
        loss_curve.read_rows(10**7, 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes are for the CPU")
def test_a_toy_run_writes_curves_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STATEX_BACKEND", "auto")
    output = tmp_path / "curve.json"
    status = loss_curve.act(loss_curve.Arguments(**TOY, families="gla", output=str(output)))
    record = json.loads(output.read_text())
    losses = record["losses"]["gla"]
    assert {len(curve) for curve in losses.values()} == {3}
    # before the first step only rounding differs
    assert losses["fast"][0] == pytest.approx(losses["plain"][0], abs=0.05)
    assert losses["moved"][0] == pytest.approx(losses["plain"][0], abs=1e-4)
    assert output.with_suffix(".png").stat().st_size > 1000
    assert status in (0, 1)
    assert "largest" in capsys.readouterr().out

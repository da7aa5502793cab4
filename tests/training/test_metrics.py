"""Records survive crashes, and what is drawn and printed from them."""

import json
from dataclasses import replace

import pytest

from training.config import RunConfig
from training.heldout import position_edges
from training.metrics import MetricsLog, read_metrics, truncate_after
from training.plot import main as plot
from training.progress import Throughput, duration, short


def write(path, steps):
    path.write_text(
        "".join(json.dumps({"step": step, "tokens": step, "loss": 1.0 / step}) + "\n" for step in steps)
    )


def test_a_resumed_run_drops_what_lies_beyond_its_step_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    with path.open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    truncate_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    log = MetricsLog(replace(RunConfig(), report_to=()), tmp_path, 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_tensorboard_gets_every_record(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from accelerate.state import PartialState

    PartialState(cpu=True)
    log = MetricsLog(RunConfig(), tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "loss": float(step)})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]


def test_losses_are_drawn_on_demand(tmp_path, capsys):
    write(tmp_path / "metrics.jsonl", [1, 2, 3])
    assert plot([str(tmp_path), f"output={tmp_path / 'x.png'}"]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert plot([str(tmp_path / "nowhere")]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert plot([str(tmp_path), f"output={tmp_path / 'nowhere' / 'x.png'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_held_out_positions_double_up_to_the_length():
    assert position_edges(65536) == [0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert position_edges(64) == [0, 16, 32, 64]
    assert position_edges(8) == [0, 8]


def test_rates_leave_out_what_is_excluded(monkeypatch):
    now = iter([0.0, 10.0])
    monkeypatch.setattr("training.progress.time.perf_counter", lambda: next(now))
    throughput = Throughput(2, flops_per_token=6.0, peak=60.0, since=0.0)
    next(now)
    throughput.add(100, 1.0)
    throughput.exclude(5.0)
    rates = throughput.record(steps_left=3)
    assert rates["tokens_per_second"] == 20.0
    assert rates["tokens_per_second_per_gpu"] == 10.0
    assert rates["mfu"] == 1.0
    assert rates["eta_seconds"] == 15.0


def test_numbers_for_people():
    assert [short(value) for value in (950, 38780, 1.5e6)] == ["950", "38.78k", "1.50M"]
    assert [duration(value) for value in (59, 3725, 200_000)] == ["0m59s", "1h02m", "2d07h"]

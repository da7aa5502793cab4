"""The scaling benchmark: its arithmetic on recorded metrics, and whole on one and two CPU processes."""

import json
import sys
import time
from dataclasses import replace

import psutil
import pytest

from benchmarks import scaling
from benchmarks.scaling import Arguments, Benchmark, cases, main, run_all, run_command_line
from benchmarks.scaling_table import (
    Case,
    Row,
    baseline,
    check_distribution,
    check_position,
    check_records,
    disagreement,
    efficiency,
    loss_differences,
    lost_seconds,
    read_output,
    summary,
    table,
    telling_lines,
)
from data.quickstart import train_tokenizer

ONE = Case("gla_StateX", "zero1", 1, 6)
TWO = Case("gla_StateX", "zero1", 2, 6, saves=True)
ON_TWO = "DEEPSPEED, DeepSpeedEngine ZeRO-1, 2 process(es) through nccl, 2 x NVIDIA H100 80GB HBM3"
OUTPUT = f"""gla_StateX.sh: python3 -m accelerate.commands.launch train.py --launch=zero1
launch                zero1 on 2 GPU(s), bf16 compute
memory a GPU          about 66.3 GB, recompute=mlp
distribution          {ON_TWO}
recompute, measured on this GPU: full x2, mlp x22
starting at step 0
step 1/8 | loss 10.4123 | lr 1.500e-04
first step done 21.4 s after the start (imports 9.0, checks 0.4, first step 12.0)
saved output/runs/scaling/gla-1.3B/gla_StateX-zero1-2/ckpt_6 in 1m05s
"""


def row(case: Case, seconds: float, loss: float = 10.0, tokens: int = 131072) -> Row:
    """Six steps, the first two of them slow."""
    times = [30.0, 2 * seconds, seconds, seconds, 1.5 * seconds, seconds]
    records = [
        {"step": step, "loss": loss - step, "tokens": step * tokens, "step_seconds": time, "memory_gb": 70.0}
        for step, time in enumerate(times, start=1)
    ]
    return Row(case, records=records, wall_seconds=50.0)


def test_cases_begin_with_one_launch_kind_and_leave_one_gpu_out_of_the_others():
    found = [case.name for case in cases(Arguments(resume=True))]
    assert found == [
        "gla_StateX-zero1-1", "gla_StateX-zero1-2", "mamba2_LPT-zero1-1", "mamba2_LPT-zero1-2",
        "gla_StateX-zero1-2-resumed", "gla_StateX-zero2-2", "mamba2_LPT-zero2-2",
    ]  # fmt: skip
    one, two, *others = cases(Arguments(resume=True))
    assert (one.last_step, two.last_step, others[2].last_step) == (8, 6, 8)
    assert [case.name for case in (one, two, *others) if case.saves] == ["gla_StateX-zero1-2"]
    assert not any(case.saves or case.resumes for case in cases(Arguments()))


def test_what_a_run_prints_is_read():
    read = Row(TWO)
    read_output(read, OUTPUT)
    assert (read.distribution, read.levels) == (ON_TWO, "full x2, mlp x22")
    assert (read.first_step_seconds, read.save_seconds) == (21.4, 65.0)
    assert not read.problem
    assert check_distribution(read) == ""
    read_output(read, OUTPUT.replace("recompute, measured", "not measured"))
    assert read.levels == "mlp"


@pytest.mark.parametrize(
    ("launch", "n_gpus", "came_up", "good"),
    [
        ("zero1", 2, ON_TWO, True),
        ("zero2", 2, ON_TWO, False),  # another stage
        ("zero1", 4, ON_TWO, False),  # another number of processes
        ("zero1", 2, ON_TWO.replace("2 x", "1 x"), False),  # two processes on one GPU
        ("ddp", 2, ON_TWO, False),
        ("cpu", 1, "NO, GLAForCausalLM, 1 process(es) through no group, 1 x cpu", True),
        ("cpu", 2, "NO, GLAForCausalLM, 1 process(es) through no group, 1 x cpu", False),
        ("cpu", 2, "MULTI_CPU, DistributedDataParallel, 2 process(es) through gloo, 1 x cpu", True),
        ("ddp", 2, "MULTI_GPU, DistributedDataParallel, 2 process(es) through nccl, 2 x NVIDIA A40", True),
        ("ddp", 2, ON_TWO.replace("nccl", "cuda:nccl,cpu:gloo"), False),
        ("zero1", 2, ON_TWO.replace("nccl", "cuda:nccl,cpu:gloo"), True),
        ("ddp", 2, None, False),
    ],
)
def test_a_run_has_to_come_up_as_asked(launch, n_gpus, came_up, good):
    problem = check_distribution(Row(Case("gla_LPT", launch, n_gpus, 6), distribution=came_up))
    assert (problem == "") is good


def test_speed_is_that_of_steady_steps_and_efficiency_that_of_a_gpu():
    one, two = row(ONE, 2.2), row(TWO, 1.25)
    assert one.step_seconds == pytest.approx(2.2)
    assert one.tokens_per_second == pytest.approx(131072 / 2.2)
    assert efficiency(one, one) == 1.0
    assert efficiency(two, one) == pytest.approx(2.2 / 2 / 1.25)
    assert lost_seconds(two, one) == pytest.approx(0.15)


def test_losses_are_compared_step_by_step_with_a_closer_look_at_the_first():
    one, near = row(ONE, 2.2), row(TWO, 1.25, loss=10.0001)
    gaps = loss_differences(near, one)
    assert list(gaps) == [1, 2, 3, 4, 5, 6]
    assert gaps[6] == pytest.approx(0.0001 / 4)
    assert disagreement(gaps, 0.005) == ""
    first_off = loss_differences(row(TWO, 1.25, loss=10.002), one)
    assert "step 1" in disagreement(first_off, 0.005)
    later_off = {**gaps, 4: 0.006}
    assert "step 4" in disagreement(later_off, 0.005)
    near.records[2]["loss"] = None  # what metrics.jsonl holds for NaN
    assert "step 3" in disagreement(loss_differences(near, one), 0.005)


def test_missing_steps_and_slots_that_stand_elsewhere_are_noticed():
    assert check_records(row(ONE, 1.0), 1, 131072) == ""
    assert "expected" in check_records(row(ONE, 1.0), 1, 65536)
    assert "expected" in check_records(row(replace(ONE, last_step=8), 1.0), 1, 131072)
    state = {"data": {"positions": {"0": {"sequence": 6}, "1": {"sequence": 6}}}}
    assert check_position(state, 6, 2) == ""
    assert "[6, 6]" in check_position(state, 5, 2)
    assert check_position(state, 6, 4) != ""


def test_the_table_has_a_line_a_run_and_says_what_failed():
    failed = Row(
        replace(TWO, launch="zero2"), problem="exit status 1; its last lines:", tail=["CUDA error: x"]
    )
    rows = [row(ONE, 2.0), row(TWO, 1.25), failed]
    text = table(rows)
    assert "| gla_StateX-zero1-2 |  | 104,858 | 52,429 | 80.0% | 1.250 | 250 | 0.0e+00 |" in text
    assert "gla_StateX-zero2-2 (see below)" in text
    assert text.endswith("exit status 1; its last lines:\n    CUDA error: x")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert json.loads(json.dumps(summary(rows[1], rows)))["efficiency"] == pytest.approx(0.8)


def test_errors_are_found_above_the_launchers_own_page():
    page = ["=" * 60, "train.py FAILED", "Root Cause (first observed failure):", "exitcode: 1", "=" * 60]
    lines = [
        "step 1/8",
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory.",
        "ChildFailedError: x: y",
        *page,
    ]
    assert telling_lines("\n".join(lines)) == [lines[1], *page]


def test_a_run_out_of_time_is_ended_with_processes_in_sessions_of_their_own(tmp_path):
    child = (
        f"{sys.executable} -c 'import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)'"
    )
    command = ["bash", "-c", f'bash -c "{child} & wait" & wait']
    status, seconds = run_command_line(command, tmp_path / "log", limit=3)
    assert status is None
    assert seconds < 20
    pid = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert run_command_line(["bash", "-c", "exit 3"], tmp_path / "log", limit=20)[0] == 3


def benchmark(tmp_path, **given) -> Benchmark:
    made = Benchmark(Arguments(scale="tiny", launches="cpu", folder=str(tmp_path), **given), {})
    made.logs.mkdir()
    return made


def test_runs_that_no_longer_fit_are_not_started(tmp_path, monkeypatch):
    def slow(made: Benchmark, case: Case) -> Row:
        made.began -= 70  # as if that long had passed
        return Row(case, wall_seconds=70.0)

    monkeypatch.setattr(scaling, "run_case", slow)
    rows = run_all(benchmark(tmp_path, seconds=180.0))
    assert [bool(row.problem) for row in rows] == [False, False, True, True]
    assert "not started" in rows[-1].problem
    assert len(json.loads((tmp_path / "scaling.json").read_text())["rows"]) == 4


def test_a_run_out_of_memory_is_repeated_with_all_recomputed(tmp_path, monkeypatch):
    def full(made: Benchmark, case: Case) -> Row:
        seen.append((case.name, made.settings(case).get("recompute")))
        fits = case.n_gpus == 1 or "recompute" in made.extra
        return Row(case) if fits else Row(case, problem="exit status 1", out_of_memory=True)

    seen: list[tuple] = []
    monkeypatch.setattr(scaling, "run_case", full)
    rows = run_all(benchmark(tmp_path, scripts="gla_LPT"))
    assert seen == [("gla_LPT-cpu-1", None), ("gla_LPT-cpu-2", None), ("gla_LPT-cpu-2", "full")]
    assert [bool(row.problem) for row in rows] == [False, True, False]


def test_a_continuation_out_of_memory_is_repeated_from_the_same_checkpoint(tmp_path, monkeypatch):
    def full(made: Benchmark, case: Case) -> Row:
        folder = tmp_path / "runs" / "scaling" / "gla-tiny" / case.folder
        if case.resumes:
            found.append(folder.exists())
        folder.mkdir(parents=True, exist_ok=True)
        if case.resumes and "recompute" not in made.extra:
            return Row(case, problem="exit status 1", out_of_memory=True)
        return Row(case, checkpoint_bytes=1 if case.saves else None)

    found: list[bool] = []
    monkeypatch.setattr(scaling, "run_case", full)
    run_all(benchmark(tmp_path, scripts="gla_LPT", resume=True))
    assert found == [True, True]
    assert not list((tmp_path / "runs" / "scaling" / "gla-tiny").iterdir())


def test_a_repeated_run_is_measured_against_the_one_that_ended_well():
    failed, again, two = row(ONE, 9.0), row(ONE, 2.2), row(TWO, 1.25)
    failed.problem, failed.records = "exit status 1", failed.records[:2]
    assert baseline(two, [failed, again, two]) is again
    assert baseline(two, [failed, two]) is failed  # losses can be compared all the same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n_gpu=2"], "n_gpus"),
        (["scripts=gla"], "gla_StateX"),
        (["run_name=x"], "sets it itself"),
        (["steps=2"], "3 or more"),
        (["launches=zero9"], "zero9"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_one_and_two_processes_train_alike_and_two_go_on_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    texts = [f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 7) for i in range(400)]
    (tmp_path / "corpus").mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "corpus" / "part.jsonl").write_text("".join(lines))
    train_tokenizer(texts, 512).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["launches=cpu", "scale=tiny", "scripts=gla_StateX", "steps=3", "resume=true", "limit=200"]
    keys = {
        "data_path": tmp_path / "corpus",
        "tokenizer": tmp_path / "tokenizer",
        "folder": tmp_path / "bench",
    }
    began = time.monotonic()
    status = main([*words, "seconds=600", "max_len=64", *(f"{key}={value}" for key, value in keys.items())])
    text = capsys.readouterr().out
    assert status == 0, text
    record = json.loads((tmp_path / "bench" / "scaling.json").read_text())
    assert record["seconds"] <= time.monotonic() - began
    one, two, resumed = record["rows"]
    assert "1 process(es)" in one["distribution"]
    assert "MULTI_CPU, DistributedDataParallel, 2 process(es) through gloo" in two["distribution"]
    assert list(two["loss_differences"]) == ["1", "2", "3"]
    assert list(resumed["loss_differences"]) == ["4", "5"]
    # fp32, the same numbers summed in another order
    assert max({**two["loss_differences"], **resumed["loss_differences"]}.values()) < 1e-5
    assert two["checkpoint_bytes"] > 12 * 2e6  # weights and two moments of 2 M parameters
    assert "| gla_StateX-cpu-2-resumed | MULTI_CPU" in text
    assert not (tmp_path / "bench" / "runs").exists()

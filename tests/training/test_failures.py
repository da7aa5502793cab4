"""What can go wrong while training: full disks, losses that are not finite, a corpus that breaks."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from tests.training.conftest import run_arguments
from training.checkpoint import checkpoints, prune
from training.config import RunError, parse_arguments
from training.distribution import start_distribution
from training.loop import take
from training.manifest import problem_of
from training.optimizer import build_optimizer
from training.validate import main as validate


def run_folder(output: Path) -> Path:
    return output / "p" / "model" / "r"


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder(output) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """Runs inside this process leave no signal handlers, variables or accelerate state behind."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "false")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(world, tmp_path, capfd):
    arguments = [*run_arguments(world, tmp_path), "save_interval=2"]
    assert train.main([*arguments, "stop_at_step=2"]) == 0
    # no file may grow beyond 20 kB: the system refuses the write inside the next save, as a full disk would
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status = train.main([*arguments, "resume=auto"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capfd.readouterr().err
    assert status == 1
    assert "ckpt_4 could not be written" in said
    assert "the last checkpoint, ckpt_2, is untouched" in said
    assert [path.name for path in checkpoints(run_folder(tmp_path))] == ["ckpt_2"]
    assert problem_of(run_folder(tmp_path) / "ckpt_2") is None
    assert not list(run_folder(tmp_path).glob("*.tmp"))


def test_a_disk_with_too_little_room_is_seen_before_anything_is_written(world, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("training.checkpoint.shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert train.main(run_arguments(world, tmp_path)) == 1
    said = capfd.readouterr().err
    assert "GB are needed" in said
    assert "there is no earlier checkpoint" in said
    assert checkpoints(run_folder(tmp_path)) == []


@pytest.mark.parametrize(
    ("step", "status", "order"), [(3, 75, ["save", "validate"]), (8, 0, ["save", "validate"])]
)
def test_a_signal_saves_before_it_validates(world, tmp_path, monkeypatch, step, status, order):
    """Who sent it may not wait; a run that has done its last step needs no requeue."""
    import training.loop

    done = []
    original = training.loop.run_step

    def run_step(run, *rest):
        if run.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, *rest)

    for name in ("save", "validate"):
        monkeypatch.setattr(f"training.loop.{name}", lambda run, name=name: done.append(name))
    monkeypatch.setattr("training.loop.run_step", run_step)
    held_out = [f"validation_data_path={world / 'corpus'}", f"val_interval={step}", "save_interval=100"]
    assert train.main([*run_arguments(world, tmp_path), *held_out]) == status
    assert done == order


def test_held_out_text_shorter_than_a_sequence_is_measured_as_far_as_it_goes(world, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "abcdefg"}\n')
    held_out = [f"validation_data_path={tmp_path / 'short.jsonl'}", "max_len=64", "stop_at_step=1"]
    assert train.main([*run_arguments(world, tmp_path), *held_out]) == 0
    by_position = records(tmp_path)[-1]["val_loss_by_position"]
    assert by_position["0-15"] > 0
    assert by_position["32-63"] is None


def test_the_last_step_is_recorded_whatever_the_interval(world, tmp_path):
    assert train.main([*run_arguments(world, tmp_path), "log_interval=5"]) == 0
    assert [row["step"] for row in records(tmp_path)] == [1, 5, 8]


def test_a_trial_run_leaves_its_records_and_no_checkpoint(world, tmp_path, capfd):
    assert train.main([*run_arguments(world, tmp_path), "save_last=false", "save_interval=5"]) == 0
    saved = sorted(path.name for path in (tmp_path / "p" / "model" / "r").glob("ckpt_*"))
    assert (saved, records(tmp_path)[-1]["step"]) == (["ckpt_5"], 8)
    assert "every 5 steps, 1 kept" in capfd.readouterr().out  # the plan counts alike


def test_a_corpus_that_cannot_be_read_any_more_ends_the_run_in_one_line():
    def batches():
        yield {}
        raise FileNotFoundError(2, "No such file or directory", "a.jsonl")

    with pytest.raises(RunError, match=r"data_path: .*No such file or directory: 'a\.jsonl'"):
        take(batches(), 2)


def test_a_worker_that_died_ends_the_run_in_one_line_and_other_errors_keep_their_traceback():
    def batches(message):
        yield {}
        raise RuntimeError(message)

    with pytest.raises(RunError, match=r"DataLoader worker \(pid 7\) is killed.*num_workers.*resume=auto"):
        take(batches("DataLoader worker (pid 7) is killed by signal: Killed. "), 2)
    with pytest.raises(RuntimeError, match="out of range"):
        take(batches("index out of range"), 2)


def test_a_damaged_newer_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    for step in (4, 5, 6):
        (tmp_path / f"ckpt_{step}").mkdir()
    prune(tmp_path, step=5, keep_last=1, keep_every=0)  # went on from 4, since 6 was refused
    assert [path.name for path in checkpoints(tmp_path)] == ["ckpt_6", "ckpt_5"]


def test_what_a_continuation_changes_is_said_or_refused_before_it_writes(world, tmp_path, capfd):
    arguments = run_arguments(world, tmp_path)
    assert train.main([*arguments, "stop_at_step=2"]) == 0
    assert validate([*arguments, "resume=auto", "tokens_per_step=256"]) == 2
    assert "n_slots 4, this run 8" in capfd.readouterr().err
    assert train.main([*arguments, "resume=auto", "lr=0.5"]) == 0
    assert "changed since this run was last started: lr 0.01 -> 0.5, stop_at_step 2 -> None" in (
        capfd.readouterr().out
    )


def break_steps(monkeypatch, steps: set[int], gradient_only: bool = False) -> None:
    """Make the loss, or only its gradient, NaN in some steps."""
    import training.loop

    original = training.loop.forward_loss

    def forward(run, batch):
        loss = original(run, batch)
        if run.progress.step + 1 not in steps:
            return loss
        return Poison.apply(loss) if gradient_only else loss * torch.nan

    monkeypatch.setattr("training.loop.forward_loss", forward)


class Poison(torch.autograd.Function):
    """The identity, with a NaN gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(world, tmp_path, monkeypatch, capfd, gradient_only):
    break_steps(monkeypatch, {3}, gradient_only)
    assert train.main([*run_arguments(world, tmp_path), "state_passing=true"]) == 0
    rows = records(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert rows[2]["grad_norm"] is None
    assert all(row["grad_norm"] is not None for row in rows[3:])
    said = capfd.readouterr().out
    assert "step 3: loss" in said
    assert "'file': 'a'" in said
    state = json.loads((run_folder(tmp_path) / "ckpt_8" / "state" / "trainer.json").read_text())
    assert state["progress"]["updates"] == 7


def test_too_many_steps_in_a_row_end_the_run_with_step_and_batch(world, tmp_path, monkeypatch, capfd):
    break_steps(monkeypatch, {2, 4, 5, 6})
    assert train.main([*run_arguments(world, tmp_path), "max_nonfinite_steps=3"]) == 1
    said = capfd.readouterr().err
    assert "step 6" in said
    assert "3 in a row" in said
    assert "rank 0: [{'epoch'" in said


def test_parameters_stay_fp32_under_bf16_compute(world, tmp_path, monkeypatch):
    import training.loop

    seen = {}
    original = training.loop.forward_loss

    def forward(run, batch):
        seen.update({name: parameter.dtype for name, parameter in run.model.named_parameters()})
        seen["compute"] = torch.get_autocast_dtype("cpu")
        return original(run, batch)

    monkeypatch.setattr("training.loop.forward_loss", forward)
    assert train.main([*run_arguments(world, tmp_path), "dtype=bf16", "stop_at_step=2"]) == 0
    assert seen.pop("compute") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}


def test_vectors_do_not_decay(world, tmp_path):
    from models import build_model

    for shape in ("gla-tiny", "mamba2-tiny"):
        model = build_model(f"configs/models/{shape}.json", device="meta")
        config = parse_arguments([f"model_name={shape}"])
        groups = build_optimizer(model, config).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        still = {names[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
        assert all("norm" in n or n.endswith(("bias", "A_log", "dt_bias", ".D")) for n in still)
        assert {
            n for n in names.values() if n.endswith(("norm.weight", "A_log", "dt_bias", ".D", "bias"))
        } <= still


def test_a_process_count_that_did_not_come_up_is_refused():
    config = parse_arguments(["launch=cpu", "n_gpus=2", "tokens_per_step=131072"])
    with pytest.raises(ValueError, match=r"n_gpus=2: 1 process"):
        start_distribution(config)

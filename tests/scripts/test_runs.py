"""Runs through the scripts: what is written, signals, several processes, several launchers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.conftest import REPOSITORY, environment, script

SCRIPTS = ("gla_StateX", "gla_LPT", "mamba2_StateX", "mamba2_LPT")


def run_folder(tiny: list[str], model: str, name: str) -> Path:
    output = next(argument.partition("=")[2] for argument in tiny if argument.startswith("output_dir="))
    return Path(output) / "statex" / model / name


@pytest.mark.parametrize("name", SCRIPTS)
def test_plan_needs_no_weights_and_no_gpu(name, tmp_path):
    answer = script(name, "plan=true", "init_from=scratch", f"output_dir={tmp_path / 'output'}")
    assert answer.returncode == 0, answer.stderr
    assert "state elements" in answer.stdout
    assert not (tmp_path / "output").exists()


def test_variables_and_arguments_reach_the_run(tiny):
    answer = script("gla_StateX", *tiny, "run_name=once", "--n-train-steps=2", "lr=0.002")
    assert answer.returncode == 0, answer.stderr
    assert "gla_StateX.sh: " in answer.stdout
    assert "--lr=0.002" in answer.stdout
    folder = run_folder(tiny, "gla-tiny", "once")
    resolved = json.loads((folder / "args.json").read_text())
    assert (resolved["n_train_steps"], resolved["lr"], resolved["drop_mode"]) == (2, 0.002, "gla")
    assert (folder / "ckpt_2" / "model.safetensors").is_file()
    # the same command again changes nothing and says what to do
    again = script("gla_StateX", *tiny, "run_name=once", "n_train_steps=2", "lr=0.002")
    assert again.returncode == 2
    assert "resume=auto" in again.stderr


def start(name: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", f"scripts/{name}.sh", *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(folder: Path, process: subprocess.Popen, steps: int = 2) -> None:
    """Until the run has recorded some steps."""
    records = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (records.is_file() and records.read_text().count("\n") >= steps):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step within four minutes"
        time.sleep(0.2)


@pytest.mark.parametrize(("signal_number", "processes"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_signal_to_the_script_reaches_the_ranks(tiny, signal_number, processes):
    # processes are found by what ps shows of them, which a name must not upset
    arguments = [*tiny, "run_name=accelerate", "n_train_steps=5000", f"n_gpus={processes}", "batch_size=2"]
    process = start("gla_LPT", *arguments)
    folder = run_folder(tiny, "gla-tiny", "accelerate")
    wait_for_steps(folder, process)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert f"on {processes} process(s)" in output
    saved = [path for path in folder.glob("ckpt_*") if (path / "model.safetensors").is_file()]
    assert len(saved) == 1

    step = int(saved[0].name.partition("_")[2])
    on = script("gla_LPT", *arguments, "resume=auto", f"stop_at_step={step + 1}")
    assert on.returncode == 0, on.stderr
    assert (folder / f"ckpt_{step + 1}" / "model.safetensors").is_file()


FAKE_LAUNCH = """
. scripts/common.sh
# what ps shows of a launcher and its rank; the rank's child is a loader's worker, which is not signalled
bash -c 'bash -c "sleep 60 & wait" python train.py --run_name=accelerate & echo $! && wait' \\
    python -m accelerate.commands.launch train.py --run_name=accelerate &
LAUNCHER=$!
sleep 1
training_processes
pkill -P "$(pgrep -P $LAUNCHER)"
"""


@pytest.mark.parametrize("columns", ["40", "400"])
def test_ranks_are_told_from_their_launcher_by_its_module_not_by_a_name_in_their_arguments(columns):
    command = ["bash", "-c", FAKE_LAUNCH]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=environment(COLUMNS=columns), capture_output=True, text=True, timeout=60
    )
    rank, *found = answer.stdout.split()
    assert found == [rank], answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("launch", "processes", "launched"),
    [("cpu", 1, False), ("zero1", 1, False), ("ddp", 1, True), ("cpu", 2, True), ("zero1", 2, True)],
)
def test_one_process_is_started_without_a_launcher_and_checks_its_arguments_itself(
    launch, processes, launched
):
    stub = "ARGUMENTS=(); check_settings; build_command; echo ${COMMAND[@]}"
    settings = f"PYTHON=echo launch={launch} n_gpus={processes}"
    command = ["bash", "-c", f". scripts/common.sh; {settings}; {stub}"]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60
    )
    *checks, last = answer.stdout.splitlines()
    assert checks == (["train.py --validate_only=true"] if launched else []), answer.stderr
    assert ("accelerate.commands.launch" in last) == launched
    assert last.endswith("train.py")


FAKE_SRUN = """#!/usr/bin/env bash
# stands for srun: one task a node, here two on this machine
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@"; first=$?
wait "$other"; second=$?
[ "$first" -ge "$second" ] && exit "$first"
exit "$second"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1" in show) echo 127.0.0.1; echo 127.0.0.1 ;; *) echo "scontrol $*" ;; esac
"""


def test_two_launchers_train_one_run(tiny, tmp_path):
    """The SLURM example on loopback: two nodes with one process each, joined through gloo."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = script(
        "slurm_example",
        *("gla_LPT.sh", *tiny, "run_name=nodes", "n_train_steps=3", "batch_size=2", f"main_port={port}"),
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        SLURM_NNODES="2",
        SLURM_JOB_ID="1",
        SLURM_JOB_NODELIST="here",
        SLURM_GPUS_ON_NODE="1",
        SLURM_SUBMIT_DIR=str(REPOSITORY),
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "on 2 process(s)" in answer.stdout
    folder = run_folder(tiny, "gla-tiny", "nodes")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "tokens_per_second_per_gpu" in record]
    assert len(steps) == 3
    for record in steps:
        ratio = record["tokens_per_second"] / record["tokens_per_second_per_gpu"]
        assert ratio == pytest.approx(2, rel=1e-2)


def test_setup_is_idempotent_and_refuses_what_it_cannot_do(tmp_path):
    """On the packages that this interpreter has, without a network."""
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-kernels.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "setup.sh", tmp_path / "scripts")

    def setup(*arguments: str) -> subprocess.CompletedProcess:
        command = ["bash", "scripts/setup.sh", *arguments]
        settings = environment(PIP_NO_INDEX="1")
        return subprocess.run(
            command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=240
        )

    first = setup("system=true", f"python={environment()['STATEX_PYTHON']}")
    assert first.returncode == 0, first.stderr
    began = time.monotonic()
    assert setup().stdout == "setup: .venv is ready\n"
    assert time.monotonic() - began < 20
    assert setup("gpu=true").returncode == 2
    kernels = setup("kernels=true")
    if kernels.returncode != 0:
        assert kernels.returncode == 2
        assert "kernels=true" in kernels.stderr

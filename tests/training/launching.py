"""Tiny real runs for the tests: train.py in processes of its own, which can be told to die at some point.

Processes come from a fork server that has imported train.py already, so that a run takes about a second.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from training.config import REPOSITORY

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train", "tests.training.launching"])
SECONDS = 120  # no run of a test takes longer
GRACE_SECONDS = 30


def launch(
    arguments: Sequence[str],
    world_size: int = 1,
    dies: tuple[str, int] | None = None,
    send: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
    log: Path = Path(os.devnull),
) -> list[int]:
    """Run train.py on `world_size` processes; answers their exit statuses, negative for a signal.

    Args:
        dies: (where, when): SIGKILL on rank 0, see `_arm`. Others are then killed too, as a launcher does.
        send: (signal name, step): what the last rank sends itself at the beginning of a step.
        log: where rank 0's output goes.
    """
    port = _free_port()
    processes = []
    for rank in range(world_size):
        variables = {"OMP_NUM_THREADS": "1", **(environment or {})}
        if world_size > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            variables |= {
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        points = [("kill", *dies)] if dies and rank == 0 else []
        points += [(send[0], "step", send[1])] if send and rank == world_size - 1 else []
        output = log if rank == 0 else Path(os.devnull)
        process = _CONTEXT.Process(target=_rank, args=(list(arguments), variables, points, output))
        process.start()
        processes.append(process)
    return _wait(processes)


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, to the last bit."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _wait(processes: list) -> list[int]:
    deadline = time.monotonic() + SECONDS
    leaving = False
    while any(process.is_alive() for process in processes):
        dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        if dead and not leaving:
            # after a failure or a signal the others end by themselves; on a busy machine that takes a while
            leaving, deadline = True, time.monotonic() + (0 if -signal.SIGKILL in dead else GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _rank(
    arguments: list[str], variables: dict[str, str], points: list[tuple[str, str, int]], log: Path
) -> None:
    os.chdir(REPOSITORY)
    os.environ.update(variables)
    stream = log.open("a")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    import train

    for point in points:
        _arm(*point)
    sys.exit(train.main(arguments))


def _arm(action: str, where: str, when: int) -> None:
    """Send this process a signal at a point of the run.

    where `step`: at the beginning of step `when`. `weights`, `manifest`, `rename`: in the save of that step,
    with only the weights written, with all but the manifest, with all but the last rename. `prune`: after it.
    """
    import training.checkpoint
    import training.loop
    import training.state

    number = signal.SIGKILL if action == "kill" else signal.Signals[action]

    def before(module, name: str, is_time) -> None:
        original = getattr(module, name)

        def armed(*args, **kwargs):
            if is_time(*args):
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(module, name, armed)

    saving = f"ckpt_{when}.tmp"
    if where == "step":
        before(training.loop, "run_step", lambda run, *rest: run.progress.step + 1 == when)
    elif where == "weights":
        before(training.state, "save_optimizer_state", lambda _, folder, *rest: folder.parent.name == saving)
    elif where == "manifest":
        before(training.checkpoint, "write_manifest", lambda folder: folder.name == saving)
    elif where == "rename":
        before(training.checkpoint.os, "rename", lambda source, _: Path(source).name == saving)
    else:
        before(training.state, "prune", lambda run_dir, *rest: (run_dir / f"ckpt_{when}").exists())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Find the fastest settings of this repository's SSD kernels on a GPU, and keep them.

    python -m benchmarks.tune_ssd    # Mamba2-1.3B's state sizes, writes configs/kernels/<gpu>/ssd.json
    python -m benchmarks.tune_ssd states=128 out=DIR workers=8 seconds=60

Like benchmarks/tune_kernels.py, which does it for GLA: candidates are compiled by several processes, timed at
65,536 tokens, and a winner is written as soon as it is known. What does not fit a multiprocessor, or computes
something else than the settings in use, is skipped and says so.
"""

import sys
import time
from functools import cache
from pathlib import Path

import torch

from benchmarks.gpu_time_ssd import TOKENS, Pieces, milliseconds
from benchmarks.tune_kernels import (
    Jobs,
    Trial,
    compiled,
    default_workers,
    processes,
    time_equals,
    winner,
    write,
)
from models.ops.kernel_configs import FOLDER

CHUNK = 256
# what is laid over the settings in use
CANDIDATES = {
    "outputs": [
        {"maxnreg": 128}, {"maxnreg": 112}, {"maxnreg": 96}, {"maxnreg": 80}, {"num_stages": 3},
        {"BLOCK_K": 32, "num_stages": 3},
    ],
    "score_gradients": [
        {"STAGES": 2}, {"STAGES": 4}, {"maxnreg": 168}, {"num_warps": 8, "maxnreg": 128},
    ],
    "key_gradients": [
        {"STAGES": 2, "num_stages": 2}, {"STAGES": 4}, {"STAGES": 5}, {"STAGES": 4, "num_stages": 4},
        {"ROWS": 128, "num_warps": 8}, {"ROWS": 128, "num_warps": 8, "STAGES": 4},
        {"BLOCK_N": 64, "STAGES": 4},
    ],
    "march": [
        {"STAGES": 2}, {"STAGES": 3}, {"STAGES": 5}, {"num_warps": 8}, {"BLOCK_K": 32, "STAGES": 5},
        {"BLOCK_N": 256, "STAGES": 3}, {"BLOCK_N": 256, "STAGES": 4},
        {"BLOCK_N": 256, "STAGES": 4, "num_warps": 8},
    ],
    "march_back": [
        {"STAGES": 2}, {"STAGES": 3}, {"num_warps": 8}, {"BLOCK_K": 32, "STAGES": 6},
        {"BLOCK_N": 256, "STAGES": 3}, {"BLOCK_N": 256, "STAGES": 4, "num_warps": 8},
    ],
    "states": [{"num_stages": 2}, {"num_stages": 4}, {"HEADS": 2, "num_warps": 8}, {"BLOCK_N": 64}],
}  # fmt: skip


@cache
def pieces(state_size: int, tokens: int) -> Pieces:
    """Inputs and launches; a process that compiles makes them once."""
    return Pieces(state_size, CHUNK, tokens)


def candidates(kernel: str, used: dict, state_size: int) -> list[dict]:
    """Settings to try for a kernel: those in use first."""
    found = [used]
    for changes in CANDIDATES[kernel]:
        one = used | changes
        if one not in found and one.get("BLOCK_N", 0) <= state_size:
            found.append(one)
    return found


def run(state_size: int, kernel: str, settings: dict, tokens: int) -> list[torch.Tensor]:
    """The kernel's results with these settings."""
    made = pieces(state_size, tokens)
    made.shape.config[kernel] = dict(settings)
    results = [launch().clone() for launch in made.launches()[kernel]]
    torch.cuda.synchronize()
    return results


def compile_one(state_size: int, kernel: str, settings: dict) -> str | None:
    """Run a kernel once on a few tokens; says what went wrong."""
    try:
        run(state_size, kernel, settings, 4 * CHUNK)
    except Exception as error:
        return f"{kernel} {settings} at N={state_size}: {str(error).splitlines()[0][:160]}"
    return None


def tune(state_sizes: list[int], directory: Path, deadline: float, workers: int) -> None:
    """Time every candidate until `deadline` (time.time()), writing each kernel's winner at each state."""
    with processes(workers) as pool:
        jobs: dict[tuple[int, str], Jobs] = {}
        for size in state_sizes:
            config = pieces(size, TOKENS).shape.config
            for kernel in pieces(size, TOKENS).launches():
                found = candidates(kernel, dict(config[kernel]), size)
                jobs[size, kernel] = [(one, pool.submit(compile_one, size, kernel, one)) for one in found]
        for (size, kernel), submitted in jobs.items():
            ready = compiled(kernel, f"N={size}", submitted, deadline)
            if time.time() > deadline:
                print("out of time: the remaining candidates are left out")
                break
            used = submitted[0][0]
            best = fastest(size, kernel, ready, deadline) if used in ready else None
            pieces(size, TOKENS).shape.config[kernel] = dict(best or used)
            if best:
                key = f"P{pieces(size, TOKENS).shape.head_dim}-N{size}-16bit"
                print("wrote", write(key, kernel, best, directory, "ssd.json"), flush=True)


def fastest(state_size: int, kernel: str, ready: list[dict], deadline: float) -> dict | None:
    """The best of the candidates that compute the same as the first, in use; None where that is the best."""

    def try_one(settings: dict) -> Trial:
        launches = pieces(state_size, TOKENS).launches()[kernel]
        return [run(state_size, kernel, settings, TOKENS)], lambda: sum(
            milliseconds(one, 9) for one in launches
        )

    times = time_equals(kernel, ready, try_one, deadline)
    print(f"{kernel}, N = {state_size}")
    for taken, settings in sorted(times, key=lambda one: one[0]):
        print(f"  {taken:7.3f} ms  {settings}{'  (in use)' if settings == ready[0] else ''}", flush=True)
    return winner(times)


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    tune(
        [int(size) for size in given.get("states", "128,512").split(",")],
        Path(given.get("out", FOLDER)),
        time.time() + float(given.get("seconds", "inf")),
        int(given.get("workers", default_workers())),
    )


if __name__ == "__main__":
    main(sys.argv[1:])

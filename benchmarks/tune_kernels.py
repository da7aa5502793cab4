"""Find the fastest tile sizes, warps and stages of this repository's GLA kernels on a GPU, and keep them.

    python -m benchmarks.tune_kernels    # both shapes of GLA-1.3B, writes configs/kernels/<gpu>/gla.json
    python -m benchmarks.tune_kernels shapes=4x256x512 out=DIR tokens=32768 workers=8

Candidates are compiled by several processes first (into Triton's cache), then each is timed alone. What does
not fit a multiprocessor is skipped, and says so.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path

import torch

from benchmarks.operators_gla import SHAPES, kernel_calls, kernel_work, time_call
from models.ops.kernel_configs import folder, gpu_name

Shape = tuple[int, int, int]

# one row a candidate, in the order of FIELDS
FIELDS = {
    "prepare": ("BK", "num_warps", "num_stages"),
    "scores": ("BM", "BK", "num_warps", "num_stages"),
    "march": ("BK", "BV", "BT", "num_warps", "num_stages"),
    "mix": ("BM", "BK", "BV", "BN", "num_warps", "num_stages"),
    "grad": ("BM", "BK", "BV", "num_warps", "num_stages"),
    "dscores": ("BM", "BV", "num_warps", "num_stages"),
    "intra_backward": ("BM", "BK", "num_warps", "num_stages", "maxnreg"),
}
CANDIDATES = {
    "prepare": [(64, 4, 2), (32, 4, 2), (32, 2, 2), (64, 8, 2), (32, 4, 3)],
    "scores": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3)],
    "march": [
        (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 128, 4, 3),
        (64, 64, 128, 4, 4), (64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 128, 4, 2),
    ],
    "mix": [
        (128, 64, 256, 64, 8, 3), (128, 64, 256, 64, 8, 4), (128, 64, 128, 64, 8, 4),
        (128, 64, 128, 64, 4, 3), (128, 64, 128, 64, 8, 3), (128, 32, 256, 64, 8, 4),
    ],
    "grad": [
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 4), (64, 128, 64, 4, 2),
    ],
    "dscores": [(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3)],
    "intra_backward": [
        (128, 32, 8, 1, None), (128, 32, 8, 1, 128), (64, 32, 4, 1, None), (64, 32, 4, 1, 168),
        (64, 16, 4, 1, None), (64, 32, 8, 1, None), (128, 16, 8, 1, None),
    ],
}  # fmt: skip


def candidates(kernel: str, shape: Shape, base: dict) -> list[dict]:
    """Settings to try for a kernel: those whose tiles fit into a chunk and into the state."""
    _, K, V = shape
    limits = {"BM": base["chunk"]["size"], "BT": base["chunk"]["size"], "BK": K, "BV": V}
    named = [dict(zip(FIELDS[kernel], values)) for values in CANDIDATES[kernel]]
    return [one for one in named if all(one.get(name, 0) <= limit for name, limit in limits.items())]


def with_settings(base: dict, kernel: str, settings: dict) -> dict:
    changed = deepcopy(base)
    changed[kernel].update(settings)
    return changed


def tune_shape(shape: Shape, tokens: int, base: dict, deadline: float = float("inf")) -> dict[str, dict]:
    """The fastest settings of every kernel at a shape; prints every candidate's time."""
    best = deepcopy(base)
    for kernel in FIELDS:
        times = []
        for settings in candidates(kernel, shape, base):
            if time.time() > deadline:
                print("out of time: the remaining candidates are left out")
                return best
            milliseconds = _time(shape, tokens, with_settings(base, kernel, settings), kernel)
            times.append((milliseconds, settings))
        times = sorted((one for one in times if one[0] is not None), key=lambda one: one[0])
        if times:
            best[kernel].update(times[0][1])
        _print_times(kernel, shape, tokens, base, times)
    return best


def _time(shape: Shape, tokens: int, settings: dict, kernel: str) -> float | None:
    try:
        calls = kernel_calls(tokens, *shape, settings)
        return sum(time_call(calls[name], repeats=5) for name in calls if name.split()[0] == kernel)
    except Exception as error:
        print(f"  {kernel} {settings[kernel]}: {type(error).__name__} {str(error).splitlines()[0][:120]}")
        return None


def _print_times(kernel: str, shape: Shape, tokens: int, base: dict, times: list) -> None:
    tflop, gigabytes = kernel_work(kernel, tokens, *shape, base["chunk"]["size"])
    launches = 2 if kernel in ("march", "mix") else 1
    for milliseconds, settings in times:
        rate, bandwidth = launches * tflop / milliseconds * 1e3, launches * gigabytes / milliseconds * 1e3
        print(f"  {kernel:<15} {milliseconds:7.3f} ms {rate:6.0f} TFLOP/s {bandwidth:6.0f} GB/s  {settings}")


def compile_ahead(work: list[tuple[Shape, dict, str]], workers: int) -> None:
    """Fill Triton's cache with every candidate: (shape, settings, kernel) each, in parallel processes."""
    context = multiprocessing.get_context("spawn")
    begin = time.time()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(compile_one, *one) for one in work]
        problems = [job.result() for job in as_completed(jobs)]
    for problem in filter(None, problems):
        print(f"  does not run: {problem}")
    print(f"compiled {len(work)} candidates in {time.time() - begin:.0f} s with {workers} processes")


def compile_one(shape: Shape, settings: dict, kernel: str) -> str | None:
    try:
        calls = kernel_calls(2 * settings["chunk"]["size"], *shape, settings, real=False)
        for name in calls:
            if name.split()[0] == kernel:
                calls[name]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{kernel} {settings[kernel]} at {shape}: {str(error).splitlines()[0][:160]}"
    return None


def base_settings(shape: Shape) -> dict:
    from models.ops.gla_triton import settings_for

    H, K, V = shape
    q = torch.empty(1, 1, H, K, device="cuda", dtype=torch.bfloat16)
    return deepcopy(settings_for(q, q.new_empty(1, 1, H, V)))


def write(found: dict[str, dict], directory: Path) -> Path:
    """Lay what was found over what the file already holds."""
    path = directory / gpu_name(torch.device("cuda")) / "gla.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **found}, indent=2) + "\n")
    return path


def shape_key(shape: Shape) -> str:
    H, K, V = shape
    return f"K{K}-V{V}-H{H}-16bit"


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    tokens, workers = int(given.get("tokens", 65536)), int(given.get("workers", min(12, os.cpu_count() or 1)))
    wanted = given.get("shapes")
    shapes = list(SHAPES.values())
    if wanted:
        shapes = [tuple(int(n) for n in text.split("x")) for text in wanted.split(",")]
    bases = {shape: base_settings(shape) for shape in shapes}
    compile_ahead(all_candidates(bases), workers)
    found = {}
    for shape, base in bases.items():
        print(f"H, K, V = {shape}, {tokens} tokens, chunks of {base['chunk']['size']}")
        found[shape_key(shape)] = tune_shape(shape, tokens, base)
    print("wrote", write(found, Path(given.get("out", folder()))))


def other_chunks(base: dict) -> list[dict]:
    """The same settings at the other chunk sizes: fewer states, but more within a chunk, or the reverse."""
    sizes = (size for size in (128, 256) if size != base["chunk"]["size"])
    return [with_settings(base, "chunk", {"size": size}) for size in sizes]


def all_candidates(bases: dict[Shape, dict]) -> list[tuple[Shape, dict, str]]:
    return [
        (shape, with_settings(base, kernel, settings), kernel)
        for shape, base in bases.items()
        for kernel in FIELDS
        for settings in candidates(kernel, shape, base)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])

"""Find the fastest tile sizes, warps and stages of this repository's GLA kernels on a GPU, and keep them.

    python -m benchmarks.tune_kernels    # both shapes of GLA-1.3B, writes configs/kernels/<gpu>/gla.json
    python -m benchmarks.tune_kernels shapes=4x256x512 out=DIR tokens=32768 workers=8 seconds=60
    python -m benchmarks.tune_ssd        # Mamba2's

Candidates are compiled by several processes (into Triton's cache) while those that are ready are timed, the
kernels with most to gain first. A winner is written as soon as it is known. What does not fit a
multiprocessor, or computes something else than the settings in use, is skipped and says so.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.operators_gla import SHAPES, kernel_calls, kernel_work, measure_kernels, time_call
from models.ops.kernel_configs import FOLDER, folder, gpu_name

Shape = tuple[int, int, int]
Jobs = list[tuple[dict, Future]]  # settings of one kernel, and their compilation
Trial = tuple[list[list[Tensor]], Callable[[], float]]  # what a kernel computes; its milliseconds when asked

# kernels in the order in which they are tuned, and the settings of each; one row a candidate in this order
FIELDS = {
    "intra_backward": ("BM", "BK", "num_warps", "num_stages", "maxnreg"),
    "prepare": ("BK", "num_warps", "num_stages"),
    "scores": ("BM", "BK", "num_warps", "num_stages"),
    "grad": ("BM", "BK", "BV", "num_warps", "STAGES", "BLOCKS"),
    "mix": ("BM", "BK", "BV", "BN", "num_warps", "num_stages"),
    "march": ("BK", "BV", "BT", "num_warps", "STAGES", "BLOCKS"),
    "dscores": ("BM", "BV", "num_warps", "num_stages"),
}
CANDIDATES = {
    "intra_backward": [
        (128, 32, 8, 1, 128), (128, 32, 16, 1, None), (64, 32, 8, 1, 128), (128, 16, 8, 1, None),
        (128, 32, 8, 1, None), (128, 16, 8, 1, 80), (64, 32, 4, 1, None), (64, 32, 8, 1, None),
        (128, 64, 16, 1, None), (64, 16, 4, 1, None), (64, 64, 8, 1, None),
    ],
    "prepare": [(32, 8, 2), (16, 4, 2), (64, 8, 2), (64, 4, 2), (32, 4, 2), (32, 2, 2)],
    "scores": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    "grad": [
        (128, 128, 64, 8, 3, True), (128, 128, 64, 8, 3, False), (128, 128, 64, 8, 2, False),
        (128, 128, 32, 8, 4, True), (128, 64, 64, 4, 3, False), (128, 64, 64, 8, 4, False),
        (64, 128, 64, 4, 2, False),
    ],
    "mix": [
        (128, 64, 256, 64, 8, 3), (128, 64, 256, 64, 8, 4), (128, 64, 128, 64, 8, 4),
        (128, 64, 128, 64, 4, 3), (128, 64, 128, 64, 8, 3), (128, 32, 256, 64, 8, 4),
    ],
    "march": [
        (128, 128, 64, 8, 5, True), (128, 128, 64, 4, 5, True), (128, 128, 128, 8, 3, True),
        (128, 128, 128, 8, 3, False), (128, 128, 64, 8, 4, False), (64, 128, 64, 4, 4, False),
        (64, 64, 128, 4, 3, False), (64, 64, 128, 4, 4, False), (64, 64, 64, 4, 4, False),
        (64, 64, 128, 4, 4, True),
    ],
    "dscores": [(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3)],
}  # fmt: skip
WORTH = 0.99  # settings in use are left for others that take at most this share of their time
TOLERANCE = 1e-2  # relative difference by norm between two settings' results: both are rounded to bf16


def candidates(kernel: str, shape: Shape, base: dict) -> list[dict]:
    """Settings to try for a kernel: those in use, then others whose tiles fit into a chunk and the state."""
    _, K, V = shape
    limits = {"BM": base["chunk"]["size"], "BT": base["chunk"]["size"], "BK": K, "BV": V}
    used = {name: base[kernel][name] for name in FIELDS[kernel]}
    named = [dict(zip(FIELDS[kernel], values)) for values in CANDIDATES[kernel]]
    fitting = [one for one in named if all(one.get(name, 0) <= limit for name, limit in limits.items())]
    return [used, *(one for one in fitting if one != used)]


def with_settings(base: dict, kernel: str, settings: dict) -> dict:
    changed = deepcopy(base)
    changed[kernel].update(settings)
    return changed


def tune(bases: dict[Shape, dict], tokens: int, directory: Path, deadline: float, workers: int) -> None:
    """Time every candidate until `deadline` (time.time()), writing each kernel's winner at each shape."""
    found = deepcopy(bases)
    with processes(workers) as pool:
        needed, jobs = submit(pool, bases)
        chunks = [(shape, other, submit_all(pool, shape, other)) for shape, other in other_chunks(bases)]
        finished([job for _, job in needed], deadline)  # the kernels that make the others' inputs
        for kernel, shape in jobs:
            if time.time() > deadline:
                print("out of time: the remaining candidates are left out")
                break
            ready = compiled(kernel, shape, jobs[kernel, shape], deadline)
            best = fastest(kernel, shape, tokens, bases[shape], ready, deadline)
            if best:
                found[shape][kernel].update(best)
                print("wrote", write(shape_key(shape), kernel, best, directory), flush=True)
        for shape, settings, compilations in chunks:
            if _all_run(compilations, deadline):
                _print_total(f"chunks of {settings['chunk']['size']}", shape, tokens, settings)
    for shape in bases if time.time() < deadline else ():
        _print_total("settings in use", shape, tokens, bases[shape])
        _print_total("the best of each", shape, tokens, found[shape])


def other_chunks(bases: dict[Shape, dict]) -> list[tuple[Shape, dict]]:
    """The settings in use at the other chunk sizes: fewer states, but more within a chunk, or the reverse."""
    return [
        (shape, with_settings(base, "chunk", {"size": size}))
        for shape, base in bases.items()
        for size in (128, 256)
        if size != base["chunk"]["size"]
    ]


def submit_all(pool: ProcessPoolExecutor, shape: Shape, settings: dict) -> list[Future]:
    return [pool.submit(compile_one, shape, settings, kernel) for kernel in FIELDS]


def _all_run(jobs: list[Future], deadline: float) -> bool:
    done = finished(jobs, deadline)
    return len(done) == len(jobs) and not any(job.exception() or job.result() for job in jobs)


def _print_total(title: str, shape: Shape, tokens: int, settings: dict) -> None:
    times = {row.name: round(row.milliseconds, 2) for row in measure_kernels(tokens, *shape, settings)}
    print(f"{shape}, {title}: {sum(times.values()):.2f} ms {times}", flush=True)


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are ended with it, at work or not."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


def submit(pool: ProcessPoolExecutor, bases: dict[Shape, dict]) -> tuple[Jobs, dict[tuple[str, Shape], Jobs]]:
    """Compilations of the settings in use, and of each kernel's candidates at each shape, in this order."""
    used = {
        (kernel, shape): pool.submit(compile_one, shape, base, kernel)
        for kernel in FIELDS
        for shape, base in bases.items()
    }
    jobs = {}
    for kernel, shape in used:
        base = bases[shape]
        first, *others = candidates(kernel, shape, base)
        jobs[kernel, shape] = [(first, used[kernel, shape])] + [
            (one, pool.submit(compile_one, shape, with_settings(base, kernel, one), kernel)) for one in others
        ]
    return [jobs[key][0] for key in jobs], jobs


def finished(jobs: list[Future], deadline: float) -> set[Future]:
    return wait(jobs, timeout=max(0.0, deadline - time.time())).done


def compiled(kernel: str, shape: object, jobs: Jobs, deadline: float) -> list[dict]:
    """Settings that compile and run, as far as that is known before the deadline."""
    done = finished([job for _, job in jobs], deadline)
    problems = {id(job): job.exception() or job.result() for job in done}
    for problem in filter(None, problems.values()):
        print(f"  does not run: {problem}")
    if len(done) < len(jobs):
        print(f"  {kernel} at {shape}: {len(jobs) - len(done)} candidates did not compile in time")
    return [settings for settings, job in jobs if job in done and not problems[id(job)]]


def compile_one(shape: Shape, settings: dict, kernel: str) -> str | None:
    """Run a kernel once on a few tokens; says what went wrong."""
    try:
        calls = kernel_calls(2 * settings["chunk"]["size"], *shape, settings, real=False)
        for name in _calls_of(kernel, calls):
            calls[name]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{kernel} {settings[kernel]} at {shape}: {str(error).splitlines()[0][:160]}"
    return None


def _calls_of(kernel: str, calls: dict) -> list[str]:
    return [name for name in calls if name.split()[0] == kernel]


def fastest(
    kernel: str, shape: Shape, tokens: int, base: dict, ready: list[dict], deadline: float
) -> dict | None:
    """The best of the candidates that compute the same as the settings in use; None where those are best."""
    used, *_ = candidates(kernel, shape, base)
    if used not in ready:
        return None

    def try_one(settings: dict) -> Trial:
        calls = kernel_calls(tokens, *shape, with_settings(base, kernel, settings))
        names = _calls_of(kernel, calls)
        results = [comparable(kernel, calls[name](), base["chunk"]["size"]) for name in names]
        return results, lambda: sum(time_call(calls[name], repeats=9) for name in names)

    times = time_equals(kernel, ready, try_one, deadline)
    _print_times(kernel, shape, tokens, base, sorted(times, key=lambda one: one[0]))
    return winner(times)


def time_equals(
    kernel: str, ready: list[dict], try_one: Callable[[dict], Trial], deadline: float
) -> list[tuple[float, dict]]:
    """(milliseconds, settings) of those that compute the same as the first, which are in use."""
    expected, times = None, []
    for settings in ready:
        if time.time() > deadline:
            break
        results, milliseconds = try_one(settings)
        if expected is None:
            expected = results
        elif error := difference(results, expected):
            print(f"  {kernel} {settings} computes something else: {error:.1e} off")
            continue
        times.append((milliseconds(), settings))
    return times


def winner(times: list[tuple[float, dict]]) -> dict | None:
    """The fastest settings; None where those in use are, or nearly are."""
    best = min(times, key=lambda one: one[0], default=None)
    return best[1] if best and best[0] <= WORTH * times[0][0] else None


def comparable(kernel: str, result: object, chunk: int) -> list[Tensor]:
    """What a kernel promises: of scores [B, T, H, C] only those whose key is not behind the query."""
    tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    if kernel not in ("scores", "dscores"):
        return tensors
    return [x.unflatten(1, (-1, chunk)).transpose(2, 3).tril() for x in tensors]


def difference(results: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest relative difference by norm where it is above the tolerance (a NaN is), else 0."""
    errors = [
        ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()
        for mine, theirs in zip(results, expected, strict=True)
        for got, want in zip(mine, theirs, strict=True)
    ]
    return max((error for error in errors if not error <= TOLERANCE), default=0.0)


def _print_times(kernel: str, shape: Shape, tokens: int, base: dict, times: list) -> None:
    tflop, gigabytes = kernel_work(kernel, tokens, *shape, base["chunk"]["size"])
    launches = 2 if kernel in ("march", "mix") else 1
    print(f"{kernel}, H, K, V = {shape}")
    for milliseconds, settings in times:
        rate, bandwidth = launches * tflop / milliseconds * 1e3, launches * gigabytes / milliseconds * 1e3
        print(f"  {milliseconds:7.3f} ms {rate:6.0f} TFLOP/s {bandwidth:6.0f} GB/s  {settings}")


def base_settings(shape: Shape) -> dict:
    """The settings in use at a shape."""
    from models.ops.gla_triton_settings import settings_for

    H, K, V = shape
    q = torch.empty(1, 1, H, K, device="cuda", dtype=torch.bfloat16)
    return deepcopy(settings_for(q, q.new_empty(1, 1, H, V)))


def write(key: str, kernel: str, settings: dict, directory: Path, file: str = "gla.json") -> Path:
    """Lay one kernel's settings over the file, which starts as a copy of the one in use."""
    gpu = gpu_name(torch.device("cuda"))
    path = directory / gpu / file
    path.parent.mkdir(parents=True, exist_ok=True)
    start = next((path for path in (path, folder() / gpu / file) if path.is_file()), None)
    known = json.loads(start.read_text()) if start else {}
    known.setdefault(key, {})[kernel] = settings
    path.write_text(json.dumps(known, indent=2) + "\n")
    return path


def shape_key(shape: Shape) -> str:
    H, K, V = shape
    return f"K{K}-V{V}-H{H}-16bit"


def default_workers() -> int:
    return min(14, os.cpu_count() or 1)


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    deadline = time.time() + float(given.get("seconds", "inf"))
    shapes = list(SHAPES.values())
    if "shapes" in given:
        shapes = [tuple(int(n) for n in text.split("x")) for text in given["shapes"].split(",")]
    tune(
        {shape: base_settings(shape) for shape in shapes},
        int(given.get("tokens", 65536)),
        Path(given.get("out", FOLDER)),
        deadline,
        int(given.get("workers", default_workers())),
    )


if __name__ == "__main__":
    main(sys.argv[1:])

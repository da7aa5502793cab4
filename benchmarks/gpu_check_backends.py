"""The optional packages' kernels on a GPU against float64: results and every gradient.

    python -m benchmarks.gpu_check_backends [seconds=150] [only=fla,mamba_ssm,causal_conv1d] [workers=14]

flash-linear-attention's `chunk_gla` and `fused_recurrent_gla`, and both behind `models.ops.gla` (backend
fla); mamba_ssm's SSD and causal_conv1d behind `models.ops.ssd` and `models.ops.conv`. K=256/V=512 and
K=1024/V=2048, d_state 128 and 512, bf16 and fp32, lengths 1 to 8192, with an initial state, and packed
(cu_seqlens). A line says `ok`, `FAIL`, or `none` where a package has no kernel that fits the card; NaN is a
FAIL. What would begin after `seconds` is left out and said; status 1 then, or when a case failed. Our
kernels: gpu_check_gla.py, gpu_check_ssd.py.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

with contextlib.suppress(ImportError):  # where present, narrows the packages' autotuning for a short check
    import fast_autotune  # noqa: F401

import torch
from torch import Tensor

from benchmarks.gpu_check_gla import LENGTHS, NAMES, TOLERANCE, draw_inputs, run_with_gradients
from benchmarks.gpu_check_ssd import check_conv_case, check_ssd_case
from models.command_line import run_command
from models.ops.gla import gla, gla_recurrent

SHAPES = ((2, 256, 512), (1, 1024, 2048))  # heads, K, V
DTYPES = (torch.bfloat16, torch.float32)
PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")
# those that matter most first, lest time runs out for them
GLA_LENGTHS = {
    "chunk_gla": (1000, 8192, 65, 64, 63, 1),
    "fused_recurrent_gla": (32, 31, 1, 65),
    "backend fla": (32, 33, 1000, 1),
}


@dataclass(frozen=True)
class Arguments:
    """Check the optional packages' kernels.

    seconds=N    of the whole run (150)
    only=...     of fla, mamba_ssm and causal_conv1d (all)
    workers=N    processes at once (14, at most one a core)
    """

    seconds: float = 150.0
    only: str = ",".join(PACKAGES)
    workers: int = 14


def run_gla(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """One of the implementations of GLA that come with flash-linear-attention."""
    if implementation == "backend fla":
        return gla(q, k, v, g, **options, backend="fla")
    function = getattr(importlib.import_module("fla.ops.gla"), implementation)
    return function(q, k, v, **({"g": g} if implementation == "chunk_gla" else {"gk": g}), **options)


def check_gla_case(
    implementation: str, shape: tuple[int, int, int], dtype: torch.dtype, T: int, packed: bool
) -> int:
    """Prints one line; 1 where it is a failure."""
    bounds = [0, T // 3, T // 3 + 1, T] if packed else [0, T]
    cu_seqlens = torch.tensor(bounds, device="cuda") if packed else None
    inputs = draw_inputs(T, *shape, len(bounds) - 1, dtype, 1 / 16)
    reference = gla_recurrent if T <= 65 else partial(gla, backend="torch")
    want = run_with_gradients(reference, [x.double() for x in inputs], cu_seqlens)
    got = run_with_gradients(partial(run_gla, implementation), inputs, cu_seqlens)
    errors = {n: ((got[n].double() - want[n]).norm() / want[n].norm().clamp_min(1e-30)).item() for n in NAMES}
    good = all(error <= TOLERANCE[dtype] for error in errors.values())  # false for NaN
    cells = " ".join(f"{name}={error:.1e}" for name, error in errors.items())
    print(f"{'ok  ' if good else 'FAIL'} {gla_label(implementation, shape, dtype, T, packed):56s} {cells}")
    return int(not good)


def gla_label(
    implementation: str, shape: tuple[int, int, int], dtype: torch.dtype, T: int, packed: bool
) -> str:
    return f"{implementation} {'x'.join(map(str, shape))} {str(dtype)[6:]} T={T} packed={packed}"


Case = tuple[str, Callable[[], int]]


def groups(packages: list[str]) -> list[list[Case]]:
    """Cases that share kernels stand in one list, for one process to run in order."""
    found = []
    if "fla" in packages:
        found += [
            [
                (
                    gla_label(name, shape, dtype, T, packed),
                    partial(check_gla_case, name, shape, dtype, T, packed),
                )
                for T in lengths
                for packed in ((False, True) if T > 30 else (False,))
            ]
            for shape in reversed(SHAPES)
            for dtype in DTYPES
            for name, lengths in GLA_LENGTHS.items()
        ]
    lengths = sorted(LENGTHS, key=lambda T: T < 1000)
    for package, check, outer in (
        ("mamba_ssm", check_ssd_case, [(n, dtype) for n in (512, 128) for dtype in DTYPES]),
        ("causal_conv1d", check_conv_case, [(dtype,) for dtype in DTYPES]),
    ):
        if package in packages:
            found += [
                [
                    (
                        f"{package} {' '.join(map(str, first))} T={T} packed={packed}",
                        partial(check, ("mamba_ssm",), *first, T, packed),
                    )
                    for T in lengths
                    for packed in ((False, True) if T >= 63 else (False,))
                ]
                for first in outer
            ]
    return found


def run_group(cases: list[Case], until: float) -> tuple[int, int]:
    """Runs cases in order, each printed as it ends. Returns how many failed and how many were left out."""
    failures = left_out = 0
    for label, check in cases:
        if time.time() > until:
            left_out += 1
            _write(f"left out {label}: no time left\n")
            continue
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            failures += _run_case(label, check)
        _write(text.getvalue())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failures, left_out


def _run_case(label: str, check: Callable[[], int]) -> int:
    try:
        return check()
    except Exception as error:
        none = "OutOfResources" in type(error).__name__
        print(f"{'none' if none else 'FAIL'} {label} {type(error).__name__}: {str(error)[:300]}")
        return int(not none)


def _write(text: str) -> None:
    """At once, so that lines of several processes do not mix."""
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), text.encode())


def act(arguments: Arguments) -> int:
    packages = arguments.only.split(",")
    if unknown := set(packages).difference(PACKAGES):
        raise ValueError(f"only={min(unknown)}: expected some of {', '.join(PACKAGES)}")
    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, and torch sees none")
    begin = time.time()
    work = groups(packages)
    workers = min(arguments.workers, os.cpu_count() or 1, len(work))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; relative errors by norm", flush=True)
    failures = left_out = 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        # a kernel that is being compiled is not interrupted: stop beginning others a little earlier
        until = begin + 0.85 * arguments.seconds
        jobs = [pool.apply_async(run_group, (cases, until)) for cases in work]
        for job, cases in zip(jobs, work):
            try:
                failed, missing = job.get(max(1.0, begin + arguments.seconds - time.time()))
            except Exception as error:  # its time is over, or its process ended
                failed, missing = 0, 1
                print(f"left out: the rest behind {cases[0][0]} ({type(error).__name__})", flush=True)
            failures, left_out = failures + failed, left_out + missing
    print(f"== {failures} failures, {left_out} left out, {time.time() - begin:.0f} s")
    return 1 if failures or left_out else 0


if __name__ == "__main__":
    sys.exit(run_command(Arguments, act))

"""Which implementation of an operator runs: decided by device, by what is installed, and by STATEX_BACKEND.

Every operator calls `resolve` and gets the name of one implementation back:

| name        | what it is                              | needs                                |
| ----------- | --------------------------------------- | ------------------------------------ |
| `torch`     | the plain torch definition              | nothing; runs on every device        |
| `triton`    | kernels of this repository              | CUDA and triton                      |
| `fla`       | flash-linear-attention's Triton kernels | CUDA, triton, flash-linear-attention |
| `mamba_ssm` | packages mamba_ssm and causal_conv1d    | CUDA and these compiled packages     |

`STATEX_BACKEND=torch|triton|mamba_ssm|auto` (default auto) overrides the choice for all operators:
`triton` means Triton kernels from this repository or from flash-linear-attention, whichever an operator has.
The choice is printed once per operator, on the first process only.
"""

import importlib
import os
import sys
from functools import cache

import torch

CHOICES = ("auto", "torch", "triton", "fla", "mamba_ssm")
SETTINGS = ("auto", "torch", "triton", "mamba_ssm")

_INSTALL = {
    "triton": "pip install triton (it comes with the CUDA builds of torch on Linux)",
    "fla": "pip install flash-linear-attention==0.6.0",
    "mamba_ssm": "bash scripts/setup.sh kernels=true (builds mamba_ssm and causal_conv1d; needs nvcc)",
    "causal_conv1d": "bash scripts/setup.sh kernels=true (builds mamba_ssm and causal_conv1d; needs nvcc)",
}
_announced: set[str] = set()


@cache
def import_problem(package: str) -> str | None:
    """None when `package` imports, else one line that says why it does not and how to install it."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken binary build raises OSError or RuntimeError, not only ImportError
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{package} cannot be imported ({first_line}); {_INSTALL.get(package, 'install ' + package)}"
    return None


def requirements(implementation: str, operator: str) -> tuple[str, ...]:
    """Python modules that an implementation of an operator needs."""
    if implementation == "torch":
        return ()
    if implementation == "mamba_ssm":
        return (
            ("causal_conv1d",)
            if operator == "causal_conv1d"
            else ("triton", "mamba_ssm.ops.triton.ssd_combined")
        )
    return ("triton", "fla") if implementation == "fla" else ("triton",)


def cannot_run(implementation: str, operator: str, device: torch.device) -> str | None:
    """None when the implementation can run on the device, else one line that says what is missing."""
    if implementation == "torch":
        return None
    if device.type != "cuda":
        return f"{implementation!r} kernels need a CUDA device, and the tensors are on {device.type!r}"
    for package in requirements(implementation, operator):
        if problem := import_problem(package):
            return problem
    return None


def setting() -> str:
    """The value of STATEX_BACKEND, checked.

    Raises:
        ValueError: the variable holds something else than one of SETTINGS.
    """
    value = os.environ.get("STATEX_BACKEND", "auto").strip().lower() or "auto"
    if value not in SETTINGS:
        raise ValueError(f"STATEX_BACKEND={value!r} is unknown; use one of {', '.join(SETTINGS)}")
    return value


def resolve(operator: str, device: torch.device, offered: tuple[str, ...], backend: str | None = None) -> str:
    """Name of the implementation that runs `operator` on `device`.

    Args:
        operator: name of the operator, for messages.
        device: where its tensors are.
        offered: implementations the operator has for this input, best first, `torch` among them.
        backend: asked for by the caller; None follows STATEX_BACKEND.

    Raises:
        ValueError: what was asked for cannot run here; says what is missing and how to install it.
    """
    wanted = (backend or setting()).lower()
    if wanted not in CHOICES:
        raise ValueError(f"backend {wanted!r} is unknown; use one of {', '.join(CHOICES)}")
    if wanted == "auto":
        chosen = next(name for name in offered if cannot_run(name, operator, device) is None)
    else:
        chosen = _asked(operator, device, offered, wanted, strict=backend is not None)
    _announce(operator, device, chosen)
    return chosen


def _asked(operator: str, device: torch.device, offered: tuple[str, ...], wanted: str, strict: bool) -> str:
    # `triton` covers both sources of Triton kernels; `mamba_ssm` concerns only operators that have it
    names = {"triton": ("triton", "fla")}.get(wanted, (wanted,)) if not strict else (wanted,)
    candidates = [name for name in offered if name in names]
    if not candidates and not strict and wanted == "mamba_ssm":
        return next(name for name in offered if cannot_run(name, operator, device) is None)
    if not candidates:
        raise ValueError(
            f"{operator} has no {wanted!r} implementation for this input; it offers {', '.join(offered)}"
        )
    problems = {name: cannot_run(name, operator, device) for name in candidates}
    for name, problem in problems.items():
        if problem is None:
            return name
    raise ValueError(
        f"{operator}: backend {wanted!r} was asked for but cannot run: {next(iter(problems.values()))}"
    )


def _announce(operator: str, device: torch.device, chosen: str) -> None:
    key = f"{operator}/{device.type}/{chosen}"
    if key in _announced:
        return
    _announced.add(key)
    if os.environ.get("RANK", "0") == "0" and device.type == "cuda":
        print(f"[statex] {operator}: {chosen} kernels on {device.type}", file=sys.stderr)

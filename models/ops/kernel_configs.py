"""Tuned kernel configurations: configs/kernels/<gpu>/<operator>.json over what the code has built in.

A file maps a shape ("K1024-V2048-H1-16bit") to the settings that won there. Only what it names is replaced.
`python -m benchmarks.tune_kernels` measures candidates on the GPU at hand and writes these files.
"""

import json
import os
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "kernels"


def kernel_config(
    operator: str, shape: str, default: dict[str, dict], device: torch.device
) -> dict[str, dict]:
    """Settings of each kernel of an operator at a shape: `default`, with the tuned ones laid over it.

    Args:
        operator: name of the file, "gla" for gla.json.
        shape: the key inside the file.
        default: {kernel: {setting: value}}.

    Raises:
        ValueError: the file names a kernel or a setting that the operator does not have.
    """
    tuned = _read(operator, gpu_name(device)).get(shape, {})
    merged = {kernel: dict(settings) for kernel, settings in default.items()}
    for kernel, settings in tuned.items():
        unknown = set(settings) - set(default.get(kernel, {}))
        if kernel not in default or unknown:
            raise ValueError(
                f"configs/kernels/{gpu_name(device)}/{operator}.json, {shape}: {kernel} {sorted(unknown)} "
                f"is unknown; the kernels and their settings are {default}; "
                "benchmarks.tune_kernels (gla) and benchmarks.tune_ssd (ssd) write the file anew"
            )
        merged[kernel].update(settings)
    return merged


def gpu_name(device: torch.device) -> str:
    """Folder name of a device: nvidia-h100-80gb-hbm3, nvidia-h200, or cpu."""
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


def folder() -> Path:
    """Where the files are: $STATEX_KERNEL_CONFIGS, or configs/kernels of this repository."""
    return Path(os.environ.get("STATEX_KERNEL_CONFIGS", FOLDER))


@cache
def _read(operator: str, gpu: str) -> dict[str, dict[str, dict]]:
    path = folder() / gpu / f"{operator}.json"
    return json.loads(path.read_text()) if path.is_file() else {}

"""Random generators of a process, saved and restored. The loop draws nothing from them; a model may."""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_rng(path: Path, device: torch.device) -> None:
    """Python's, numpy's and torch's generators into one safetensors file."""
    _, python, _ = random.getstate()
    _, numpy, position, _, _ = np.random.get_state()
    tensors = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy.astype(np.int64)),
        "numpy_position": torch.tensor([position]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, path)


def load_rng(path: Path, device: torch.device) -> None:
    tensors = load_file(path)
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    np.random.set_state(
        ("MT19937", tensors["numpy"].numpy().astype(np.uint32), int(tensors["numpy_position"]), 0, 0.0)
    )
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)

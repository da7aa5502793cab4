"""Sizes, chunks and settings of one call of the SSD kernels in `models/ops/ssd_triton.py`."""

from functools import lru_cache

import torch
from torch import Tensor

from .kernel_configs import kernel_config

# by number of bytes of an input element: tiles of each kernel, chosen on an H200 and an H100. `maxnreg`
# bounds the registers of a thread: these kernels wait for memory, and more then share a multiprocessor.
CONFIGS = {
    2: {
        "chunk": {"Q": 256},
        "scores": {"ROWS": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        "states": {"HEADS": 1, "BLOCK_K": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        "march": {"BLOCK_K": 64, "BLOCK_N": 128, "STAGES": 4, "num_warps": 4},
        "march_back": {"BLOCK_K": 64, "BLOCK_N": 128, "STAGES": 4, "num_warps": 4, "maxnreg": None},
        "pass": {"BLOCK": 512, "num_warps": 4},
        # one warp: a sum over a block then crosses no barrier
        "pass_gradients": {"BLOCK": 256, "num_warps": 1},
        "outputs": {
            "ROWS": 64, "BLOCK_K": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 96,
        },
        "score_gradients": {"ROWS": 64, "STAGES": 3, "num_warps": 4, "maxnreg": None},
        "key_gradients": {
            "ROWS": 64, "BLOCK_K": 64, "BLOCK_N": 128, "STAGES": 3, "num_warps": 4, "num_stages": 3,
        },
        "steps": {"HEADS": 4, "num_warps": 4},
    },
    4: {
        "chunk": {"Q": 64},
        "scores": {"ROWS": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "states": {"HEADS": 1, "BLOCK_K": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "march": {"BLOCK_K": 32, "BLOCK_N": 64, "STAGES": 2, "num_warps": 4},
        "march_back": {"BLOCK_K": 32, "BLOCK_N": 64, "STAGES": 2, "num_warps": 4, "maxnreg": None},
        "pass": {"BLOCK": 512, "num_warps": 4},
        "pass_gradients": {"BLOCK": 256, "num_warps": 1},
        "outputs": {
            "ROWS": 32, "BLOCK_K": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "maxnreg": None,
        },
        "score_gradients": {"ROWS": 64, "STAGES": 1, "num_warps": 8, "maxnreg": None},
        "key_gradients": {
            "ROWS": 64, "BLOCK_K": 32, "BLOCK_N": 32, "STAGES": 2, "num_warps": 4, "num_stages": 2,
        },
        "steps": {"HEADS": 4, "num_warps": 4},
    },
}  # fmt: skip


class Shape:
    """Sizes of one call, its table of chunks, and the configuration that follows from them."""

    def __init__(self, x: Tensor, B: Tensor, cu_seqlens: Tensor | None):
        batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        key = f"P{self.head_dim}-N{self.state_size}-{8 * x.element_size()}bit"
        self.config = kernel_config("ssd", key, CONFIGS[x.element_size()], x.device)
        self.chunk = self.config["chunk"]["Q"]
        self.precision = "ieee" if x.dtype == torch.float32 else "tf32"
        self.state_dtype = x.dtype
        self.sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.start, self.lengths, self.first = chunk_table(
            batch, self.length, self.chunk, cu_seqlens, x.device
        )
        self.chunks = self.start.numel()
        self.regular = cu_seqlens is None and self.length % self.chunk == 0  # every chunk is full

    def tiles(self, kernel: str) -> dict:
        """Launch options of a kernel, cut down to this shape."""
        config = dict(self.config[kernel])
        if "BLOCK_N" in config:
            config["BLOCK_N"] = min(config["BLOCK_N"], self.state_size)
        if kernel == "states" and ((self.heads // self.groups) % config["HEADS"] or self.head_dim > 64):
            config["HEADS"] = 1
        if "BLOCK" in config:
            config["BLOCK"] = min(config["BLOCK"], self.head_dim * self.state_size)
        return config

    def sizes(self, *names: str) -> dict:
        """The constants a kernel is compiled for."""
        values = {
            "H": self.heads,
            "G": self.groups,
            "P": self.head_dim,
            "N": self.state_size,
            "Q": self.chunk,
        }
        return {name: values[name] for name in names}


def chunk_table(
    batch: int, length: int, size: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """First token and number of tokens of every chunk; first chunk of every sequence, then their number.

    Made on the device without waiting for it: packed sequences get as many chunks as they can need at most,
    and those that are not needed have no tokens.
    """
    if cu_seqlens is None:
        return _table_of_rows(batch, length, size, device)
    return _table(
        cu_seqlens.to(device=device, dtype=torch.long), length // size + cu_seqlens.numel() - 1, size
    )


@lru_cache(maxsize=64)  # the same for all layers and steps
def _table_of_rows(batch: int, length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(batch + 1, device=device) * length
    return _table(offsets, batch * ((length + size - 1) // size), size)


def _table(offsets: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    device = offsets.device
    first = torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + size - 1) // size, dim=0, out=first[1:])
    chunk = torch.arange(chunks, device=device)
    sequence = (torch.searchsorted(first, chunk, right=True) - 1).clamp_max(offsets.numel() - 2)
    start = offsets[sequence] + (chunk - first[sequence]) * size
    lengths = (offsets[sequence + 1] - start).clamp(0, size)
    return start, lengths.to(torch.int32), first

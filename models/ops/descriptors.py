"""Tensors as tables of blocks, for Triton's tensor descriptors: one instruction copies a whole block.

On Hopper and later a unit of its own does so (TMA), and threads neither compute addresses nor hold them in
registers. On older GPUs Triton turns a descriptor back into pointers, whose loads it does not stage: these
kernels are slower there. What lies outside a table reads as zero and is not written.
"""

import torch
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("models/ops/descriptors.py needs triton 3.4 or newer") from error

ALIGNMENT = 16  # bytes; of a table's first element, and of the way from row to row


def token_blocks(t: Tensor, tokens: int, channels: int) -> TensorDescriptor:
    """Blocks `[tokens, channels]` of an input `[B, T, ...]`, with a constant stride from token to token.

    Rows that are not aligned, those of a slice for instance, or that overlap are copied first.
    """
    table = t.flatten(0, 1).flatten(1)
    aligned = table.data_ptr() % ALIGNMENT == 0 and table.stride(0) * table.element_size() % ALIGNMENT == 0
    if not aligned or table.stride(0) < table.shape[1]:
        table = table.clone(memory_format=torch.contiguous_format)
    return _blocks(table, tokens, channels)


def row_blocks(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks `[rows, columns]` of a contiguous tensor, whose last dimension is a row: to read or to write."""
    return _blocks(t.view(-1, t.shape[-1]), rows, columns)


def _blocks(table: Tensor, rows: int, columns: int) -> TensorDescriptor:
    shape = [max(size, 1) for size in table.shape]  # of an empty table, where nothing is launched
    return TensorDescriptor(table, shape, list(table.stride()), [rows, columns])

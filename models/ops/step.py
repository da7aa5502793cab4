"""When a decoding step runs as one of the kernels in step_triton.py, and where these leave the state."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .backend import resolve

_scope = threading.local()


def one_kernel(operator: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether `operator` steps over one token x [B, 1, ...] in a kernel, which has no gradients."""
    if x.shape[1] != 1 or x.numel() == 0 or torch.is_grad_enabled():
        return False
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, *others)):
        return False
    return resolve(operator, x.device, ("triton", "torch")) == "triton"


@contextmanager
def states_in_place() -> Iterator[None]:
    """While this is entered, a step's kernel may write the new state over the old one and return that tensor.

    For whoever owns the states: a decoder on fixed storage. Without it old states stay as they are.
    """
    before = getattr(_scope, "in_place", False)
    _scope.in_place = True
    try:
        yield
    finally:
        _scope.in_place = before


def new_state(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, old: Tensor | None) -> Tensor:
    """Where a kernel writes the new state: a tensor of its own on the device of `like`, or the old state."""
    if old is not None and old.dtype == dtype and old.is_contiguous() and getattr(_scope, "in_place", False):
        return old
    return like.new_empty(shape, dtype=dtype)

"""Random tensors whose bits depend on a seed alone: not on the device, nor on how the model was loaded."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def checked_seed(seed: Any) -> int:
    """`seed`, or ValueError when it is none of the numbers that torch's generators begin from."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    return int(seed)


class Draw:
    """Draws from one CPU generator, in fp32, and then moves and casts each tensor to be like another one.

    A seed therefore means the same numbers everywhere, rounded where `like` is bf16. On the meta device
    nothing is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(checked_seed(seed))

    def uniform(
        self,
        shape: Sequence[int],
        low: float,
        high: float,
        like: Tensor,
        then: Callable[[Tensor], Tensor] = lambda drawn: drawn,
    ) -> Tensor:
        """U(low, high), passed through `then` while still in fp32."""
        return self._filled(
            shape, like, lambda empty: then(empty.uniform_(low, high, generator=self.generator))
        )

    def linear(self, shape: Sequence[int], fan_in: int, like: Tensor) -> Tensor:
        """U(+-1/sqrt(fan_in)): how nn.Linear and nn.Conv1d initialise themselves."""
        return self.uniform(shape, -(fan_in**-0.5), fan_in**-0.5, like)

    def normal(self, shape: Sequence[int], std: float, like: Tensor) -> Tensor:
        return self._filled(shape, like, lambda empty: empty.normal_(0.0, std, generator=self.generator))

    def xavier_uniform(self, shape: Sequence[int], gain: float, like: Tensor) -> Tensor:
        """Over the last two dimensions of `shape`."""
        bound = gain * math.sqrt(6 / sum(shape[-2:]))
        return self.uniform(shape, -bound, bound, like)

    def xavier_normal(self, shape: Sequence[int], gain: float, like: Tensor) -> Tensor:
        """Over the last two dimensions of `shape`."""
        return self.normal(shape, gain * math.sqrt(2 / sum(shape[-2:])), like)

    @staticmethod
    def _filled(shape: Sequence[int], like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        if like.is_meta:
            return torch.empty(tuple(shape), dtype=like.dtype, device="meta")
        empty = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
        return fill(empty).to(device=like.device, dtype=like.dtype)

"""What a family puts into a layer, and the stack of layers: the residual stream and the states through it.

Nothing here depends on what a token mixer computes.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .blocks import RMSNorm, recomputed
from .cache import LayerState, Packing, RecurrentCache
from .config import LanguageModelConfig

GROUP = "group"  # the level of recomputation that is the model's and not a block's


class Block(nn.Module):
    """One layer: a token mixer with a norm in front, and whatever else the family puts into a layer.

    forward(x [B, T, D], state=None, output_state=False, cu_seqlens=None) -> (x [B, T, D], state or None): the
    residual stream in and out, and the recurrent state of each of N sequences (N = B without cu_seqlens).
    """

    recompute_levels: ClassVar[tuple[str, ...]] = ("none", "full")
    recompute = "none"  # one of the levels; forward does what it says
    owns_stream = False  # nobody else reads the stream that comes in: its memory may be overwritten

    def unless_kept(self, part: Callable, *levels: str) -> Callable:
        """`part`; at one of `levels` it keeps its inputs alone and runs again in the backward pass."""
        return recomputed(part) if self.recompute in levels else part

    @property
    def token_mixer(self) -> nn.Module:
        """Answers `state_elements()`, `conv_elements()` and `flops_per_token()`."""
        raise NotImplementedError

    @property
    def mixer_norm(self) -> RMSNorm:
        raise NotImplementedError

    def flops_per_token(self) -> int:
        """Forward pass, a multiply-add counted as two."""
        return self.token_mixer.flops_per_token()


def group_size(layers: int) -> int:
    """How many layers make a group: fewest streams are kept then, in front of groups and inside of one."""
    return max(1, math.isqrt(layers))


class Trunk(nn.Module):
    """Embeddings, blocks and the last norm, under the family's parameter names."""

    def __init__(self, config: LanguageModelConfig, block_class: type[Block], norm_name: str) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block_class(config, i) for i in range(config.num_hidden_layers))
        self.grouped = False  # keep the stream in front of each group of layers, not of each layer
        self.norm_name = norm_name
        self.add_module(norm_name, RMSNorm(config.hidden_size, config.norm_eps))

    @property
    def last_norm(self) -> RMSNorm:
        return getattr(self, self.norm_name)

    def groups(self) -> list[range]:
        """Indices of the layers that are recomputed together, or one by one."""
        count = len(self.layers)
        size = group_size(count) if self.grouped else 1
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def run(
        self,
        x: Tensor,
        cache: RecurrentCache,
        packing: Packing | None,
        update: bool,
        streams: list[Tensor] | None,
    ) -> Tensor:
        """Residual stream [B, T, D] through all blocks; the input of each is appended to `streams`."""
        if packing is not None and not len(packing.rows):  # padding alone: no state changes, nothing is read
            if streams is not None:
                streams += [x] * len(self.layers)
            return x
        carried = cache.layers or [None] * len(self.layers)
        states: list[LayerState | None] = []
        for group in self.groups():
            again = self.grouped and streams is None
            part = recomputed(self._through, ends_in_product=False) if again else self._through
            x, made = part(x, group, carried, packing, update, streams)
            states += [cache.stored(index, state) for index, state in zip(group, made)] if update else made
        if update:
            cache.replace(states)
        return x

    def _through(
        self,
        x: Tensor,
        group: range,
        carried: Sequence[LayerState | None],
        packing: Packing | None,
        update: bool,
        streams: list[Tensor] | None,
    ) -> tuple[Tensor, list[LayerState | None]]:
        """The stream behind a group of layers, and the new state of each."""
        states = []
        for index in group:
            if streams is not None:
                streams.append(x)
            block = self.layers[index]
            # the first reads the embeddings, and that of a group what it runs again from
            others_read = streams is not None or index == 0 or (self.grouped and index == group[0])
            block.owns_stream = torch.is_grad_enabled() and not others_read
            x, state = _run_block(block, x, carried[index], packing, update)
            states.append(state)
        return x, states


def _run_block(
    block: Block, x: Tensor, carried: LayerState | None, packing: Packing | None, update: bool
) -> tuple[Tensor, LayerState | None]:
    state = carried if packing is None else packing.states_in(carried)
    arguments = (x, state, update, None if packing is None else packing.cu_seqlens)
    x, final = block(*arguments)
    if update and packing is not None:
        final = packing.states_out(final, carried)
    return x, final

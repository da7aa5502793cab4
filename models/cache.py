"""The state that a linear RNN carries from token to token, and how it is shared out over packed sequences."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LayerState = dict[str, Tensor]  # a mixer's tensors by name, the first dimension of each counts sequences


@dataclass
class RecurrentCache:
    """What `generate`, reading in pieces and training with a carried state pass from one forward to the next.

    `forward(..., past_key_values=cache, use_cache=True)` updates it in place, replacing the tensors and never
    writing into them. Its size does not depend on how many tokens were seen.

    Attributes:
        layers: one dict of tensors a layer: `recurrent_state`, and `conv_state` where there is a convolution.
        seen_tokens: tokens read so far, padding included.
    """

    layers: list[LayerState] = field(default_factory=list)
    seen_tokens: int = 0

    # what transformers' generate asks of a cache
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    # what the model asks of a cache; decoding.py answers in other ways
    def step(self, model: Any, input_ids: Tensor) -> Tensor | None:
        """Logits [B, 1, V] after one more token [B, 1], the state updated; None: the model computes them."""
        return None

    def stored(self, index: int, state: LayerState) -> LayerState:
        """What holds layer `index`'s new state from now on."""
        return state

    def replace(self, layers: list[LayerState]) -> None:
        """The states of all layers after a forward or a reordering."""
        self.layers = layers

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def detach(self) -> "RecurrentCache":
        """The same state, cut off from the graph that made it."""
        return self._mapped(Tensor.detach)

    def copy(self) -> "RecurrentCache":
        """A second cache of the same tensors, to continue one prompt in two ways."""
        return self._mapped(lambda tensor: tensor)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "RecurrentCache":
        layers = [{name: change(tensor) for name, tensor in layer.items()} for layer in self.layers]
        return RecurrentCache(layers, self.seen_tokens)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.replace(self._mapped(change).layers)


@dataclass(frozen=True)
class Packing:
    """Rows of a batch laid end to end in one row of N sequences, so that a mixer sees tokens and no padding.

    With padding every row is one sequence of its real tokens, wherever the padding is. With documents
    (`cu_seqlens`) a row holds several sequences: its first one goes on from the row's carried state, its last
    one leaves the state that is carried on.

    Attributes:
        cu_seqlens: [N + 1], where the sequences begin and end.
        rows: rows that hold a token at all; `first`, `last`: their first and last sequence.
        batch: number of rows B.
        tokens: indices [total] of the kept tokens among B * T, or None when all are kept.
    """

    cu_seqlens: Tensor
    rows: Tensor
    first: Tensor
    last: Tensor
    batch: int
    tokens: Tensor | None = None

    @staticmethod
    def of_documents(cu_seqlens: Tensor, batch: int, length: int) -> "Packing":
        """From offsets over all B * T tokens, row after row. The end of a row is always an offset.

        Raises:
            ValueError: the offsets do not cover the batch, or a document reaches over the end of its row.
        """
        offsets = cu_seqlens.dim() == 1 and cu_seqlens.numel() > 1 and not cu_seqlens.is_floating_point()
        ends = torch.arange(1, batch + 1, device=cu_seqlens.device) * length
        if offsets:
            last = torch.searchsorted(cu_seqlens, ends.to(cu_seqlens.dtype)) - 1
            named = cu_seqlens[(last + 1).clamp(max=len(cu_seqlens) - 1)] == ends
            # one answer, so that a GPU is waited for once
            covered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == batch * length)
            offsets = bool(covered & (cu_seqlens.diff() >= 0).all() & named.all())
        if not offsets:
            raise ValueError(
                f"cu_seqlens must be whole numbers that rise from 0 to {batch * length} (batch {batch} x "
                f"length {length}) and name the end of every row; got {cu_seqlens.tolist()[:16]}"
            )
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        return Packing(cu_seqlens, torch.arange(batch, device=cu_seqlens.device), first, last, batch)

    @staticmethod
    def of_mask(mask: Tensor) -> "Packing":
        """From an attention mask [B, T]: 1 for a token, 0 for padding. It may hold no token at all."""
        kept = mask.bool()
        lengths = kept.sum(1)
        rows = lengths.nonzero().flatten()
        cu_seqlens = F.pad(lengths[rows].cumsum(0), (1, 0)).to(torch.int32)
        order = torch.arange(len(rows), device=mask.device)
        return Packing(cu_seqlens, rows, order, order, len(mask), kept.flatten().nonzero().flatten())

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, total, ...]"""
        flat = x.flatten(0, 1)
        return (flat if self.tokens is None else flat[self.tokens]).unsqueeze(0)

    def unpack(self, x: Tensor, length: int) -> Tensor:
        """[1, total, ...] -> [B, T, ...], zero at padding."""
        if self.tokens is None:
            return x.squeeze(0).unflatten(0, (self.batch, length))
        flat = x.new_zeros(self.batch * length, *x.shape[2:])
        return flat.index_copy(0, self.tokens, x.squeeze(0)).unflatten(0, (self.batch, length))

    def states_in(self, carried: LayerState | None) -> LayerState | None:
        """The rows' carried states [B, ...] as the sequences' initial states [N, ...]."""
        if carried is None:
            return None
        sequences = self.cu_seqlens.numel() - 1
        return {
            name: state.new_zeros(sequences, *state.shape[1:]).index_copy(0, self.first, state[self.rows])
            for name, state in carried.items()
        }

    def states_out(self, final: LayerState, carried: LayerState | None) -> LayerState:
        """The sequences' final states [N, ...] as the rows' [B, ...]; a row without a token keeps its own."""
        result = {}
        for name, state in final.items():
            before = state.new_zeros(self.batch, *state.shape[1:]) if carried is None else carried[name]
            result[name] = before.index_copy(0, self.rows, state[self.last].to(before.dtype))
        return result

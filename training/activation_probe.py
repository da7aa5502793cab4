"""What keeping or recomputing a layer's activations costs, measured on the GPU at hand, and the best choice.

One block of every shape in the model runs forward and backward on a few thousand tokens at each level of
recomputation. Memory and time grow linearly with tokens from there, so that the fastest assignment of levels
to layers that fits into the memory follows by filling it greedily, best gain a byte first.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from models.config import LanguageModelConfig
from models.trunk import Block

PROBE_TOKENS = 32768
WARM_UP_ROUNDS = 3
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class LevelCost:
    """Cost of one layer at one level of recomputation, a token unless it says otherwise."""

    level: str
    kept: float  # bytes that stay from forward to backward, the incoming residual stream if it is one of them
    working: float  # bytes that its backward pass takes on top, at the peak, without gradients of weights
    seconds: float  # forward and backward
    gradients: int = 0  # bytes of its weights' gradients, for any number of tokens


def probe_layers(
    config: LanguageModelConfig, block_class: type[Block], device: torch.device, autocast: bool
) -> list[list[LevelCost]]:
    """The costs of every layer at each of its levels; layers of one shape share one measurement.

    Args:
        config: of the model; a block is built from it for each distinct entry of `config.layers`.
        block_class: the family's block.
        device: a CUDA device.
        autocast: whether training runs under bf16 autocast.
    """
    measured: dict[str, list[LevelCost]] = {}
    result = []
    for index, shape in enumerate(config.layers):
        key = json.dumps(shape, sort_keys=True)
        if key not in measured:
            block = block_class(config, index).to(device)
            _fill(block)
            measured[key] = _probe(block, config, autocast)
        result.append(measured[key])
    return result


def assign_levels(
    layers: Sequence[Sequence[LevelCost]], tokens: int, budget: float, *, late_gradients: bool = False
) -> list[str]:
    """One level a layer: the least total time found within `budget` bytes, by best gain a byte.

    Memory that no measured gain asks for still goes to less recomputation: where a busy machine made that
    look slow, it is what should have been chosen.

    Args:
        layers: the costs of every layer at each level, least recomputed first, from `probe_layers`.
        tokens: tokens of a micro-batch.
        budget: bytes that activations may take: at each layer's backward pass, what the layers up to it keep
            and what the pass takes on top.
        late_gradients: the budget also holds the weights' gradients, which come as activations go.

    Returns:
        Levels by name; the leanest ones where even these exceed the budget.
    """

    def peak(chosen: Sequence[LevelCost]) -> float:
        return _peak(chosen, tokens, late_gradients)

    chosen = _leanest(layers)
    measured = _spend(chosen, layers, peak, budget, lambda costs, now, new: new.seconds < now.seconds)
    spent = _spend(measured, layers, peak, budget, _surely_less)
    return [cost.level for cost in spent]


def _leanest(layers: Sequence[Sequence[LevelCost]]) -> list[LevelCost]:
    return [min(costs, key=lambda cost: cost.kept) for costs in layers]


def least_bytes(layers: Sequence[Sequence[LevelCost]], tokens: int, *, late_gradients: bool = False) -> float:
    """What activations take where every layer keeps as little as it can; as `assign_levels` counts it."""
    return _peak(_leanest(layers), tokens, late_gradients)


def _surely_less(costs: Sequence[LevelCost], now: LevelCost, new: LevelCost) -> bool:
    """Whether one level recomputes part of what the other does, for any family: all does, or nothing."""
    return new is not now and (new is costs[0] or now is costs[-1])


def _spend(
    chosen: Sequence[LevelCost],
    layers: Sequence[Sequence[LevelCost]],
    peak: Callable[[Sequence[LevelCost]], float],
    budget: float,
    better: Callable[[Sequence[LevelCost], LevelCost, LevelCost], bool],
) -> list[LevelCost]:
    """Changes one layer after another to a better level that fits, the most seconds a kept byte first."""
    chosen = list(chosen)
    while True:
        upgrades = [
            ((now.seconds - cost.seconds) / max(cost.kept - now.kept, 1e-9), index, cost)
            for index, now in enumerate(chosen)
            for cost in layers[index]
            if better(layers[index], now, cost)
            and peak([*chosen[:index], cost, *chosen[index + 1 :]]) <= budget
        ]
        if not upgrades:
            return chosen
        _, index, cost = max(upgrades, key=lambda upgrade: upgrade[0])
        chosen[index] = cost


def _peak(chosen: Sequence[LevelCost], tokens: int, late_gradients: bool) -> float:
    """Bytes at the fullest moment of the backward pass.

    When it reaches a layer, those behind it keep nothing any more; the gradients of their weights have come.
    """
    kept = accumulate(cost.kept for cost in chosen)
    gradients = [cost.gradients if late_gradients else 0 for cost in chosen]
    made = reversed(list(accumulate(reversed(gradients))))
    return max(tokens * (k + cost.working) + g for k, cost, g in zip(kept, chosen, made, strict=True))


@torch.no_grad()
def _fill(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.normal_(std=0.02)


def _probe(block: Block, config: LanguageModelConfig, autocast: bool) -> list[LevelCost]:
    """The costs of each level, least recomputed first; the fastest of several rounds.

    The levels take turns, so that what disturbs the machine for a moment does not fall on one of them alone.
    """
    stream = torch.bfloat16 if autocast and not config.residual_in_fp32 else torch.float32
    block.owns_stream = True  # as in the middle of a model
    rounds: dict[str, list[LevelCost]] = {level: [] for level in block.recompute_levels}
    for _ in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        for level, costs in rounds.items():
            block.recompute = level
            costs.append(_measure(block, level, config.hidden_size, stream, autocast))
    # early rounds compile kernels and grow the allocator's segments
    return [min(costs[WARM_UP_ROUNDS:], key=lambda cost: cost.seconds) for costs in rounds.values()]


def _measure(block: Block, level: str, width: int, stream: torch.dtype, autocast: bool) -> LevelCost:
    device = next(block.parameters()).device
    block.zero_grad(set_to_none=True)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    origin = torch.zeros((), device=device, dtype=stream, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    # no leaf, and in no variable but the block's: it is freed unless the block keeps it
    inputs = [torch.randn(1, PROBE_TOKENS, width, device=device, dtype=stream) + origin]
    start.record()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        y, _ = block(inputs.pop())
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    gradient = torch.ones_like(y)
    torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated()
    y.backward(gradient)
    end.record()
    torch.cuda.synchronize()
    weights = sum(p.grad.numel() * p.grad.element_size() for p in block.parameters() if p.grad is not None)
    working = torch.cuda.max_memory_allocated() - loaded - weights
    seconds = start.elapsed_time(end) / 1e3
    per_token = kept / PROBE_TOKENS, max(working, 0) / PROBE_TOKENS, seconds / PROBE_TOKENS
    return LevelCost(level, *per_token, gradients=weights)

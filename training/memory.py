"""How much memory a run needs, estimated from shapes alone; rough by intent."""

from dataclasses import dataclass
from typing import Any

from models.report import LayerReport, StateReport
from models.trunk import GROUP, group_size
from training.config import RunConfig
from training.rules import accumulation

_CHUNK_TOKENS = 256  # between two states that the backward pass of a layer holds

# what a mixer keeps a token at each level, in widths of the residual stream: projections, gates, outputs.
# Within 10 % of what the 1.3B layers kept on a GPU; whole estimates stay above the measured peaks
_MIXER_WIDTHS = {
    "statex_gla": {"none": 5.5, "scan": 4.5, "mlp": 4.5, "mixer": 1.0, "full": 1.0},  # the MLP's stream too
    "statex_mamba2": {"none": 8.5, "conv": 6.5, "scan": 4.5},
}
_OTHER_WIDTHS = {"none": 8.0, "conv": 6.0, "scan": 4.0, "mlp": 8.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU (or process)."""

    weights_and_optimizer: int
    saved_activations: int  # kept from forward to backward
    working: int  # the largest layer's own backward pass

    @property
    def total(self) -> int:
        return self.weights_and_optimizer + self.saved_activations + self.working


def estimate_memory(
    report: StateReport, model_config: Any, config: RunConfig, world_size: int, levels: list[str]
) -> MemoryEstimate:
    """Estimate for one GPU.

    Args:
        levels: per layer, what it recomputes.
    """
    tokens = config.max_len * config.batch_size
    saved = tokens * kept_bytes(model_config, config, levels)
    working = max(
        tokens * _saved_bytes(model_config, "none", config) + _state_bytes(layer, tokens)
        for layer in report.layers
    )
    working += head_bytes(model_config, config)
    grouped = GROUP in levels
    if grouped:  # the stream of a group that runs again, and its gradient
        working += 2 * tokens * _stream_bytes(model_config, config)
    weights = optimizer_bytes(report.total_parameters, config, world_size, late_peak=grouped)
    return MemoryEstimate(weights, saved, working)


def kept_bytes(model_config: Any, config: RunConfig, levels: list[str]) -> int:
    """Bytes a token that stay from forward to backward; of groups the most that is held at once, that is the
    streams in front of them and what the layers of one keep."""
    if GROUP not in levels:
        return sum(_saved_bytes(model_config, level, config) for level in levels)
    size = group_size(len(levels))
    streams = -(-len(levels) // size) * _stream_bytes(model_config, config)
    return streams + size * _saved_bytes(model_config, "full", config)


def _stream_bytes(model_config: Any, config: RunConfig) -> int:
    width = 4 if config.dtype != "bf16" or model_config.residual_in_fp32 else 2
    return width * model_config.hidden_size


def head_bytes(model_config: Any, config: RunConfig) -> int:
    """The last hidden states and their gradient; logits are made in chunks (0.5 GB)."""
    return 2 * 4 * config.max_len * config.batch_size * model_config.hidden_size + 2**29


def optimizer_bytes(parameters: int, config: RunConfig, world_size: int, *, late_peak: bool = False) -> int:
    """fp32 weights, gradients and AdamW's moments of one rank.

    ZeRO-1 and 2 hold their own flat master copy of a rank's share besides the weights; ZeRO-2 frees gradients
    of other shares as they come; ZeRO-3 shares out everything. The reduction buckets add 0.4 GB each way.
    Gradients that come late are left out, unless so little is kept that the peak comes late too.
    """
    share = parameters / world_size
    buckets = 2 * 4 * 2e8
    per_kind = {
        "zero1": 8 * parameters + 16 * share + buckets,
        "zero2": 4 * parameters + 20 * share + buckets,
        "zero3": 20 * share + 2 * buckets,
    }
    late = gradients_come_late(config, world_size) and not late_peak
    return int(per_kind.get(config.launch, (12 if late else 16) * parameters))


def gradients_come_late(config: RunConfig, world_size: int) -> bool:
    """Whether gradients are made in the backward pass, as activations go, and gone again before the next.

    True of a single process without accumulation; all others hold gradients or room for them all the time.
    """
    deepspeed = config.launch.startswith("zero")
    return not deepspeed and world_size == 1 and accumulation(config, 1) == 1


def _saved_bytes(model_config: Any, level: str, config: RunConfig) -> int:
    """Bytes a token that one layer keeps: the normed stream, and what it does not recompute."""
    width = 2 if config.dtype == "bf16" else 4
    mixer = _MIXER_WIDTHS.get(model_config.model_type, _OTHER_WIDTHS).get(level, 0)
    values = (1 + mixer) * model_config.hidden_size
    if level not in ("mlp", "full"):
        values += 2 * (getattr(model_config, "intermediate_size", None) or 0)
    return int(width * values)


def _state_bytes(layer: LayerReport, tokens: int) -> int:
    # states at chunk borders and their gradients, both in fp32
    return 2 * 4 * layer.state_elements * (tokens // _CHUNK_TOKENS)

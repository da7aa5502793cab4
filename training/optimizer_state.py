"""AdamW's moments by parameter name, whole and in fp32, whatever the launch kind.

A checkpoint written by two ranks of ZeRO-1 is therefore read by one process, by eight, or by
DistributedDataParallel. ZeRO keeps each rank's share in flat buffers; whole tensors are assembled and taken
apart one parameter at a time.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from training.config import RunError
from training.distribution import Distribution

MOMENTS = ("exp_avg", "exp_avg_sq")
_SHARD_BYTES = 4 * 2**30  # bounds the host memory that writing needs


def save_optimizer_state(
    distribution: Distribution, folder: Path, updates: int, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write `optimizer-00000.safetensors`, ...: `{parameter}.exp_avg`, `{parameter}.exp_avg_sq`.

    `updates` is the number of updates that AdamW has made; before the first there is nothing to save.
    Collective: every rank must call it; rank 0 writes. A failure to write is raised only after every
    parameter was gathered, so that no other rank waits for ever.
    """
    shard: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    number = 0
    for key, value in _moments(distribution) if updates else ():
        if not distribution.is_main or failure:
            continue
        shard[key] = value.detach().to("cpu", copy=True)
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            failure = _write_shard(shard, folder, number)
            shard, number = {}, number + 1
    if distribution.is_main and not failure:
        failure = _write_shard(shard, folder, number)
    if failure:
        raise failure


def load_optimizer_state(distribution: Distribution, folder: Path, updates: int) -> None:
    """Put saved moments back; `updates` is the number of updates that AdamW has made.

    Raises:
        RunError: the checkpoint lacks the moments of a parameter that trains now.
    """
    if updates == 0:
        return
    files = _index(folder)
    if distribution.uses_deepspeed:
        _create_flat_state(distribution, updates)
    for name, parameter in _trainable(distribution):
        missing = [moment for moment in MOMENTS if f"{name}.{moment}" not in files]
        if missing:
            raise RunError(
                f"{folder}: no optimizer state for {name}; was it frozen when this was written? Start a new"
                " run from the checkpoint's weights with ckpt_path instead"
            )
        values = {moment: _read(files[f"{name}.{moment}"], f"{name}.{moment}") for moment in MOMENTS}
        _set_moments(distribution, parameter, values, updates)


def _trainable(distribution: Distribution) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in distribution.model.named_parameters() if p.requires_grad)


def _moments(distribution: Distribution) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole moments, one after another; none before the first update. Collective under ZeRO."""
    if distribution.uses_deepspeed:
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_moments(distribution)
    for name, parameter in _trainable(distribution):
        for moment in MOMENTS:
            if distribution.uses_deepspeed:
                yield f"{name}.{moment}", safe_get_full_optimizer_state(parameter, moment)
            else:
                yield f"{name}.{moment}", distribution.optimizer.state[parameter][moment]


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, number: int) -> Exception | None:
    try:
        save_file(shard, folder / f"optimizer-{number:05d}.safetensors")
    except Exception as error:  # safetensors wraps a full disk in an error type of its own
        return error
    return None


def _index(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            files.update(dict.fromkeys(reader.keys(), path))
    return files


def _read(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as reader:
        return reader.get_tensor(key)


def _set_moments(
    distribution: Distribution, parameter: torch.nn.Parameter, values: dict[str, torch.Tensor], updates: int
) -> None:
    if not distribution.uses_deepspeed:
        state = {moment: value.to(parameter.device) for moment, value in values.items()}
        distribution.optimizer.state[parameter] = {"step": _step_tensor(parameter, updates), **state}
        return
    for moment, value in values.items():
        if hasattr(parameter, "ds_id"):
            _set_stage3(distribution, parameter, value, moment)
        else:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value.to(distribution.device), moment)


def _set_stage3(
    distribution: Distribution, parameter: torch.nn.Parameter, value: torch.Tensor, moment: str
) -> None:
    # DeepSpeed's own setter cannot cut a tensor whose size the number of ranks does not divide
    share, _ = distribution.engine.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
    start = min(share.numel() * distribution.rank, value.numel())
    mine = value.flatten()[start : start + share.numel()]
    share[: mine.numel()].copy_(mine)


def _create_flat_state(distribution: Distribution, updates: int) -> None:
    """AdamW's state of ZeRO's flat buffers, which DeepSpeed would create only at the first update."""
    zero = distribution.engine.optimizer
    stage3 = distribution.engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        zero.optimizer.state[flat] = {"step": _step_tensor(flat, updates), **moments}
    _link_moments(distribution)


def _link_moments(distribution: Distribution) -> None:
    # DeepSpeed links parameters to their moments after the first group's update, before the second has any
    zero = distribution.engine.optimizer
    if distribution.engine.zero_optimization_stage() < 3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _step_tensor(parameter: torch.Tensor, updates: int) -> torch.Tensor:
    # fused AdamW counts on the device, the plain one on the host
    device = parameter.device if parameter.device.type == "cuda" else "cpu"
    return torch.tensor(float(updates), dtype=torch.float32, device=device)

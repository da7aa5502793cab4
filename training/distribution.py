"""One process or many: accelerate with DeepSpeed ZeRO, DistributedDataParallel, or a plain process.

`Distribution` hides what differs: how a model is wrapped, when gradients travel, how they are clipped and
applied. Gradients are sums over ranks divided by the world size everywhere, so the loop scales its loss in
one way.
"""

import json
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.config import REPOSITORY, ConfigError, RunConfig
from training.optimizer import clip_coefficient
from training.rules import accumulation, cpu_rehearsal

LAUNCH_FOLDER = REPOSITORY / "configs" / "launch"


@dataclass
class Distribution:
    """This process among its peers, and the wrapped model once `prepare` has run."""

    config: RunConfig
    accelerator: Any
    rank: int
    world_size: int
    device: torch.device
    model: Any = None
    engine: Any = None  # what computes: DeepSpeed's engine, DistributedDataParallel, or the model itself
    optimizer: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def uses_deepspeed(self) -> bool:
        return self.config.launch.startswith("zero")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimiser for this launch kind."""
        self.model = model
        self.engine, prepared = self.accelerator.prepare(model, optimizer)
        self.optimizer = prepared.optimizer
        if self.uses_deepspeed:
            _check_engine(self.engine, self.config)

    def describe(self) -> str:
        """What came up, read from the parts themselves: collective, the processes that answer are counted."""
        stage = f" ZeRO-{self.engine.zero_optimization_stage()}" if self.uses_deepspeed else ""
        engine = type(self.engine).__name__ + stage
        places = self.gather_objects(_place(self.device))
        names = Counter(name for *_, name in set(places))  # ranks that share a device count once
        devices = " and ".join(f"{count} x {name}" for name, count in names.items())
        backend = dist.get_backend() if dist.is_initialized() else "no group"
        kind = self.accelerator.distributed_type.value
        return f"{kind}, {engine}, {len(places)} process(es) through {backend}, {devices}"

    def autocast(self) -> AbstractContextManager:
        """bf16 compute over fp32 parameters; DeepSpeed's engine enters its own."""
        if self.uses_deepspeed:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients travel only with the last one of a step."""
        if self.uses_deepspeed:
            self.engine.set_gradient_accumulation_boundary(is_boundary=last)
            yield
        elif last or self.world_size == 1:
            yield
        else:
            with self.engine.no_sync():
                yield

    def backward(self, loss: torch.Tensor) -> None:
        if self.uses_deepspeed:
            self.engine.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def update(self) -> tuple[float, bool]:
        """Clip, apply and clear the gradients of a step.

        Returns:
            global gradient norm before clipping, and whether the parameters moved: not when the norm is not
            finite. Both are the same on all ranks. Reading the norm is the one time a step that the host
            waits for the device.
        """
        if self.uses_deepspeed:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return float("nan") if norm is None else float(norm), not self.engine.optimizer.overflow
        gradients = [p.grad for p in self.engine.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        moved = math.isfinite(value)
        if moved:
            if self.config.grad_clip > 0:
                torch._foreach_mul_(gradients, clip_coefficient(norm, self.config.grad_clip))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, moved

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """One small object of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group; gloo's ends with the process.

        gloo's thread may still want Python's lock to release the last operation's tensors, and destroying the
        group waits for that thread while holding the lock: now and then for ever.
        """
        if dist.is_initialized() and dist.get_backend() != "gloo":
            dist.destroy_process_group()


def start_distribution(config: RunConfig) -> Distribution:
    """Join the processes that the launcher started, and check that what came up is what was asked for.

    Raises:
        ConfigError: no GPU for a GPU launch kind, or not the number of processes asked for.
    """
    # activations of many sizes come and go: segments that grow leave no gaps (read when CUDA is first used)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if (config.n_gpus and world_size not in (1, config.n_gpus)) or (config.n_gpus or 1) > world_size:
        raise ConfigError(
            f"n_gpus={config.n_gpus}: {world_size} process(es) started; use the scripts, or"
            f" accelerate launch --config_file configs/launch/{config.launch}.yaml"
            f" --num_processes {config.n_gpus}"
        )
    if config.launch != "cpu" and not torch.cuda.is_available() and not cpu_rehearsal():
        raise ConfigError(f"launch={config.launch}: no GPU is visible; launch=cpu trains on the CPU")
    if config.launch.startswith("zero") and "LOCAL_RANK" not in os.environ:
        _be_a_group_of_one()
    accelerator = _build_accelerator(config, accumulation(config, world_size))
    _check_started(config, accelerator, world_size)
    return Distribution(
        config, accelerator, accelerator.process_index, accelerator.num_processes, accelerator.device
    )


def _place(device: torch.device) -> tuple[str, str, str]:
    """Machine, device on it, and the device's name."""
    if device.type != "cuda":
        return socket.gethostname(), "", device.type
    properties = torch.cuda.get_device_properties(device)
    return socket.gethostname(), str(getattr(properties, "uuid", device)), properties.name


def _be_a_group_of_one() -> None:
    """What a launcher would set, without which accelerate does not start DeepSpeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _build_accelerator(config: RunConfig, rounds: int) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # autocast is entered here, not by the launcher's file
    if config.launch.startswith("zero"):
        if cpu_rehearsal():
            _answer_gloo()
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, rounds))
        # zero.Init would need the weights to be built inside it; every rank holds the whole model once
        # instead
        plugin.zero3_init_flag = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        return Accelerator(mixed_precision="no", deepspeed_plugin=plugin, gradient_accumulation_steps=rounds)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    if config.launch == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers imports DeepSpeed, which else warns of no GPU
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", cpu=config.launch == "cpu", kwargs_handlers=[ddp])


def _check_started(config: RunConfig, accelerator: Any, world_size: int) -> None:
    from accelerate.utils import DistributedType

    # accelerate falls back to one process without a word where it does not know the machine
    if accelerator.num_processes != world_size:
        raise ConfigError(
            f"launch={config.launch}: accelerate sees {accelerator.num_processes} process(es) where"
            f" {world_size} started; the ranks would train apart"
        )
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if is_deepspeed != config.launch.startswith("zero"):
        raise ConfigError(
            f"launch={config.launch}: accelerate came up as {accelerator.distributed_type.value}; start it"
            f" through accelerate launch --config_file configs/launch/{config.launch}.yaml"
        )


def deepspeed_config(config: RunConfig, rounds: int) -> dict[str, Any]:
    """The launch kind's JSON with this run's numbers filled in."""
    values = json.loads((LAUNCH_FOLDER / f"{config.launch}.json").read_text(encoding="utf-8"))
    values["train_micro_batch_size_per_gpu"] = config.batch_size
    values["gradient_accumulation_steps"] = rounds
    values["gradient_clipping"] = config.grad_clip
    autocast = {"enabled": config.dtype == "bf16", "dtype": "bfloat16"}
    if config.grad_comm_dtype == "fp32":
        autocast["lower_precision_safe_modules"] = []  # the modules whose gradients would travel in bf16
    values["torch_autocast"] = autocast
    return values


def _check_engine(engine: Any, config: RunConfig) -> None:
    # DeepSpeed's bf16 setting would round A_log, dt_bias and the norms; torch_autocast must keep every
    # parameter fp32
    dtypes = {parameter.dtype for parameter in engine.module.parameters()}
    assert dtypes == {torch.float32}, f"DeepSpeed changed the parameters' type to {dtypes}"
    assert engine.torch_autocast_enabled() == (config.dtype == "bf16")
    assert engine.zero_optimization_stage() == int(config.launch[-1])


def _answer_gloo() -> None:
    """accelerate knows no CPU backend for DeepSpeed and would believe in one process."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)

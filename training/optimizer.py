"""AdamW in fp32, with weight decay on matrices only."""

import torch
from torch import nn

from training.config import RunConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to norms, biases, A_log, dt_bias, D."""
    return parameter.ndim >= 2 and not name.endswith((".bias", "A_log", "dt_bias", ".D"))


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused on CUDA. The learning rate is set at every step.

    Raises:
        ValueError: no parameter is trainable, or one is not fp32 (the master copy would be lost).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("no parameter is trainable; freeze_rest needs at least one expanded layer")
    low = [name for name, parameter in named if parameter.dtype != torch.float32]
    if low:
        raise ValueError(
            f"parameters must be fp32 for training, but {low[0]} and {len(low) - 1} more are not"
        )
    matrices = [parameter for name, parameter in named if decays(name, parameter)]
    vectors = [parameter for name, parameter in named if not decays(name, parameter)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_cuda = named[0][1].device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=on_cuda
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_coefficient(norm: torch.Tensor, grad_clip: float) -> torch.Tensor:
    """Factor that brings a global gradient norm to at most `grad_clip`; 1 below it."""
    return (grad_clip / (norm + 1e-6)).clamp(max=1.0)

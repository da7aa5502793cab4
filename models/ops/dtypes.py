"""In which dtype operators compute."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else x's own; float64 stays, as in torch."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def scan_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What states and decays are kept in: float64 where any tensor has it, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32

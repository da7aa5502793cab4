"""Random weights drawn on the model's device; `model.initialize` draws the same everywhere, but slowly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.draw import Draw
from models.language_model import LanguageModel


class DeviceDraw(Draw):
    """Draws from a generator of the device, in fp32."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    @staticmethod
    def _filled(shape: Sequence[int], like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        return fill(torch.empty(tuple(shape), dtype=torch.float32, device=like.device)).to(like.dtype)


@torch.no_grad()
def draw_weights(model: LanguageModel, device: str | torch.device, seed: int = 0) -> LanguageModel:
    """A model built on `meta`, on the device and with weights as at the start of training."""
    model = model.to_empty(device=device)
    draw = DeviceDraw(seed, torch.device(device))
    for module in model.modules():
        model.initialize_module(module, draw)
    model.tie_weights()
    return model

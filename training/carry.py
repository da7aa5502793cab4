"""state_passing: every micro-batch of a step begins with the state its slots' streams left a step before.

A slot is one contiguous stream of tokens (see data), and the i-th micro-batch of a step always holds the same
slots, so a rank keeps one detached cache a micro-batch. Files are keyed by slot: another number of ranks
finds its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.cache import RecurrentCache
from training.config import RunError


class CarriedStates:
    """The caches of this rank's slots, by micro-batch.

    Args:
        groups: slots of each micro-batch of a step, in order.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = [tuple(group) for group in groups]
        self._caches: dict[tuple[int, ...], RecurrentCache] = {}
        self._pending: dict[tuple[int, ...], RecurrentCache] = {}

    def before(self, slots: Sequence[int]) -> RecurrentCache:
        """State in front of a micro-batch, to be handed to the model; empty on the first step."""
        cache = self._caches.get(tuple(slots))
        return RecurrentCache() if cache is None else cache.copy()

    def after(
        self, slots: Sequence[int], cache: RecurrentCache, inside: Sequence[bool] | None = None
    ) -> None:
        """Keep what the model left behind.

        Args:
            inside: rows that stopped inside a document; with documents isolated, the others go on from zero.
        """
        cache = cache.detach()
        if inside is not None and not all(inside):
            cache = _masked(cache, torch.tensor(inside))
        self._pending[tuple(slots)] = cache

    def end_step(self, keep: bool) -> None:
        """Make the states of this step the next one's; not those of a step that was not finite."""
        if keep:
            self._caches.update(self._pending)
        self._pending = {}

    def save(self, path: Path) -> None:
        """One tensor a slot, layer and name: `{slot}.{layer}.{name}`."""
        tensors = {}
        for slots, cache in self._caches.items():
            for index, layer in enumerate(cache.layers):
                for name, tensor in layer.items():
                    for row, slot in enumerate(slots):
                        tensors[f"{slot}.{index}.{name}"] = tensor[row].to("cpu", copy=True).contiguous()
        save_file(tensors, path)

    def load(self, folder: Path, device: torch.device) -> None:
        """Read this rank's slots from the files that all ranks of the saving run wrote.

        Raises:
            RunError: a slot's state is in none of them.
        """
        files = {}
        for path in sorted(folder.glob("carried-*.safetensors")):
            with safe_open(path, framework="pt") as reader:
                files.update(dict.fromkeys(reader.keys(), path))
        for slots in self._groups if files else ():
            self._caches[slots] = RecurrentCache(_read_layers(files, slots, folder, device))


def _read_layers(
    files: dict[str, Path], slots: tuple[int, ...], folder: Path, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    names = defaultdict(list)
    for key in files:
        slot, layer, name = key.split(".")
        if int(slot) == slots[0]:
            names[int(layer)].append(name)
    if not names:
        raise RunError(f"{folder}: no carried state for slot {slots[0]}; was state_passing off before?")
    return [
        {
            name: torch.stack([_read(files, f"{slot}.{layer}.{name}") for slot in slots]).to(device)
            for name in names[layer]
        }
        for layer in sorted(names)
    ]


def _read(files: dict[str, Path], key: str) -> torch.Tensor:
    with safe_open(files[key], framework="pt") as reader:
        return reader.get_tensor(key)


def _masked(cache: RecurrentCache, keep: torch.Tensor) -> RecurrentCache:
    def zero_fresh(tensor: torch.Tensor) -> torch.Tensor:
        shape = (-1,) + (1,) * (tensor.ndim - 1)
        return tensor * keep.to(tensor.device, tensor.dtype).reshape(shape)

    layers = [{name: zero_fresh(tensor) for name, tensor in layer.items()} for layer in cache.layers]
    return RecurrentCache(layers, cache.seen_tokens)

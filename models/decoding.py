"""Decoding through CUDA graphs: a token costs the host one launch instead of one a kernel.

A decoding step of a 1.3B model is about a thousand small kernels, and launching them from Python takes ten
times as long as running them. The step of a linear RNN has fixed shapes, whatever was read before it. So it
is captured once for a batch size, on tensors that stay where they are, and replayed for every token:

    decoder = GraphedDecoder(model)
    cache = decoder.start()                                       # or start(cache) after a prefill
    model(prompt, past_key_values=cache, logits_to_keep=1)        # the prompt, in as many pieces as wanted
    model(token, past_key_values=cache).logits                    # one token [B, 1]: a replay

What `start` returns is a RecurrentCache, so `model.generate(ids, past_key_values=decoder.start())` and every
other loop around `forward` decode through the graph without knowing of it.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .cache import LayerState, RecurrentCache
from .language_model import LanguageModel
from .ops.step import states_in_place

SWITCH = "STATEX_CUDA_GRAPHS"
WARM_UP_STEPS = 3  # before a capture, on a side stream: kernels are compiled and libraries set up
KEPT_SLOTS = 2  # batch sizes that keep their storage and graph: a task's batches, and its last, smaller one

Layout = tuple[tuple[str, tuple[int, ...], torch.dtype, torch.device], ...]
Place = tuple[int, torch.dtype]


class GraphedDecoder:
    """Decoding steps of one model, one fixed storage and one CUDA graph a batch size.

    A graph reads the weights where they were when it was captured. Values written into them (an optimiser's
    step, `load_state_dict`) are seen by the next replay. Weights that lie elsewhere or have another type
    (`model.to`, `param.data = ...`) are noticed at each step, exchanged modules (`expand_state`) whenever a
    state enters the storage, and autocast switched on or off at each step; the step is then captured anew.
    Not noticed: attributes of modules that change what forward computes, such as `clamp_min` or a hook, and
    STATEX_BACKEND; call `close()` after such a change. Hooks inside the model run at the capture only.

    Without graphs the same steps run eagerly on the same storage: on a CPU, with weights on several devices,
    with `graphs=False` or STATEX_CUDA_GRAPHS=0.

    Args:
        model: in evaluation mode or not, steps are computed without gradients.
        graphs: None: on where all weights are on one CUDA device and STATEX_CUDA_GRAPHS is not 0.

    Raises:
        ValueError: graphs=True where there can be none, or STATEX_CUDA_GRAPHS neither 0 nor 1.
    """

    def __init__(self, model: LanguageModel, graphs: bool | None = None) -> None:
        self.model = model
        self._asked = graphs
        self._slots: OrderedDict[Layout, _Slot] = OrderedDict()  # the least recently used one first
        if graphs and not self.uses_graphs:
            raise ValueError("graphs=True: CUDA graphs need all weights on one CUDA device; use graphs=None")
        _allowed()

    @property
    def uses_graphs(self) -> bool:
        if self._asked is False or (self._asked is None and not _allowed()):
            return False
        devices = {weight.device for weight in _weights(self.model)}
        return len(devices) == 1 and next(iter(devices)).type == "cuda"

    def start(self, cache: RecurrentCache | None = None) -> "DecodingCache":
        """A cache that goes on from `cache`, which stays as it is, or from nothing, and decodes fast."""
        if cache is None:
            return DecodingCache(self, [], 0)
        state = cache.copy()
        return DecodingCache(self, state.layers, state.seen_tokens)

    def close(self) -> None:
        """Frees graphs and storage. States in use are kept; the next step captures anew."""
        while self._slots:
            self._slots.popitem()[1].release()

    def step(self, cache: "DecodingCache", tokens: Tensor) -> Tensor:
        """Logits [B, 1, V] after tokens [B, 1]; used by `DecodingCache.step`."""
        slot = cache.slot or self._enter(cache)
        slot.tokens.copy_(tokens)
        if not slot.graphed:
            return self._advance(slot)
        if not slot.is_current():
            self._capture(slot)
        slot.graph.replay()
        return slot.logits.clone()

    def _enter(self, cache: "DecodingCache") -> "_Slot":
        """Moves a cache's state into fixed storage."""
        layout = _layout(cache.layers)
        slot = self._slots.pop(layout, None)
        if slot is None:
            while len(self._slots) >= KEPT_SLOTS:
                self._slots.popitem(last=False)[1].release()
            slot = _Slot(cache.layers)
        slot.take(cache)
        slot.graphed = self.uses_graphs
        if not slot.graphed or not slot.captured_from(self.model):
            slot.forget_graph()
        self._slots[layout] = slot
        return slot

    def _advance(self, slot: "_Slot") -> Tensor:
        with states_in_place():
            return self._forward(slot.tokens, slot.cache)

    def _forward(self, tokens: Tensor, cache: RecurrentCache) -> Tensor:
        # forward itself: hooks have run around the call that led here
        with torch.no_grad(), _autocast_without_cache(tokens.device.type):
            output = self.model.forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits

    def _capture(self, slot: "_Slot") -> None:
        """Captures one step on the slot's storage, whose state does not change by it.

        Raises:
            RuntimeError: an operation of the step cannot be captured.
            torch.OutOfMemoryError: the capture does not fit the memory.
        """
        slot.forget_graph()
        device = slot.tokens.device
        graph = torch.cuda.CUDAGraph()
        try:
            # the outer stream context restores the stream when a capture fails half-way
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                side = _side_stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP_STEPS):  # a plain cache never writes into the tensors it was given
                        self._forward(slot.tokens, slot.cache.copy())
                torch.cuda.current_stream(device).wait_stream(side)
                # thread_local: threads that prepare data may go on using CUDA meanwhile
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    logits = self._advance(slot)
        except Exception as error:
            if _is_out_of_memory(error):
                raise torch.OutOfMemoryError(
                    "a decoding step's CUDA graph does not fit the memory"
                ) from error
            first = error.__context__ or error  # ending a failed capture raises a second error
            reason = (str(first).strip().splitlines() or [type(first).__name__])[0]
            raise RuntimeError(
                f"the decoding step of {type(self.model).__name__} cannot be captured as a CUDA graph "
                f"({reason}); {SWITCH}=0 decodes without graphs"
            ) from error
        slot.remember(graph, logits, self.model)


class DecodingCache(RecurrentCache):
    """A state that a `GraphedDecoder` steps on. In everything else it is a RecurrentCache.

    Several may take turns on one decoder: the one that decodes has its state in the decoder's storage, and
    gets it back as tensors of its own when another of the same batch size steps in.
    """

    def __init__(self, decoder: GraphedDecoder, layers: list[LayerState], seen_tokens: int) -> None:
        super().__init__(layers, seen_tokens)
        self.decoder = decoder
        self.slot: _Slot | None = None

    def step(self, model: Any, input_ids: Tensor) -> Tensor | None:
        if not self.layers or model is not self.decoder.model:
            return None
        return self.decoder.step(self, input_ids)

    def replace(self, layers: list[LayerState]) -> None:
        self.slot = None
        super().replace(layers)

    def leave(self) -> None:
        """Gives the storage back, keeping the state in tensors of its own."""
        if self.slot is not None:
            self.layers = self.copy().layers
            self.slot = None

    def _mapped(self, change: Any) -> RecurrentCache:
        if self.slot is None:
            return super()._mapped(change)
        return super()._mapped(lambda tensor: change(tensor.clone()))  # storage is written at the next step


class _FixedCache(RecurrentCache):
    """A cache whose tensors stay where they are: new states are copied into them, layer by layer."""

    def stored(self, index: int, state: LayerState) -> LayerState:
        own = self.layers[index]
        for name, tensor in state.items():
            if tensor is not own[name]:  # a kernel may have written into it
                own[name].copy_(tensor)
        return own


class _Slot:
    """Fixed storage for the state of one batch size, and the graph that steps on it."""

    def __init__(self, layers: list[LayerState]) -> None:
        first = next(iter(layers[0].values()))
        # ordinary tensors even where inference tensors came in: those could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            own = [
                {
                    name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    for name, tensor in layer.items()
                }
                for layer in layers
            ]
            self.tokens = torch.zeros(len(first), 1, dtype=torch.int64, device=first.device)
        self.cache = _FixedCache(own)
        self.graphed = False
        self._owner: weakref.ref[DecodingCache] | None = None
        self.forget_graph()

    def take(self, cache: DecodingCache) -> None:
        """The cache's state moves in; the one that was here before moves out."""
        self.release()
        with torch.no_grad():
            for own, layer in zip(self.cache.layers, cache.layers):
                for name, tensor in layer.items():
                    own[name].copy_(tensor)
        cache.layers, cache.slot = list(self.cache.layers), self
        self._owner = weakref.ref(cache)

    def release(self) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner.slot is self:
            owner.leave()
        self._owner = None

    # the graph

    def forget_graph(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self._weights: list[Tensor] = []
        self._places: list[Place] = []
        self._autocast: Any = None

    def remember(self, graph: torch.cuda.CUDAGraph, logits: Tensor, model: nn.Module) -> None:
        self.graph, self.logits = graph, logits
        self._weights = _weights(model)
        self._places = _places(self._weights)
        self._autocast = _autocast(self.tokens.device.type)

    def captured_from(self, model: nn.Module) -> bool:
        """Whether the model still consists of the weights it consisted of at the capture."""
        weights = _weights(model)
        return len(weights) == len(self._weights) and all(a is b for a, b in zip(weights, self._weights))

    def is_current(self) -> bool:
        """Whether there is a graph, its weights are where they were, and autocast is as it was."""
        if self.graph is None or self._autocast != _autocast(self.tokens.device.type):
            return False
        return _places(self._weights) == self._places


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # one for good: cuBLAS keeps a workspace for each stream that it ever ran on
    return torch.cuda.Stream(device)


def _allowed() -> bool:
    value = os.environ.get(SWITCH, "1").strip() or "1"
    if value not in ("0", "1"):
        raise ValueError(
            f"{SWITCH}={value!r} is unknown; use 1 (the default) or 0 to decode without CUDA graphs"
        )
    return value == "1"


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _places(weights: list[Tensor]) -> list[Place]:
    return [(weight.data_ptr(), weight.dtype) for weight in weights]


def _layout(layers: list[LayerState]) -> Layout:
    return tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.device)
        for layer in layers
        for name, tensor in layer.items()
    )


def _autocast(device_type: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


@contextmanager
def _autocast_without_cache(device_type: str) -> Iterator[None]:
    """Autocast as it is, but without its cache of cast weights, which a graph would outlive."""
    enabled, dtype = _autocast(device_type)
    with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _is_out_of_memory(error: BaseException | None) -> bool:
    # ending a failed capture raises an error of its own, with the first one as its context
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False

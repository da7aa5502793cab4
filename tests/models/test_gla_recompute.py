"""A GLA block on its kernels, in Triton's interpreter: what it keeps, and gradients at every level."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from models.gla import GLABlock, GLAConfig
from models.ops import gla as gla_operator
from models.ops import linear

pytestmark = pytest.mark.usefixtures("interpreter")
TOKENS, HIDDEN, WIDE = 70, 32, 48


@pytest.fixture
def kernels(monkeypatch):
    """The kernels on a CPU, where `resolve` would take plain torch."""
    monkeypatch.setattr(gla_operator, "resolve", lambda *_: "triton")
    monkeypatch.setattr(linear, "_fused", lambda *_: True)


def block_and_input(dtype, **shape):
    config = GLAConfig(
        hidden_size=HIDDEN, num_heads=1, intermediate_size=WIDE, num_hidden_layers=1, vocab_size=8
    )
    for field, value in shape.items():
        config.layers[0][field] = value
    block = GLABlock(config, 0).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3 + 0.05)
    x = torch.randn(1, TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    return block, x.to(dtype).requires_grad_()


def gradients(block, x, level, **options):
    block.recompute = level
    y, state = block(x, None, True, **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).to(y).view(y.shape)).sum() + state["recurrent_state"].sum()
    return torch.autograd.grad(loss, [x, *block.parameters()])


@pytest.mark.parametrize("level", GLABlock.recompute_levels)
@pytest.mark.parametrize("state_map", [1, 4])
def test_every_level_has_the_gradients_of_the_torch_path(level, state_map, request):
    cu_seqlens = torch.tensor([0, 1, 66, TOKENS])
    want = gradients(*block_and_input(torch.float64, state_map=state_map), "none", cu_seqlens=cu_seqlens)
    request.getfixturevalue("kernels")
    got = gradients(*block_and_input(torch.float32, state_map=state_map), level, cu_seqlens=cu_seqlens)
    for mine, exact in zip(got, want, strict=True):
        assert (mine.double() - exact).norm() <= 2e-5 * exact.norm()


class Allocations(TorchDispatchMode):
    """Every storage that comes to be, and how much of them is left in memory."""

    def __init__(self, known):
        super().__init__()
        self.storages, self.known = {}, {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self):
        new = (entry for key, entry in self.storages.items() if key not in self.known)
        return sum(size for reference, size in new if not reference.expired())


# numbers a token: the residual stream twice, behind the mixer and behind the MLP; q, k; v, gate; low rank;
# the scan's output; the MLP's two wide products
STREAMS, QK, VG, LOW, OUTPUT, MLP = 2 * HIDDEN, HIDDEN, 2 * HIDDEN, 16, HIDDEN, 2 * WIDE
KEPT = {
    "none": STREAMS + QK + VG + LOW + OUTPUT + MLP,
    "scan": STREAMS + QK + VG + LOW + MLP,
    "mlp": STREAMS + QK + VG + LOW,
    "mixer": STREAMS + MLP,
    "full": STREAMS,
}


@pytest.mark.parametrize("level", GLABlock.recompute_levels)
def test_a_block_keeps_its_inputs_and_projections_alone(level, kernels):
    block, x = block_and_input(torch.float32)
    block.recompute = level
    y, _ = block(x)  # tables of chunks are made once
    del y
    with Allocations([x, *block.parameters()]) as allocations:
        y, _ = block(x)
    gc.collect()  # the interpreter's frames
    kept = allocations.alive() / (4 * TOKENS)
    assert KEPT[level] <= kept <= KEPT[level] + 4  # norms keep a number a row
    del y


def test_a_graph_that_is_retained_makes_the_output_again_each_time(kernels):
    block, x = block_and_input(torch.float32)
    block.recompute = "scan"
    y, _ = block(x)
    first, second = (torch.autograd.grad(y.sum(), [x], retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)

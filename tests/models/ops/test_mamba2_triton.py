"""The Mamba2 mixer as one function, through Triton's interpreter, against its composition in float64."""

import copy

import pytest
import torch

from models.blocks import RMSNorm
from models.draw import Draw
from models.mamba2 import Mamba2Config, Mamba2Mixer, initialize_decay, initialize_projections

LENGTH = 70


def mixer_and_norm(**fields):
    """A small mixer in float64 whose every parameter matters, and the norm in front of it."""
    shape = {"hidden_size": 24, "num_heads": 2, "head_dim": 16, "expand": 1, "state_size": 16, "n_groups": 1}
    shape |= {"num_hidden_layers": 1, "vocab_size": 8, "use_bias": True} | fields
    shape["expand"] = shape["num_heads"] * shape["head_dim"] / shape["hidden_size"]
    config = Mamba2Config(**shape)
    mixer, norm, draw = Mamba2Mixer(config, 0), RMSNorm(config.hidden_size, 1e-5), Draw(0)
    initialize_projections(mixer, config, draw)
    initialize_decay(mixer, config, draw)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (norm.weight, mixer.norm.weight, mixer.D, mixer.in_proj.bias, mixer.out_proj.bias):
            if parameter is not None:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mixer.double(), norm.double()


def draw_inputs(mixer, sequences, batch=1, seed=2):
    """u, the carried states, and gradients of all three outputs, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = mixer.out_proj.out_features
    state = {
        "conv_state": normal(sequences, mixer.conv_dim, mixer.conv1d.kernel_size[0] - 1),
        "recurrent_state": normal(sequences, mixer.num_heads, mixer.head_dim, mixer.shape.state_size),
    }
    gradients = {name: normal(*tensor.shape) for name, tensor in state.items()}
    return normal(batch, LENGTH, hidden), state, normal(batch, LENGTH, hidden), gradients


def run(form, mixer, norm, u, state, du, gradients, dtype, cu_seqlens, **options):
    """Outputs and every gradient of one form of the mixer."""
    mixer, norm = (copy.deepcopy(module).to(dtype) for module in (mixer, norm))
    u = u.detach().to(dtype).clone().requires_grad_()
    state = (
        None
        if state is None
        else {name: t.detach().to(dtype).clone().requires_grad_() for name, t in state.items()}
    )
    stream = u * 1.0  # as between layers: no leaf, and nobody else's
    form = getattr(mixer, form)
    out, final = form(stream, norm, state, True, cu_seqlens, *options.values())
    loss = (out * du.to(dtype)).sum()
    if gradients is not None:
        loss = loss + sum((final[name].to(dtype) * g.to(dtype)).sum() for name, g in gradients.items())
    loss.backward()
    results = {"out": out, **final, "u": u.grad, "norm": norm.weight.grad}
    results |= {name: parameter.grad for name, parameter in mixer.named_parameters()}
    return results | ({} if state is None else {f"d{name}": t.grad for name, t in state.items()})


def assert_close(fused, composed, tolerance=2e-5):
    assert fused.keys() == composed.keys()
    for name, target in composed.items():
        got = fused[name]
        assert torch.isfinite(got).all(), name
        assert (got.double() - target).norm() <= tolerance * target.norm(), name


CASES = {
    "plain": {},
    "two groups": {"fields": {"n_groups": 2, "num_heads": 4}},
    "no biases": {"fields": {"use_bias": False, "use_conv_bias": False}},
    "limited steps": {"fields": {"time_step_limit": [0.01, 0.05]}},
    "two rows": {"batch": 2},
    "packed": {"offsets": [0, 1, 40, LENGTH]},
    "narrow convolution": {"fields": {"conv_kernel": 3}},
}


LEVELS = [(case, level) for case in CASES for level in ("none", "full")]
LEVELS += [(case, level) for case in ("plain", "packed") for level in ("conv", "scan")]


@pytest.mark.parametrize(("case", "recompute"), LEVELS)
def test_fused_equals_composed(case, recompute, interpreter):
    case = CASES[case]
    mixer, norm = mixer_and_norm(**case.get("fields", {}))
    offsets = case.get("offsets")
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    batch = case.get("batch", 1)
    sequences = batch if offsets is None else len(offsets) - 1
    inputs = draw_inputs(mixer, sequences, batch)
    composed = run("composed", mixer, norm, *inputs, torch.float64, cu_seqlens, recompute_scan=False)
    fused = run(
        "fused",
        mixer,
        norm,
        *inputs,
        torch.float32,
        cu_seqlens,
        recompute=recompute,
        in_place=recompute == "full",
    )
    assert_close(fused, composed)


def test_without_states(interpreter):
    mixer, norm = mixer_and_norm()
    u, _, du, _ = draw_inputs(mixer, 1)
    composed = run("composed", mixer, norm, u, None, du, None, torch.float64, None, recompute_scan=False)
    fused = run("fused", mixer, norm, u, None, du, None, torch.float32, None, recompute="conv", in_place=True)
    assert_close(fused, composed)


@pytest.mark.parametrize(("recompute", "kept"), [("none", 5), ("conv", 4), ("scan", 3), ("full", 2)])
def test_what_is_kept(recompute, kept, interpreter):
    """Of tensors as long as the sequence: xhat, then P, the convolution's output and y as far as asked."""
    mixer, norm = (module.float() for module in mixer_and_norm())
    u = torch.randn(1, LENGTH, 24, requires_grad=True)
    large = []

    def pack(tensor):
        if tensor.numel() >= LENGTH * 16 and tensor.shape[:1] != mixer.in_proj.weight.shape[:1]:
            large.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixer.fused(u * 1.0, norm, None, False, None, recompute, False)
    assert len(large) == kept - 1, large


def test_frozen_weights_get_no_gradient(interpreter):
    mixer, norm = (module.float() for module in mixer_and_norm())
    mixer.requires_grad_(False)
    mixer.A_log.requires_grad_(True)
    u = torch.randn(1, LENGTH, 24, requires_grad=True)
    mixer.fused(u * 1.0, norm, None, False, None, "none", False)[0].square().sum().backward()
    assert mixer.in_proj.weight.grad is None
    assert mixer.out_proj.weight.grad is None
    assert mixer.A_log.grad.abs().sum() > 0
    assert u.grad.abs().sum() > 0

"""Whole models on the GPU against the same models in float64 on the CPU: every fast path, in one go.

Relative error by norm. fp32 on the GPU may multiply in tf32 inside some kernels (3e-4 a product); bf16 rounds
every activation (2**-9) through four layers, and the gradient of a decay is a long sum that cancels.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import build_model, expand_state, load_pretrained

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parents[1] / "golden" / "gla-tiny-a"
CASES = [
    ("gla", None),
    ("gla", "gla"),
    ("gla", "extend"),
    ("gla", "lora_4"),
    ("mamba2", None),
    ("mamba2", "mamba4"),
    ("mamba2", "extend"),
    ("mamba2", "lora_4"),
]
LENGTH = 200


def small(family, mode):
    """Four layers at head sizes that the fast kernels take."""
    sizes = {"vocab_size": 512, "num_hidden_layers": 4, "hidden_size": 256}
    if family == "gla":
        sizes |= {"num_heads": 2}
    else:
        sizes |= {"num_heads": 8, "head_dim": 64, "state_size": 64}
    model = build_model(f"configs/models/{family}-tiny.json", **sizes)
    if mode:
        expand_state(model, drop_prop=2, drop_mode=mode)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def tokens(batch=2, length=LENGTH):
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model, ids, **options):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return loss.item(), {name: p.grad.detach().cpu().double() for name, p in model.named_parameters()}


def assert_agree(actual, expected, tolerance):
    (loss, gradients), (wanted_loss, wanted) = actual, expected
    assert abs(loss - wanted_loss) < tolerance
    errors = {}
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        errors[name] = ((gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-8)).item()
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst}: relative error {errors[worst]:.1e}"


# in fp32 one case a family: its kernels take long to compile and serve comparisons only
LOSSES = [(*case, True, 0.1) for case in CASES] + [(*case, False, 5e-3) for case in (CASES[1], CASES[5])]


@pytest.mark.parametrize(("family", "mode", "autocast", "tolerance"), LOSSES)
def test_loss_and_every_gradient(family, mode, autocast, tolerance):
    model = small(family, mode)
    expected = loss_and_gradients(model.double(), tokens())
    model = model.float().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        actual = loss_and_gradients(model, tokens().cuda())
    assert_agree(actual, expected, tolerance)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_recomputation_changes_nothing(family):
    model = small(family, None).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, tokens().cuda())
        for level in model.recompute_levels:
            model.set_recompute(level)
            assert_agree(loss_and_gradients(model, tokens().cuda()), expected, 2e-3)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_documents_do_not_see_each_other(family):
    model = small(family, "gla" if family == "gla" else "mamba4").cuda().eval()
    ids = tokens(1).cuda()
    ends = torch.tensor([0, 70, 71, LENGTH], dtype=torch.int32, device="cuda")
    packed = model(input_ids=ids, cu_seqlens=ends, use_cache=False).logits
    apart = [
        model(input_ids=ids[:, a:b], use_cache=False).logits for a, b in [(0, 70), (70, 71), (71, LENGTH)]
    ]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "mode"), CASES[1::4])
def test_decoding_step_by_step_equals_the_full_forward(family, mode):
    model = small(family, mode).cuda().eval()
    ids = tokens(2, 40).cuda()
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        output = model(input_ids=ids[:, :30], use_cache=True)
        steps = [output.logits]
        for t in range(30, 40):
            output = model(
                input_ids=ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True
            )
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=2e-3, atol=2e-3)


def test_golden_gla():
    expected = load_file(GOLDEN / "expected.safetensors")
    model = load_pretrained(GOLDEN, device="cuda").eval()
    ids = expected["input_ids"].cuda()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.cpu()
    assert ((logits - expected["logits"]).norm() / expected["logits"].norm()).item() < 2e-3


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_a_bf16_model_generates_and_keeps_its_decays_in_fp32(family):
    model = small(family, None).bfloat16().cuda().eval()
    kept = [
        p
        for name, p in model.named_parameters()
        if name.endswith(("A_log", "dt_bias", ".D")) or "norm" in name
    ]
    assert kept
    assert all(p.dtype == torch.float32 for p in kept)
    generated = model.generate(tokens(2, 17).cuda(), max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 22)

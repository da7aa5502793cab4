"""`extend` changes nothing at first, and everything new learns."""

import pytest
import torch

from models.expansion import expand_state
from tests.models.tiny_models import tiny, tokens

VARIANTS = [
    ("gla", {}),
    ("gla", {"num_heads": 4, "clamp_min": -0.02}),
    ("mamba2", {}),
    ("mamba2", {"n_groups": 1, "use_bias": False}),
    ("mamba2", {"n_groups": 4, "use_conv_bias": False}),
]


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_stay(family, changes, factor, dtype, tolerance):
    model = tiny(family, dtype=dtype, **changes)
    before = model(tokens()).logits
    report = expand_state(model, drop_prop=1, drop_mode="extend", expand_factor=factor)
    assert report.after.total_elements == factor * report.before.total_elements
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_number_of_an_extended_mixer_has_a_gradient_within_two_steps(family, changes):
    # a clamped gate passes no gradient, expanded or not
    model = tiny(
        family, dtype=torch.float64, **{key: value for key, value in changes.items() if key != "clamp_min"}
    )
    expand_state(model, drop_prop=2, drop_mode="extend", expand_factor=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    had_one = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(4), labels=tokens(4)).loss.backward()
        for name, parameter in model.named_parameters():
            had_one[name] |= parameter.grad != 0
        optimizer.step()
    mixers = [model.blocks[layer].token_mixer for layer in (0, 2)]
    expanded = {id(parameter) for mixer in mixers for parameter in mixer.parameters()}
    checked = [name for name, parameter in model.named_parameters() if id(parameter) in expanded]
    assert len(checked) == len(expanded)
    assert [name for name in checked if not had_one[name].all()] == []

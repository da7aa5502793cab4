"""The key `products`: refused where float8 cannot run, and set before anything multiplies."""

import pytest
import torch

from models.ops import matmul
from training import validate
from training.config import ConfigError, parse_arguments
from training.plan import make_plan
from training.start import start_shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["products=int8"], "use one of bf16, fp8"),
        (["products=fp8", "dtype=fp32"], "needs dtype=bf16"),
        (["products=fp8", "launch=cpu"], "compute capability 8.9"),
        (["products=fp8", "compile=true"], "compile=true"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        parse_arguments(arguments)


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_a_gpu_without_float8_is_refused_before_the_launch(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(matmul, "import_problem", lambda _: None)
    config = parse_arguments(["products=fp8", "n_gpus=1"])
    if not refused:
        validate._check_gpus(config)
        return
    with pytest.raises(ConfigError, match=r"products=fp8: a card has compute capability 8\.0.*products=bf16"):
        validate._check_gpus(config)


def test_a_plan_names_fp8_and_needs_no_gpu():
    arguments = ["init_from=scratch", "model_name=gla-tiny", "n_gpus=1", "plan=true"]
    assert ", fp8 products" in str(make_plan(parse_arguments([*arguments, "products=fp8"]), 1))
    assert "fp8" not in str(make_plan(parse_arguments(arguments), 1))


def test_the_run_sets_the_format_of_its_products():
    arguments = ["init_from=scratch", "model_name=gla-tiny", "products=fp8"]
    try:
        start_shape(parse_arguments(arguments), None)
        assert matmul.products() == "fp8"
        start_shape(parse_arguments(arguments[:2]), None)
        assert matmul.products() == "bf16"
    finally:
        matmul.set_products("bf16")

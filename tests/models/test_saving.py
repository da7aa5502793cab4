"""Saved folders: bitwise round trips, code that travels along, published layouts, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from models import language_model, load_pretrained, save_published
from models.expansion import expand_state
from tests.models.tiny_models import tiny, tokens

FAMILIES = ("gla", "mamba2")
REPOSITORY = Path(__file__).parents[2]


def expanded(family: str, dtype=torch.float32):
    """One layer extended, one with mapped keys, the others as they were."""
    model = tiny(family)
    expand_state(model, layers=[1], drop_mode="extend", expand_factor=2)
    expand_state(model, layers=[2], drop_mode="lora_4")
    return model.to(dtype).eval()


def run_elsewhere(code: str, cwd: Path, *arguments, path: str = "") -> str:
    """Run a program in a process that sees neither this repository nor the network nor a cache."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    environment = kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    if path:
        environment["PYTHONPATH"] = path
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [tiny, expanded], ids=["as published", "expanded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_by_bit(family, make, dtype, tmp_path):
    model = make(family, dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert loaded.config.layers == model.config.layers
        for name, tensor in model.state_dict().items():
            other = loaded.state_dict()[name]
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other, tensor), name
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_records_every_layers_shape(family, tmp_path):
    model = expanded(family)
    model.save_pretrained(tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["layers"]
    assert [layer["drop_mode"] for layer in layers] == [None, "extend", "lora_4", None]
    assert [layer["state_map"] for layer in layers] == [1, 1, 4, 1]


WITHOUT_REPOSITORY = """
import sys
for absent in ("fla", "triton", "mamba_ssm", "causal_conv1d", "models"):
    sys.modules[absent] = None  # importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for family in sys.argv[1:]:
    expected = load_file(family + ".logits")
    model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    model.generate(expected["ids"], max_new_tokens=2, do_sample=False)
    model.save_pretrained(family + "-again")
    again = AutoModelForCausalLM.from_pretrained(family + "-again", trust_remote_code=True)
    assert torch.equal(again(expected["ids"]).logits, expected["logits"])
"""


def test_a_folder_loads_without_this_repository_and_without_optional_packages(tmp_path):
    from safetensors.torch import save_file

    for family in FAMILIES:
        model = expanded(family)
        model.save_pretrained(tmp_path / family)
        with torch.no_grad():
            logits = model(tokens()).logits
        save_file({"ids": tokens(), "logits": logits}, tmp_path / f"{family}.logits")
    run_elsewhere(WITHOUT_REPOSITORY, tmp_path, *FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bundled_code_requires_torch_and_transformers_alone(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    required = {name for file in tmp_path.glob("*.py") for name in get_imports(file)}
    third_party = required - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "transformers", "huggingface_hub", "safetensors"}


WITH_FLA = """
import sys
order, *folders = sys.argv[1:]
if order == "before":
    import fla.models, models
elif order == "after":
    import models, fla.models
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("models."), type(model)
    assert model.config.layer_shape(1).drop_mode == "extend"
"""


@pytest.mark.slow  # flash-linear-attention takes seconds to import
@pytest.mark.parametrize("order", ["before", "after"])
def test_flash_linear_attention_in_the_same_process_takes_nothing_over(order, tmp_path):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    pytest.importorskip("triton", reason="importing fla.models needs triton")
    for family in FAMILIES:
        expanded(family).save_pretrained(tmp_path / family)
    run_elsewhere(WITH_FLA, tmp_path, order, *FAMILIES, path=str(REPOSITORY))


# ----------------------------------------------------------------------------------------------------
# published layouts (Mamba2's is tested against transformers in test_mamba2.py)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_has_no_published_layout(family, tmp_path):
    with pytest.raises(ValueError, match=r"layers \[1, 2\] are expanded"):
        save_published(expanded(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fuse_norm", [True, False])
def test_gla_is_published_under_the_names_of_flash_linear_attention(fuse_norm, tmp_path):
    model = tiny("gla", fuse_norm=fuse_norm).eval()
    save_published(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["num_heads"], "layers" in config) == ("gla", 2, False)
    norm = "g_norm_swish_gate" if fuse_norm else "g_norm"
    assert f"model.layers.0.attn.{norm}.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


# ----------------------------------------------------------------------------------------------------
# whole or not at all


@pytest.fixture
def breaking(monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(language_model, "bundle_code", fail)


def test_a_save_that_fails_leaves_nothing(tmp_path, breaking):
    with pytest.raises(OSError, match="disk full"):
        tiny("gla").save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    tiny("gla", seed=1).save_pretrained(target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "bundle_code", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny("gla", seed=2).save_pretrained(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_saving_over_a_model_replaces_its_weights_and_keeps_other_files(tmp_path):
    tiny("gla", seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    model = tiny("gla", seed=2)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "tokenizer.json").exists()
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_other_ranks_write_nothing(tmp_path):
    tiny("gla").save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


def test_a_file_is_no_place_to_save_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        tiny("gla").save_pretrained(tmp_path / "file")

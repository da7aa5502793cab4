"""load_pretrained and build_model: published layouts, broken folders, dtypes, memory, seeds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import build_model, expand_state, load_pretrained, read_config
from tests.models.tiny_models import tiny, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "gla-tiny-a"
FAMILIES = ("gla", "mamba2")


def rewritten(folder: Path, change) -> Path:
    """A copy of the golden GLA checkpoint with its tensors passed through `change`."""
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    save_file(change(load_file(GOLDEN / "model.safetensors")), folder / "model.safetensors")
    return folder


def same_weights(model, other) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# ----------------------------------------------------------------------------------------------------
# layouts


def test_a_fused_gate_proj_is_gate_and_up_in_one(tmp_path):
    def fuse(tensors):
        for name in [name for name in tensors if "gate_proj" in name]:
            up = tensors.pop(name.replace("gate_proj", "up_proj"))
            tensors[name] = torch.cat([tensors[name], up])
        return tensors

    same_weights(load_pretrained(rewritten(tmp_path / "fused", fuse)), load_pretrained(GOLDEN))


def test_the_unfused_gated_norm_has_another_name(tmp_path):
    def rename(tensors):
        return {name.replace("g_norm_swish_gate", "g_norm"): tensor for name, tensor in tensors.items()}

    same_weights(load_pretrained(rewritten(tmp_path / "unfused", rename)), load_pretrained(GOLDEN))


@pytest.fixture
def original(tmp_path):
    """A Mamba2 checkpoint as state-spaces publishes them, and the model it was made from."""
    model = tiny("mamba2", vocab_size=64, n_groups=1, use_bias=False, tie_word_embeddings=True)
    model.tie_weights()
    tensors = {name.replace(".embeddings.", ".embedding."): t for name, t in model.state_dict().items()}
    config = {
        "d_model": 16,
        "n_layer": 4,
        "vocab_size": 61,
        "pad_vocab_size_multiple": 16,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6},
        "tie_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path, model


def test_the_original_mamba2_layout(original):
    folder, model = original
    loaded = load_pretrained(folder)
    same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


def test_the_original_layout_in_shards(original):
    folder, model = original
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    index = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for shard in set(index.values()):
        torch.save({name: tensors[name] for name in index if index[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    same_weights(load_pretrained(folder), model)


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(original):
    folder, _ = original
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="ties the head"):
        load_pretrained(folder)


def test_a_tied_matrix_may_be_stored_as_the_head_alone(original):
    folder, model = original
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["lm_head.weight"] = tensors.pop("backbone.embedding.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    loaded = load_pretrained(folder)
    same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_folder_in_shards(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same_weights(load_pretrained(tmp_path), model)


# ----------------------------------------------------------------------------------------------------
# what does not fit


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    def spoil(tensors):
        tensors["model.layers.0.attn.extra.weight"] = tensors.pop("model.layers.0.attn.q_proj.weight")
        tensors["model.norm.weight"] = torch.ones(3)
        return tensors

    with pytest.raises(ValueError, match=r"do not fit config\.json") as error:
        load_pretrained(rewritten(tmp_path / "spoilt", spoil))
    message = str(error.value)
    assert "missing model.layers.0.attn.q_proj.weight [32, 64]" in message
    assert "unexpected model.layers.0.attn.extra.weight [32, 64]" in message
    assert "misshapen model.norm.weight: [3], expected [64]" in message


@pytest.mark.parametrize("kept", [0, 5, 1000, 100_000])
def test_a_truncated_safetensors_file_is_named(tmp_path, kept):
    folder = rewritten(tmp_path / "cut", dict)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_pretrained(folder)


def test_a_truncated_bin_file_is_named(original):
    folder, _ = original
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1",
        b"<html>",
        b"",
        [1, 2],
        {1: torch.ones(2)},
        {"model": {}},
    ],
)
def test_a_bin_file_without_weights_is_named(original, content):
    folder, _ = original
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(content) if isinstance(content, bytes) else torch.save(content, weights)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"lm_head.weight": 3}])
def test_an_index_that_names_no_files_is_refused(tmp_path, weight_map):
    tiny("gla").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json must hold a weight_map"):
        load_pretrained(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tiny("gla").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "model-2.safetensors")
    shards = dict.fromkeys(tensors, "model-1.safetensors") | {"lm_head.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored twice"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_quantised_weights_are_refused(tmp_path, stored, asked):
    def quantised(tensors):
        return tensors | {"lm_head.weight": tensors["lm_head.weight"].to(stored)}

    with pytest.raises(ValueError, match=rf"lm_head\.weight is {stored}"):
        load_pretrained(rewritten(tmp_path / "quantised", quantised), dtype=asked)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
        load_pretrained(GOLDEN, device=device)


def test_a_missing_shard_is_named(tmp_path):
    tiny("gla").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="model-00002"):
        load_pretrained(tmp_path)


def test_a_folder_that_is_no_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"'llama' belongs to no family; known are .*gla"):
        load_pretrained(tmp_path)


def test_a_dtype_that_is_none_is_refused():
    for dtype in ("bf16", "relu", torch.int64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="floating-point dtype"):
            load_pretrained(GOLDEN, dtype=dtype)


# ----------------------------------------------------------------------------------------------------
# dtypes and memory


def test_none_keeps_the_stored_dtype_and_half_precision_keeps_norms_in_fp32(tmp_path):
    stored = load_pretrained(
        rewritten(tmp_path / "bf16", lambda ts: {n: t.bfloat16() for n, t in ts.items()})
    )
    for model in (
        stored,
        load_pretrained(GOLDEN, dtype=torch.bfloat16),
        load_pretrained(GOLDEN, dtype="bfloat16"),
    ):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert {p.dtype for p in load_pretrained(GOLDEN).parameters()} == {torch.float32}
    assert {p.dtype for p in load_pretrained(GOLDEN, dtype=torch.float64).parameters()} == {torch.float64}


def test_decay_parameters_stay_in_fp32_in_a_half_precision_mamba2(tmp_path):
    model = tiny("mamba2")
    model.save_pretrained(tmp_path)
    mixer = load_pretrained(tmp_path, dtype=torch.bfloat16).blocks[0].mixer
    for name in ("A_log", "dt_bias", "D"):
        assert torch.equal(getattr(mixer, name), getattr(model.blocks[0].mixer, name)), name
    assert mixer.in_proj.weight.dtype == mixer.conv1d.weight.dtype == torch.bfloat16


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see the peak")
def test_memory_while_loading_stays_near_one_copy(tmp_path):
    model = build_model(
        "configs/models/gla-tiny.json", hidden_size=1024, intermediate_size=2048, vocab_size=128
    )
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert size > 100
    model.save_pretrained(tmp_path)
    del model
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _megabytes("VmRSS")
    loaded = load_pretrained(tmp_path)
    assert _megabytes("VmHWM") - before < 1.25 * size
    assert loaded.num_parameters() > 0


# ----------------------------------------------------------------------------------------------------
# build_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_bits_however_the_model_is_built(family):
    config = tiny_config(family)
    first = build_model(config, seed=5)
    torch.manual_seed(99)
    same_weights(build_model(config.to_dict(), seed=5), first)
    other = build_model(config, seed=6)
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)


@pytest.mark.parametrize("name", ["gla-1.3B", "mamba2-1.3B", "gla-tiny", "mamba2-tiny"])
def test_the_configs_of_the_repository_build(name):
    model = build_model(f"configs/models/{name}.json", device="meta", vocab_size=300)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 300


def test_an_override_that_is_no_field_is_refused():
    with pytest.raises(ValueError, match="hidden_sizes"):
        build_model("configs/models/gla-tiny.json", hidden_sizes=64)


def test_changing_a_shape_rebuilds_the_layers():
    config = read_config(tiny_config("gla"), num_heads=4, num_hidden_layers=2)
    assert [config.layer_shape(i).num_heads for i in range(2)] == [4, 4]


def test_an_override_leaves_an_expanded_layer_expanded():
    model = tiny("gla")
    expand_state(model, layers=[2], drop_mode="extend")
    assert read_config(model.config, vocab_size=70).expanded_layers() == [2]

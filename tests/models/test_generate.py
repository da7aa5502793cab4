"""load_model: a model of transformers answers with the weights of its folder, or there is no model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models.generate import load_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny Llama and answers with its folder."""

    def save(tied: bool = False, **how: Any) -> Path:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=257, tie_word_embeddings=tied, **sizes))
        model.save_pretrained(tmp_path / "llama", **how)
        return tmp_path / "llama"

    return save


def change(folder: Path, how: Callable[[dict[str, Tensor]], Any]) -> str:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def as_bin(folder: Path) -> Path:
    """The weights in torch's own format."""
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    return file


def test_a_missing_tensor_is_named_and_not_filled_with_random_numbers(llama: Any) -> None:
    folder = change(llama(), lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=rf"llama: the weights do not fit config\.json(.|\s)*missing {NORM}"):
        load_model(folder, None, "cpu")


def test_a_misshapen_tensor_is_named_with_both_shapes(llama: Any) -> None:
    folder = change(llama(), lambda tensors: tensors.update({NORM: torch.zeros(3)}))
    with pytest.raises(ValueError, match=rf"misshapen {NORM}: \[3\], expected \[32\]"):
        load_model(folder, None, "cpu")


def test_of_many_problems_the_first_are_named(llama: Any) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.input(.|\s)*and 4 more"):
        load_model(change(llama(), halve), None, "cpu")


@pytest.mark.parametrize(("kept", "reason"), [(0.5, "zip archive"), (0, "a file is empty")])
def test_a_cut_bin_file_is_an_error_of_the_folder(llama: Any, kept: float, reason: str) -> None:
    file = as_bin(llama())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=rf"weights of .*llama cannot be read \(.*{reason}.*cut short"):
        load_model(str(file.parent), None, "cpu")


def test_a_bin_file_of_something_else_is_not_run(llama: Any) -> None:
    file = as_bin(llama())
    torch.save({"weight": Path("a class that is none of tensors")}, file)
    with pytest.raises(ValueError, match=r"cannot be read \(a file holds something else than weights\)"):
        load_model(str(file.parent), None, "cpu")


def test_a_cut_safetensors_file_and_a_missing_shard_are_errors_of_the_folder(llama: Any) -> None:
    file = llama() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights of .*llama cannot be read \(.*cut short"):
        load_model(str(file.parent), None, "cpu")
    file.unlink()
    folder = llama(max_shard_size="50KB")
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"weights of .*llama cannot be read \(.*model-00002"):
        load_model(str(folder), None, "cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["50KB", "5GB"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_whole_weights_load_in_every_layout(llama: Any, tied: bool, shard: str, dtype: str | None) -> None:
    folder = llama(tied, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").is_file() == (shard == "50KB")
    model = load_model(str(folder), dtype, "cpu")
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    stored = {name: tensor for tensors in files for name, tensor in tensors.items()}
    assert ("lm_head.weight" in stored) != tied
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name), tensor.to(model.dtype)), name
    if tied:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_tied_matrix_that_is_stored_nowhere_is_missing(llama: Any) -> None:
    folder = change(llama(tied=True), lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"missing (lm_head|model\.embed_tokens)\.weight"):
        load_model(folder, None, "cpu")


def test_unexpected_tensors_are_no_error(llama: Any) -> None:
    folder = change(llama(), lambda tensors: tensors.update({"value_head.weight": torch.zeros(1)}))
    assert load_model(folder, None, "cpu").config.num_hidden_layers == 2


def test_an_unknown_architecture_is_not_blamed_on_the_weights(llama: Any) -> None:
    folder = llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(ValueError, match="nobodys"):
        load_model(str(folder), None, "cpu")

"""Building a model from a config, and loading checkpoints: published layouts and our own folders.

Weights are read one tensor at a time into a model without storage: memory stays near one copy of them.
"""

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from .blocks import HALF, KeepFp32
from .config import LanguageModelConfig
from .families import Family, family_of
from .language_model import LanguageModel

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "lm_head.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_config(
    source: str | os.PathLike | dict | LanguageModelConfig, **overrides: Any
) -> LanguageModelConfig:
    """Our config from a config.json, a folder that holds one, or a dict, in any layout a family reads.

    Args:
        overrides: fields of the config to set, `vocab_size=4096` for one.

    Raises:
        ValueError: no such file, no JSON, an unknown model_type or override, or something unsupported.
    """
    if isinstance(source, LanguageModelConfig):
        raw = source.to_dict()
    else:
        raw = dict(source) if isinstance(source, dict) else read_json(_config_file(Path(source)))
    family = family_of(raw)
    fields = dict(raw) if raw.get("model_type") == family.model_type else family.read_config(raw)
    unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(family.config_class)})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no field of {family.config_class.__name__}")
    fields.pop("model_type", None)
    if overrides and not family.config_class(**fields).expanded_layers():
        fields.pop("layers", None)  # they follow from the fields, and so from the new ones
    return family.config_class(**fields | overrides)


def build_model(
    config: str | os.PathLike | dict | LanguageModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> LanguageModel:
    """A model of this shape with random weights, as at the start of training; on `meta` shapes only.

    Args:
        config: config.json, a folder with one, a dict, or a config.
        seed: of one CPU generator: the same bits on every device.
        overrides: config fields to set.
    """
    config = read_config(config, **overrides)
    model = _empty_model(config).to(_dtype(dtype))
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.initialize(seed)
    return model


def load_pretrained(
    path: str | os.PathLike, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
) -> LanguageModel:
    """A model from a checkpoint folder: published GLA, transformers' or the original Mamba2, or our own.

    Args:
        path: folder with config.json and weights: *.safetensors or pytorch_model*.bin, sharded or not.
        dtype: of the parameters; None keeps what is stored. Norms and decays stay in fp32 in half precision.
        device: where to; None is the CPU.

    Raises:
        ValueError: no such folder, broken files, a device that is not there, or a list of missing, unexpected
            and misshapen tensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder; download the checkpoint first and name the folder it is in")
    dtype, device, config = _dtype(dtype), usable_device(device), read_config(folder)
    family, model = family_of(config), _empty_model(config)
    _fill(model, _our_tensors(folder, family, config), dtype, device, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(path)
    return model.eval()


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, given) if isinstance(given, str) else given
    if dtype is not None and dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"dtype={given!r} is no floating-point dtype that models have; use one of {allowed}")
    return dtype


def usable_device(given: str | torch.device | None) -> torch.device:
    """The device, the CPU for None, or ValueError when this machine has no such one."""
    try:
        device = torch.device(given or "cpu")
        torch.empty(0, device=device)  # fails here, and not after gigabytes were read
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device={str(given)!r} cannot be used here ({reason}); cpu can") from None
    return device


def out_of_memory(error: Exception) -> bool:
    """Is it torch's word for too little memory? On a CPU that is no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _empty_model(config: LanguageModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return family_of(config).model_class(config)


# ----------------------------------------------------------------------------------------------------
# config.json


def _config_file(source: Path) -> Path:
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a config.json or a folder that holds one")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file with an object holds, or ValueError."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(raw).__name__}")
    return raw


# ----------------------------------------------------------------------------------------------------
# weights


def _our_tensors(folder: Path, family: Family, config: LanguageModelConfig) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        for name, tensor in _stored_tensors(file):
            yield from family.read_tensor(name, tensor, config).items()


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise ValueError(
        f"{folder} holds no weights; expected {' or '.join(WEIGHT_FILES)}, or a sharded form of them"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if (
        not weight_map
        or not isinstance(weight_map, dict)
        or {type(name) for name in weight_map.values()} != {str}
    ):
        raise ValueError(f"{index} must hold a weight_map from tensors to files")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} names files that are missing: {', '.join(missing)}")
    return files


def _is_state_dict(stored: Any) -> bool:
    return isinstance(stored, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in stored.items()
    )


def _stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".bin":
            stored = torch.load(file, map_location="cpu", weights_only=True)
            if not _is_state_dict(stored):
                raise ValueError("it holds no dict of tensors by name")
            while stored:
                name = next(iter(stored))
                yield name, stored.pop(name)
        else:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
            for name in names:
                # opened anew for each: the pages of a mapped file count as memory until it is closed
                with safe_open(file, framework="pt") as handle:
                    yield name, handle.get_tensor(name).clone()
    except pickle.UnpicklingError:  # its message advises to load the file without this protection
        raise ValueError(
            f"{file} cannot be read: it holds something else than weights (a page or a pointer downloaded in "
            "their place, or code, which is not run); fetch it again"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); it may be cut short: fetch it again") from error


def _fill(
    model: LanguageModel,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
    folder: Path,
) -> None:
    """Put the tensors in place of the model's empty parameters; each must be there, in its shape."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = model.config.tie_word_embeddings
    seen, problems, stored_head = set(), [], None
    for name, tensor in tensors:
        if name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif name in seen:
            problems.append(f"{name} is stored twice")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} is {tensor.dtype}, no floating-point type that models have")
        elif tensor.shape != expected[name]:
            problems.append(f"misshapen {name}: {list(tensor.shape)}, expected {list(expected[name])}")
        elif name == HEAD and tied:
            stored_head = tensor
        else:
            _place(model, name, tensor, dtype, device)
        seen.add(name)
    if stored_head is not None and (embeddings := model._tied_weights_keys[HEAD]) not in seen:
        _place(model, embeddings, stored_head, dtype, device)  # stored once, under the head's name
        seen.add(embeddings)
    missing = [name for name in expected if name not in seen and not (name == HEAD and tied)]
    problems = [f"missing {name} {list(expected[name])}" for name in missing] + problems
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  {listed}")
    if tied:
        embeddings = model.get_input_embeddings().weight
        if stored_head is not None and not torch.equal(stored_head.to(embeddings), embeddings):
            raise ValueError(
                f"{folder}: config.json ties the head to the embeddings, but {HEAD} differs from them"
            )
        model.tie_weights()


def _place(
    model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device
) -> None:
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    dtype = tensor.dtype if dtype is None else dtype
    if isinstance(owner, KeepFp32) and dtype in HALF:
        dtype = torch.float32
    setattr(owner, attribute, nn.Parameter(tensor.to(device=device, dtype=dtype)))

"""From `model=` to a model that answers: labels, checks before anything is loaded, and what identifies it."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.generate import load_model, load_tokenizer

from .model import EvalModel
from .scripted import SCRIPTED, ScriptedModel, byte_tokenizer
from .settings import Settings

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]
WEIGHTS = ("*.safetensors", "*.bin")
PREFIX = "scripted:"


@dataclass(frozen=True)
class Source:
    """A model as named on the command line, the folder that holds it, and the folder name of its answers."""

    path: str
    folder: Path
    label: str

    @property
    def scripted(self) -> str | None:
        return self.path.removeprefix(PREFIX) if self.path.startswith(PREFIX) else None


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Labels are the last part of each path, with as many parts more as it takes to tell them apart."""
    folders = [folder_of(path) for path in paths]
    parts = [Path(path).resolve().parts if not path.startswith(PREFIX) else (path,) for path in paths]
    sources = []
    for path, folder, own in zip(paths, folders, parts):
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        sources.append(Source(path, folder, "_".join(own[-depth:]).replace(":", "_").replace("/", "_")))
    return sources


def folder_of(path: str) -> Path:
    """The folder itself, or what OWNER/NAME of the Hub was fetched into.

    Raises:
        ValueError: neither is there.
    """
    if path.startswith(PREFIX) or Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return Path(path)
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except (OSError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model={path} is no folder, and the Hub does not give it ({reason})") from None


def check_source(source: Source, settings: Settings) -> None:
    """Raises ValueError for what can be seen without loading: no folder, no weights, no tokenizer."""
    if source.scripted is not None:
        if source.scripted not in SCRIPTED:
            raise ValueError(f"model={source.path}: scripted models are {', '.join(SCRIPTED)}")
        return
    folder = source.folder
    if not folder.is_dir():
        raise ValueError(
            f"model={source.path} is no folder; for a starting point: "
            "python huggingface/download.py --only gla-1.3B-100B"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={source.path} is no model folder: it has no config.json")
    if not _weight_files(folder):
        raise ValueError(
            f"model={source.path} has no weights (no file like {' or '.join(WEIGHTS)}); an interrupted "
            "download or save, or the folder above the checkpoint?"
        )
    load_tokenizer(settings.tokenizer or str(folder))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))


def device_of(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(settings: Settings) -> str | None:
    return settings.dtype or ("bfloat16" if device_of(settings).startswith("cuda") else None)


def check_machine(settings: Settings) -> None:
    """Raises ValueError for a device that is not here, or a dtype that torch does not know."""
    device = device_of(settings)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = getattr(torch, settings.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={settings.dtype!r}: expected bfloat16, float16, float32 or float64")


def identify(source: Source, settings: Settings) -> dict[str, Any]:
    """What answers depend on besides the item: the bytes of weights, config and tokenizer."""
    if source.scripted is not None:
        return {"path": source.path, "weights": "none", "config": "none", "tokenizer": "bytes", "dtype": None}
    folder = source.folder
    tokenizer = Path(settings.tokenizer or folder)
    return {
        "path": source.path,
        "weights": _digest(_weight_files(folder)),
        "config": _digest([folder / "config.json"]),
        "tokenizer": _digest(
            sorted(
                file for file in tokenizer.iterdir() if file.name.startswith(("tokenizer", "vocab", "merges"))
            )
        ),
        "dtype": dtype_of(settings),
    }


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        if file.is_file():
            with open(file, "rb") as handle:
                whole.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()[:32]


def identity_key(identity: dict[str, Any]) -> str:
    """Without the path: a folder that was moved is the same model."""
    kept = {name: value for name, value in identity.items() if name != "path"}
    return json.dumps(kept, sort_keys=True)


def open_model(source: Source, settings: Settings) -> EvalModel | ScriptedModel:
    if source.scripted is not None:
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else byte_tokenizer()
        return SCRIPTED[source.scripted](tokenizer)
    device = device_of(settings)
    default = 65536 if device.startswith("cuda") else 4096
    return EvalModel(
        load_model(str(source.folder), dtype_of(settings), device),
        load_tokenizer(settings.tokenizer or str(source.folder)),
        piece=settings.piece,
        batch_tokens=settings.batch_tokens or default,
        allow_long=settings.allow_long,
    )

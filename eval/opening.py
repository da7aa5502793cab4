"""From `model=` to a model that answers: labels, checks before anything is loaded, and what identifies it."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.families import is_ours
from models.folder import has_tokenizer
from models.generate import load_model, load_tokenizer

from .model import EvalModel, longest_prompt
from .scripted import SCRIPTED, ScriptedModel, byte_tokenizer
from .settings import Settings

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]
WEIGHTS = ("*.safetensors", "*.bin")
PREFIX = "scripted:"
FOREIGN_FORMAT = 2  # how models of transformers are asked; until 2 some were asked wrongly (`foreign.py`)
BYTES_PER_TOKEN = 256  # while a prompt of ever new sentences is written; measured at a million tokens
STARTING_POINT = "for a starting point: python huggingface/download.py --only gla-1.3B-100B"
# what decides how text becomes tokens and where an answer ends
TOKENIZER_PREFIXES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens_map",
    "added_tokens",
    "spiece",
    "sentencepiece",
)


@dataclass(frozen=True)
class Source:
    """A model as named on the command line, the folder that holds it, and the folder name of its answers.

    Attributes:
        shorter: labels with fewer parts of the path, which the model has where it is named alone.
    """

    path: str
    folder: Path
    label: str
    shorter: tuple[str, ...] = ()

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
        *shorter, label = (_label(own[-count:]) for count in range(1, depth + 1))
        sources.append(Source(path, folder, label, tuple(shorter)))
    for number, source in enumerate(sources):
        for other in sources[:number]:
            if source.label == other.label:  # their answers would share a folder
                raise ValueError(f"model={other.path},{source.path}: these are the same model")
    return sources


def _label(parts: Sequence[str]) -> str:
    return "_".join(parts).replace(":", "_").replace("/", "_")


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
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
        if not _weight_files(folder):  # only then: many repositories hold the same weights in both formats
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*HUB_FILES, "*.bin"]))
        return folder
    except (OSError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model={path} is no folder, and the Hub does not give it ({reason}); {STARTING_POINT}"
        ) from None


def check_sources(sources: Sequence[Source], settings: Settings) -> None:
    """Raises ValueError for what can be seen without loading: no weights, no tokenizer, too long prompts."""
    for source in sources:
        _check_source(source, settings)
    if settings.tokenizer and all(_has_tokenizer(source) for source in sources):
        raise ValueError(
            f"tokenizer={settings.tokenizer}: each model has its own in its folder; leave it out"
        )


def _check_source(source: Source, settings: Settings) -> None:
    if source.scripted is not None:
        if source.scripted not in SCRIPTED:
            raise ValueError(f"model={source.path}: scripted models are {', '.join(SCRIPTED)}")
        tokenizer_of(source, settings)
        return
    folder = source.folder
    if not folder.is_dir():
        raise ValueError(f"model={source.path} is no folder; {STARTING_POINT}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={source.path} is no model folder: it has no config.json")
    config = _config(folder)
    if not _weight_files(folder):
        raise ValueError(
            f"model={source.path} has no weights (no file like {' or '.join(WEIGHTS)}); an interrupted "
            "download or save, or the folder above the checkpoint?"
        )
    tokenizer = tokenizer_of(source, settings)
    longest = longest_prompt(_window(config), tokenizer, settings.allow_long)
    if longest is not None and max(settings.lengths or (0,)) > longest:
        raise ValueError(
            f"lengths={max(settings.lengths or ())}: {source.path} allows {longest} tokens, and no prompt "
            "is ever cut; choose shorter ones (or allow_long=true, if it is the tokenizer's limit alone)"
        )


def _window(config: dict[str, Any]) -> int | None:
    """What a model of transformers was built for; the models of this repository have no window."""
    if is_ours(config):
        return None
    return config.get("max_position_embeddings") or config.get("n_positions")


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is no JSON object: not a model's, or damaged") from None


def open_tokenizer(folder: str) -> Any:
    """Raises ValueError for a folder without a tokenizer, or with one that cannot be read."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # of whatever type: the tokenizers library raises bare Exceptions
        raise ValueError(f"the tokenizer in {folder} cannot be opened: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))


def device_of(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(settings: Settings) -> str | None:
    return settings.dtype or ("bfloat16" if device_of(settings).startswith("cuda") else None)


def check_machine(settings: Settings) -> None:
    """Raises ValueError for an unknown device or dtype, and for prompts that the memory cannot hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for key in ("lengths", "distances", "shots"):
        longest = max(getattr(settings, key) or (0,))
        needed = longest * BYTES_PER_TOKEN
        if needed > memory:
            raise ValueError(
                f"{key}={longest}: to write such a prompt takes some {needed / 1e9:,.0f} GB of memory, and "
                f"this machine has {memory / 1e9:.0f} GB"
            )
    device = device_of(settings)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None
    if torch.device(device).type == "meta":
        raise ValueError("device=meta holds shapes alone; use device=cpu")
    dtype = getattr(torch, settings.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={settings.dtype!r}: expected bfloat16, float16, float32 or float64")


def identify(source: Source, settings: Settings) -> dict[str, Any]:
    """What answers depend on besides the item: the bytes of weights, config and tokenizer."""
    tokenizer = _tokenizer_folder(source, settings)
    if source.scripted is not None:
        words = _tokenizer_digest(tokenizer) if tokenizer else "bytes"
        named = {"path": source.path, "weights": source.path, "config": "none"}
        return {**named, "tokenizer": words, "dtype": None}
    folder = source.folder
    return {
        "path": source.path,
        **({} if is_ours(_config(folder)) else {"asked": FOREIGN_FORMAT}),
        "weights": _digest(_weight_files(folder)),
        "config": _digest([folder / "config.json", folder / "generation_config.json"]),
        "tokenizer": _tokenizer_digest(tokenizer or folder),
        "dtype": dtype_of(settings),
    }


def _tokenizer_digest(folder: Path) -> str:
    return _digest(sorted(file for file in folder.iterdir() if file.name.startswith(TOKENIZER_PREFIXES)))


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


def _tokenizer_folder(source: Source, settings: Settings) -> Path | None:
    """The model's own, or what `tokenizer=` names for those that have none; None: bytes are tokens."""
    if _has_tokenizer(source):
        return source.folder
    if settings.tokenizer:
        return Path(settings.tokenizer)
    return None if source.scripted is not None else source.folder


def _has_tokenizer(source: Source) -> bool:
    return source.scripted is None and has_tokenizer(source.folder)


def tokenizer_of(source: Source, settings: Settings) -> Any:
    folder = _tokenizer_folder(source, settings)
    return byte_tokenizer() if folder is None else open_tokenizer(str(folder))


def open_model(source: Source, settings: Settings, tokenizer: Any) -> EvalModel | ScriptedModel:
    """Raises ValueError for weights that cannot be read, and for a tokenizer that is not the model's."""
    if source.scripted is not None:
        return SCRIPTED[source.scripted](tokenizer)
    device = device_of(settings)
    default = 65536 if device.startswith("cuda") else 4096
    return EvalModel(
        load_model(str(source.folder), dtype_of(settings), device),
        tokenizer,
        piece=settings.piece,
        batch_tokens=settings.batch_tokens or default,
        allow_long=settings.allow_long,
    )

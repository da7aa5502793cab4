"""What a command that makes one model folder from another does besides the model."""

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tokenizer's files from one model folder to another; the names of those that were there."""
    present = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in present:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return present


def check_is_new(path: str | Path) -> None:
    """Raises ValueError unless `path` is free, or an empty folder."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose a new folder or remove it")

"""Model folders on disk: a new one appears whole or not at all, and takes its tokenizer along."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tokenizer's files from one model folder to another; the names of those that were there."""
    present = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in present:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return present


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `path` when the block ends well, and else vanishes.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose a new folder or remove it")
    beside = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

"""Pretokenised corpora: a token file and a document index for each source file, and a manifest.

OUT/manifest.json            version, tokenizer, vocabulary size, dtype, files and their counts
OUT/{name}.tokens            the documents' tokens one after another, little-endian uint16 or uint32
OUT/{name}.index.npy         int64 [lines + 1]: line i holds tokens index[i] .. index[i + 1] (none if empty)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.corpus import names_fingerprint

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "pretokenize.json"  # the settings of a folder that is still being written


@dataclass(frozen=True)
class TokenFile:
    name: str
    path: Path  # without suffix
    dtype: str
    lines: int

    @cached_property
    def _tokens(self) -> np.ndarray:
        path = token_path(self.path)
        if path.stat().st_size == 0:  # nothing to map
            return np.empty(0, dtype=self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r")

    @cached_property
    def _index(self) -> np.ndarray:
        return np.load(index_path(self.path), mmap_mode="r")

    def document(self, line: int) -> np.ndarray:
        """int32 tokens of one line, end-of-text included; empty where the line holds no document."""
        return self._tokens[self._index[line] : self._index[line + 1]].astype(np.int32)


@dataclass(frozen=True)
class TokenCorpus:
    root: Path
    files: tuple[TokenFile, ...]
    manifest: dict

    def fingerprint(self) -> str:
        return names_fingerprint([file.name for file in self.files])

    def check_tokenizer(self, fingerprint: str) -> None:
        if fingerprint != self.manifest["tokenizer"]:
            raise ValueError(
                f"{self.root} was written with another tokenizer (fingerprint {self.manifest['tokenizer']}, "
                f"vocabulary {self.manifest['vocabulary_size']}; this one: {fingerprint}): pretokenise "
                "again with "
                "the tokenizer of this model, or train from the jsonl files"
            )


def token_path(path: Path) -> Path:
    return path.with_name(path.name + ".tokens")


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index.npy")


def counts_path(path: Path) -> Path:
    return path.with_name(path.name + ".counts.json")


def is_token_folder(root: Path) -> bool:
    return _is_manifest(root / MANIFEST) or (root / UNFINISHED).exists()


def _is_manifest(path: Path) -> bool:
    try:
        return "token_format" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def open_token_corpus(root: Path) -> TokenCorpus:
    if not (root / MANIFEST).exists():
        raise ValueError(
            f"{root} is not finished: run the same `python -m data.pretokenize` command again to go on"
        )
    manifest = json.loads((root / MANIFEST).read_text())
    if manifest["token_format"] != FORMAT_VERSION:
        raise ValueError(
            f"{root} has token format {manifest['token_format']}, this code reads {FORMAT_VERSION}: "
            "pretokenise again"
        )
    files = tuple(
        TokenFile(entry["name"], root / entry["name"], manifest["dtype"], entry["lines"])
        for entry in manifest["files"]
    )
    for file, entry in zip(files, manifest["files"], strict=True):
        _check_size(file, entry["tokens"])
    return TokenCorpus(root, files, manifest)


def _check_size(file: TokenFile, n_tokens: int) -> None:
    expected = n_tokens * np.dtype(file.dtype).itemsize
    size = token_path(file.path).stat().st_size if token_path(file.path).exists() else None
    if size != expected or not index_path(file.path).exists():
        raise ValueError(
            f"{token_path(file.path)} should have {expected} bytes and an index beside it, found {size}: "
            "delete the folder and pretokenise again"
        )

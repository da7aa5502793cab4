"""Where the documents lie: the files of a corpus, and the order in which an epoch reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".jsonl")
EXPECTED = (
    'expected a folder with *.jsonl, *.jsonl.zst or *.jsonl.gz (directly or in chunk*/), one {"text": ...} '
    "object a line, or a folder written by `python -m data.pretokenize`"
)


@dataclass(frozen=True)
class CorpusFile:
    name: str  # relative to the corpus, without suffix: the same for a file and its compressed twin
    path: Path


@dataclass(frozen=True)
class Corpus:
    root: Path
    files: tuple[CorpusFile, ...]
    text_field: str = "text"

    def fingerprint(self) -> str:
        return names_fingerprint([file.name for file in self.files])


def names_fingerprint(names: list[str]) -> str:
    """The same for a corpus, its compressed and its pretokenised copy: their positions are the same."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def epoch_order(names: list[str], seed: int | None, epoch: int) -> list[int]:
    """Indices of `names` in reading order; sorted for seed None.

    A hash of (seed, epoch, name) shuffles them alike on every machine and Python version.
    """
    if seed is None:
        return sorted(range(len(names)), key=names.__getitem__)
    digests = [hashlib.sha256(f"{seed}:{epoch}:{name}".encode()).digest() for name in names]
    return sorted(range(len(names)), key=digests.__getitem__)


def open_corpus(path: str | Path, text_field: str = "text"):
    """Open a folder of jsonl files (or one such file), or a pretokenised folder.

    Returns a `Corpus` or a `data.tokens.TokenCorpus`; the loaders take either.
    Raises ValueError when nothing is there, saying what is expected where.
    """
    from data.tokens import is_token_folder, open_token_corpus

    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"corpus {root} does not exist: {EXPECTED}")
    if root.is_dir() and is_token_folder(root):
        return open_token_corpus(root)
    paths = sorted(_below(root)) if root.is_dir() else [root]
    base = root if root.is_dir() else root.parent
    files = [_corpus_file(base, entry) for entry in paths if _is_source(base, entry)]
    if not files:
        raise ValueError(f"corpus {root} holds no documents' file: {EXPECTED}")
    _refuse_twins(files)
    if not any(file.path.stat().st_size for file in files):
        raise ValueError(f"corpus {root} is empty: its {len(files)} file(s) have no bytes; {EXPECTED}")
    return Corpus(root, tuple(sorted(files, key=lambda file: file.name)), text_field)


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file of a folder; links to folders are followed, since chunks may lie on several disks."""
    real = os.path.realpath(folder)
    if real in above:  # a link back to where it lies
        return
    for entry in os.scandir(folder):
        yield from _below(Path(entry), (*above, real)) if entry.is_dir() else [Path(entry)]


def _is_source(base: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
    return path.name.endswith(SUFFIXES) and not hidden and path.is_file()


def _corpus_file(base: Path, path: Path) -> CorpusFile:
    name = path.relative_to(base).as_posix()
    suffix = next(suffix for suffix in SUFFIXES if name.endswith(suffix))
    return CorpusFile(name.removesuffix(suffix), path)


def _refuse_twins(files: list[CorpusFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if file.name in seen:
            raise ValueError(
                f"{seen[file.name]} and {file.path} are the same file twice (plain and compressed): "
                "keep one of them, or its documents are trained twice"
            )
        seen[file.name] = file.path

"""The data sets that `data_name` selects.

To add one: a function from a path to a corpus, and its line in DATASETS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from data.corpus import Corpus, open_corpus
from data.tokens import TokenCorpus

AnyCorpus = Corpus | TokenCorpus


def jsonl_folder(path: str | Path) -> AnyCorpus:
    """chunk*/ with jsonl files, field "text" (SlimPajama-chunked and everything laid out like it)."""
    return open_corpus(path)


def quickstart_folder(path: str | Path) -> AnyCorpus:
    """What `python -m data.quickstart` wrote: the folder (its train/), or its train/ or validation/."""
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"corpus {path} does not exist: build it with `python -m data.quickstart out=FOLDER`"
        )
    return open_corpus(path / "train" if (path / "train").is_dir() else path)


DATASETS: dict[str, Callable[[str | Path], AnyCorpus]] = {
    "slimpj": jsonl_folder,
    "corpus": jsonl_folder,
    "quickstart": quickstart_folder,
}


def open_dataset(data_name: str, data_path: str | Path) -> AnyCorpus:
    """Raises ValueError for an unknown name, listing the known ones, and for a missing or empty corpus."""
    if data_name not in DATASETS:
        close = difflib.get_close_matches(data_name, DATASETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown data_name {data_name!r}{hint}: known are {', '.join(sorted(DATASETS))}")
    return DATASETS[data_name](data_path)

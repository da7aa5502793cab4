"""Small corpora whose documents name themselves."""

import gzip
import itertools
import json
from pathlib import Path

import zstandard


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts))
    return path


def document(number: int) -> str:
    """`[number]` and a filling of a length of its own, now and then a long one."""
    return f"[{number}]" + "abcdefghij"[number % 10] * (number * 7919 % 61 + (400 if number % 17 == 0 else 0))


def make_corpus(root: Path, n_documents: int = 120, n_files: int = 5) -> list[str]:
    """Five files in two chunks; every 11th document is empty. Returns the non-empty texts."""
    texts = ["" if number % 11 == 3 else document(number) for number in range(n_documents)]
    for index in range(n_files):
        write_jsonl(root / f"chunk{1 + index % 2}" / f"part_{index}.jsonl", texts[index::n_files])
    return [text for text in texts if text]


def compress(root: Path, target: Path, kind: str) -> Path:
    for path in root.rglob("*.jsonl"):
        out = target / path.relative_to(root).with_suffix(f".jsonl.{kind}")
        out.parent.mkdir(parents=True, exist_ok=True)
        pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
        content = path.read_bytes()
        # two members in one file: tools that compress in parallel write such
        out.write_bytes(pack(content[:1000]) + pack(content[1000:]))
    return target


def take(loader, n_batches: int) -> list[dict]:
    return list(itertools.islice(loader, n_batches))


def rows(batches: list[dict]) -> list[tuple[int, list[int]]]:
    """(slot, tokens) of every sequence, in order."""
    return [
        (slot, ids)
        for batch in batches
        for slot, ids in zip(batch["slots"], batch["input_ids"].tolist(), strict=True)
    ]

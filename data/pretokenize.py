"""Tokenise a corpus once: the same sequences as from its jsonl files, faster.

    python -m data.pretokenize in=FOLDER out=FOLDER tokenizer=FOLDER [workers=N]

A source file is finished or not there at all; the same command goes on where a killed one stopped. The layout
is described in data/tokens.py, and every loader opens the folder like any other corpus.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.arguments import REQUIRED, parse_arguments, run_command
from data.corpus import Corpus, CorpusFile, open_corpus
from data.encoding import Encoder, load_tokenizer, tokenizer_fingerprint
from data.health import BrokenReport, Health
from data.lines import BrokenLineError, Line, parse_document, read_lines
from data.tokens import (
    FORMAT_VERSION,
    MANIFEST,
    UNFINISHED,
    counts_path,
    index_path,
    token_path,
)

BATCH_BYTES = 1 << 21  # of text, a thread


def main(arguments: list[str]) -> None:
    settings = parse_arguments(
        arguments,
        {
            "in": (Path, REQUIRED),
            "out": (Path, REQUIRED),
            "tokenizer": (Path, REQUIRED),
            "workers": (int, os.cpu_count() or 1),
        },
    )
    if settings["workers"] < 1:
        raise ValueError(f"workers is {settings['workers']}: expected at least 1")
    tokenizer = load_tokenizer(settings["tokenizer"])
    manifest = pretokenize(
        settings["in"], settings["out"], tokenizer, workers=settings["workers"], report=print
    )
    totals = {
        key: sum(entry[key] for entry in manifest["files"]) for key in ("tokens", "documents", "broken")
    }
    print(f"{settings['out']}: " + ", ".join(f"{value} {key}" for key, value in totals.items()))


def pretokenize(
    source: str | Path,
    out: str | Path,
    tokenizer,
    *,
    workers: int = 1,
    report: Callable[[str], None] | None = None,
) -> dict:
    """Write token files for a jsonl corpus; answers the manifest. `workers`: number of tokenizer threads.

    Raises ValueError for a bad corpus, and for an `out` that holds something else.
    """
    corpus, out = open_corpus(source), Path(out)
    if not isinstance(corpus, Corpus):
        raise ValueError(f"{source} is pretokenised already")
    settings = {
        "token_format": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary_size": len(tokenizer),
        "dtype": "<u2" if len(tokenizer) <= 1 << 16 else "<u4",
    }
    _claim(out, settings)
    encoder, health = Encoder(tokenizer, workers), Health()
    entries = []
    for file in corpus.files:
        entries.append(
            _finished(out, file) or _write_file(corpus, file, out, settings["dtype"], encoder, health)
        )
        for broken in health.take_news():
            (report or print)(f"skipped a broken line: {broken}")
        if report:
            report(f"{file.name}: {entries[-1]['documents']} documents, {entries[-1]['tokens']} tokens")
    manifest = {**settings, "files": [{k: v for k, v in e.items() if k != "source_bytes"} for e in entries]}
    _write_atomically(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    (out / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _claim(out: Path, settings: dict) -> None:
    """Begin a folder, or go on with one that was begun in the same way."""
    for name in (UNFINISHED, MANIFEST):
        if (out / name).exists():
            begun = json.loads((out / name).read_text())
            if any(begun.get(key) != value for key, value in settings.items()):
                raise ValueError(
                    f"{out} was begun with another tokenizer or format: give another out=, or delete it"
                )
            return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is a file or holds other files: give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_atomically(out / UNFINISHED, json.dumps(settings).encode())


def _finished(out: Path, file: CorpusFile) -> dict | None:
    """The counts of a file that is already written, if its source is still the same size."""
    path = counts_path(out / file.name)
    if not path.exists():
        return None
    counts = json.loads(path.read_text())
    return counts if counts["source_bytes"] == file.path.stat().st_size else None


def _write_file(
    corpus: Corpus, file: CorpusFile, out: Path, dtype: str, encoder: Encoder, health: Health
) -> dict:
    target = out / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = token_path(target).with_suffix(".tokens.tmp")
    index, broken = array("q", [0]), health.broken
    with open(partial, "wb") as tokens_file:
        for lines in _batches(read_lines(file.path), BATCH_BYTES * encoder.threads):
            for tokens in _encode(corpus, file, lines, encoder, health):
                tokens_file.write(tokens.astype(dtype).tobytes())
                index.append(index[-1] + tokens.size)
        tokens_file.flush()
        os.fsync(tokens_file.fileno())
    ends = np.array(index, dtype="<i8")
    counts = {
        "name": file.name,
        "source_bytes": file.path.stat().st_size,
        "lines": len(ends) - 1,
        "documents": int((np.diff(ends) > 0).sum()),
        "tokens": int(ends[-1]),
        "broken": health.broken - broken,
    }
    os.replace(partial, token_path(target))
    _save_index(index_path(target), ends)
    # last of the three: its presence says that the other two are whole
    _write_atomically(counts_path(target), json.dumps(counts).encode())
    return counts


def _batches(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    batch, filled = [], 0
    for line in lines:
        batch.append(line)
        filled += len(line.raw)
        if filled >= size:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _encode(
    corpus: Corpus, file: CorpusFile, lines: list[Line], encoder: Encoder, health: Health
) -> list[np.ndarray]:
    """Tokens of each line; none for an empty or broken one, which keeps its number all the same."""
    texts, reports = [], []
    for line in lines:
        try:
            if line.problem:
                raise BrokenLineError(line.problem)
            texts.append(parse_document(line.raw, corpus.text_field))
        except BrokenLineError as error:
            reports.append(BrokenReport(file.name, line.number + 1, str(error)))
            texts.append("")
    health.add(len(lines), reports)
    return encoder.encode(texts)


def _save_index(path: Path, ends: np.ndarray) -> None:
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        np.save(file, ends)
    os.replace(partial, path)


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    run_command(main)

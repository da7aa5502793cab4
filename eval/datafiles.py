"""Rows of downloaded data sets: parquet, JSON lines or CSV in a folder, as on the Hugging Face hub."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

DOWNLOAD = "python huggingface/download.py --only eval"
JSON_LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (".parquet", *JSON_LINES, ".json", ".csv")
Problem = Callable[[dict[str, Any]], str | None]  # what is wrong with a row, if anything


class RowError(ValueError):
    """A row that cannot be asked about, with where it stands."""


def split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split as the hub names them: `validation-00000-of-00001.parquet`, `validation.jsonl`."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith(SUFFIXES)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    named = [file for file in files if split in file.relative_to(folder).as_posix()]
    return named or ([] if any(_names_a_split(file, folder) for file in files) else files)


def _names_a_split(file: Path, folder: Path) -> bool:
    name = file.relative_to(folder).as_posix()
    return any(split in name for split in ("train", "validation", "test"))


def read_rows(
    folder: Path, split: str, fields: Sequence[str], lists: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows in file order. `fields` hold texts, those of them in `lists` lists of texts.

    Raises:
        ValueError: no file of the split, a row without one of the fields or with something else in it, or a
            damaged file.
    """
    files = split_files(folder, split)
    if not files:
        raise ValueError(f"{folder} has no file of the split {split!r} ({', '.join(SUFFIXES)}): {DOWNLOAD}")
    for file in files:
        yield from checked(_rows(file), lambda row: problem_of(row, fields, lists), str(file))


def checked(rows: Iterable[dict[str, Any]], problem: Problem, source: str) -> Iterator[dict[str, Any]]:
    """The rows, as long as they have no problem. Raises RowError, which names source and row."""
    for number, row in enumerate(rows):
        if found := problem(row):
            raise RowError(
                f"{source} row {number}: {found}; is this the right data set? {DOWNLOAD} brings it"
            )
        yield row


def check_files(
    folder: Path, part: str | None, split: str, problem: Problem, suffixes: tuple[str, ...]
) -> int:
    """How many rows the files of a split have, each without a problem.

    Args:
        part: of a data set that has several, each in a folder of that name.
        suffixes: of the files that are read.

    Raises:
        ValueError: a row with a problem, which is named, or a damaged file.
    """
    files = [file for file in split_files(folder, split) if file.name.endswith(suffixes)]
    of_part = [file for file in files if part in file.relative_to(folder).parts]
    return sum(sum(1 for _ in checked(_rows(file), problem, str(file))) for file in of_part or files)


def problem_of(row: dict[str, Any], fields: Sequence[str], lists: Sequence[str] = ()) -> str | None:
    """Is one of the fields missing, or something else than a text, or a list of texts if it is in `lists`?"""
    missing = [field for field in fields if row.get(field) is None]
    if missing:
        there = (str(field) for field, value in row.items() if value is not None)
        return f"no field {', '.join(missing)} (it has {', '.join(there)})"
    for field in fields:
        # a text where a list belongs would be read letter by letter, and every answer be right
        if not (_are_texts(row[field]) if field in lists else isinstance(row[field], str)):
            wanted = "a list of texts" if field in lists else "a text"
            return f"field {field} is not {wanted} but {str(row[field])[:60]!r}"
    return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from _read(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read ({error}); download it again: {DOWNLOAD}") from None


def _read(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise OSError(error) from None
        return
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as handle:
        if file.suffix == ".csv":
            yield from csv.DictReader(handle)
            return
        for number, line in enumerate(handle, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} line {number} is no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file} line {number} is no JSON object")
            yield row

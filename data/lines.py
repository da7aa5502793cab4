"""Lines of a jsonl file, plain or compressed, each with its number and byte offset."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 1 << 20


class Line(NamedTuple):
    number: int  # 0-based within its file
    offset: int  # of its first byte in the (decompressed) file
    end: int  # offset of the next line
    raw: bytes
    problem: str | None  # set where the file itself broke off


class BrokenStreamError(Exception):
    """A compressed file that ends early or does not decompress."""


class BrokenLineError(Exception):
    """A line that holds no document."""


def read_lines(path: Path, number: int = 0, offset: int | None = 0) -> Iterator[Line]:
    """Lines from line `number` on, which starts at byte `offset` of the decompressed text.

    Offset None is not known: then the lines before it are read and dropped. A stream that breaks off ends
    with one line that carries the problem.
    """
    skip = number if offset is None else 0
    start = 0 if offset is None else offset
    line_number = 0 if offset is None else number
    for line in _number(_blocks(path, start), line_number, start):
        if skip:
            skip -= 1
            continue
        yield line


def parse_document(raw: bytes, text_field: str = "text") -> str:
    """The text of one line ("" for a blank line or an empty document). Raises BrokenLineError."""
    if not raw.strip():
        return ""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BrokenLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BrokenLineError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BrokenLineError(f"a JSON {type(record).__name__} where an object is expected")
    if text_field not in record:
        raise BrokenLineError(f"no field {text_field!r}")
    text = record[text_field]
    if not isinstance(text, str):
        raise BrokenLineError(f"field {text_field!r} is a {type(text).__name__}, not a string")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BrokenLineError(f"field {text_field!r} holds half a surrogate pair, which no tokenizer takes")
    return text


def _number(blocks: Iterator[bytes], number: int, offset: int) -> Iterator[Line]:
    tail: list[bytes] = []
    problem = None
    try:
        for block in blocks:
            *complete, rest = block.split(b"\n")
            if complete:
                complete[0] = b"".join((*tail, complete[0]))
                tail.clear()
            for raw in complete:
                end = offset + len(raw) + 1
                yield Line(number, offset, end, raw, None)
                number, offset = number + 1, end
            tail.append(rest)
    except BrokenStreamError as error:
        problem = str(error)
    raw = b"".join(tail)
    if raw or problem:
        yield Line(number, offset, offset + len(raw), raw, problem)


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    if path.suffix == ".gz":
        blocks = _decompress(path, lambda: zlib.decompressobj(wbits=31), zlib.error)
    elif path.suffix == ".zst":
        zstandard = _import_zstandard(path)
        blocks = _decompress(path, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    else:
        yield from _plain(path, start)
        return
    for block in blocks:
        # a compressed file has no other way to a position than through everything before it
        if start >= len(block):
            start -= len(block)
            continue
        yield block[start:]
        start = 0


def _plain(path: Path, start: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(BLOCK_BYTES):
            yield block


def _decompress(path: Path, new_stream, error_type) -> Iterator[bytes]:
    """Every frame (or gzip member) of the file in turn; the library's own readers hide a cut zstd frame."""
    stream, fed = new_stream(), False
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES // 4):
            while data:
                if stream.eof:
                    stream, fed = new_stream(), False
                try:
                    block = stream.decompress(data)
                except error_type as error:
                    raise BrokenStreamError(
                        f"does not decompress ({error}): the rest of the file is lost"
                    ) from None
                data, fed = (stream.unused_data if stream.eof else b""), True
                if block:
                    yield block
    if fed and not stream.eof:
        raise BrokenStreamError("the compressed file ends early: the rest of it is missing")


def _import_zstandard(path: Path):
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} is zstd-compressed: `pip install zstandard` to read it") from None
    return zstandard

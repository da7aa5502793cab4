"""The raw results: a JSONL file that is only ever appended to, one record a finished run.

{"kind": "settings", "fingerprint", "settings"}             the sizes that a fingerprint stands for
{"kind": "base" | "arm" | "cost", "fingerprint", "family", "seed", "arm", ...}
{"kind": "choice", "fingerprint", "family", "best", ...}    which arms the sweep of drop_prop follows
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str, int, str]  # kind, family, seed, arm


def key_of(record: Record) -> Key:
    return record["kind"], record.get("family", ""), record.get("seed", -1), record.get("arm", "")


def read_records(file: Path) -> list[Record]:
    """All whole records. A last line without its end, left by a kill, is skipped.

    Raises:
        ValueError: a damaged line elsewhere.
    """
    return list(_records(file)) if file.is_file() else []


def _records(file: Path) -> Iterator[Record]:
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise ValueError(f"{file} line {number} is damaged: delete this line and run again") from None


class Store:
    """Records of one fingerprint in a file that others may share."""

    def __init__(self, file: Path, fingerprint: str, settings: dict[str, Any]) -> None:
        self.file, self.fingerprint = file, fingerprint
        file.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_end(file)
        everything = read_records(file)
        self.records = [r for r in everything if r["fingerprint"] == fingerprint]
        if not any(r["kind"] == "settings" for r in self.records):
            self.append({"kind": "settings", "settings": settings})

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        record = {"kind": record["kind"], "fingerprint": self.fingerprint, **record}
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.records.append(record)

    def newest(self, kind: str, family: str, seed: int = -1, arm: str = "") -> Record | None:
        key = (kind, family, seed, arm)
        return next((r for r in reversed(self.records) if key_of(r) == key), None)

    def check_corpus(self, digest: str) -> None:
        """Raises ValueError when runs in the file saw other data (another Python has another library)."""
        other = {r["corpus"] for r in self.records if "corpus" in r} - {digest}
        if other:
            raise ValueError(
                f"{self.file} holds runs on corpus {other.pop()}, and this Python's library makes {digest}: "
                "give another results=FILE"
            )


def _cut_torn_end(file: Path) -> None:
    if not file.is_file():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(file, "r+b") as out:
            out.truncate(whole)

"""Finished answers, one JSON line each: what an interrupted evaluation has done is not done again.

DIR/{model}/model.json says which model the folder belongs to, DIR/{model}/answers/{task}.jsonl holds the
answers.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]
SYNC_SECONDS = 1.0  # what a power failure may cost of what was added; a killed process loses none of it
_encode = json.JSONEncoder(ensure_ascii=False).encode


class Store:
    """Answers of one model. Use as a context manager: the folder is locked meanwhile.

    Raises:
        ValueError: the folder belongs to another model, or another run is writing to it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity
        self._task = ""  # the one that is being answered, and its file
        self._handle: TextIO | None = None
        self._synced = 0.0
        check_identity(folder, identity)

    def __enter__(self) -> "Store":
        (self.folder / "answers").mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            write_json(self.folder / "model.json", self.identity)
            stack.callback(self._close)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with handle:
                os.fsync(handle.fileno())

    def _file(self, task: str) -> Path:
        return self.folder / "answers" / f"{task.replace('/', '_').replace(':', '_')}.jsonl"

    def finished(self, task: str) -> dict[str, Record]:
        """Kept records by fingerprint. A last line that an interruption tore off is removed from the file."""
        file = self._file(task)
        if not file.exists():
            return {}
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with open(file, "r+b") as handle:
                handle.truncate(whole)
        records: dict[str, Record] = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["fingerprint"]] = record
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
                raise ValueError(
                    f"{file} line {number} is damaged; delete that line to have its item run again"
                ) from None
        return records

    def add(self, task: str, records: Iterable[Record]) -> None:
        """Append. The system has it then, and the disk after SYNC_SECONDS at most while answers come in."""
        if self._handle is None or self._task != task:
            self._close()
            self._task = task
            self._handle = open(self._file(task), "a", encoding="utf-8")  # noqa: SIM115 - _close does
        size = os.fstat(self._handle.fileno()).st_size
        try:
            self._handle.write("".join(_encode(record) + "\n" for record in records))
            self._handle.flush()
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()
        except OSError:  # a full disk: neither a torn line nor what is left of these stays behind
            handle, self._handle = self._handle, None
            with contextlib.suppress(OSError):
                handle.close()
            with contextlib.suppress(OSError):
                os.truncate(self._file(task), size)
            raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises ValueError while another process holds the folder."""
    with open(folder / ".lock", "w") as handle:  # no model's label
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another evaluation is writing to {folder}; wait, or give another output="
            ) from None
        yield


def belongs(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds answers of this model, by whatever path it is named."""
    return _has_answers(folder) and not _different(_kept_identity(folder), identity)


def _has_answers(folder: Path) -> bool:
    return any(file.stat().st_size for file in (folder / "answers").glob("*.jsonl"))


def _different(kept: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    return [name for name in identity if name != "path" and kept.get(name) != identity[name]]


def _kept_identity(folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, FileNotFoundError):
        raise ValueError(f"{file} is damaged; give another output=, or remove {folder}") from None


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError when the folder holds the answers of a model that is not this one.

    One without answers belongs to nobody: its model could not be loaded, and may have been repaired.
    """
    if not _has_answers(folder):
        return
    kept = _kept_identity(folder)
    different = _different(kept, identity)
    if different:
        raise ValueError(
            f"{folder} holds the answers of another model ({kept.get('path')}; different: "
            f"{', '.join(different)}); give another output=, or remove that folder"
        )


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    part = file.with_name(file.name + ".tmp")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)

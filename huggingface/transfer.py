"""Files of the Hub over HTTP, of which the next command asks only for what is missing.

huggingface_hub's own downloads begin a file anew after an interruption, and one of the corpus has up to
48 GB. Here what arrived stays beside its target, in `{name}.{tag}.part`, whatever ended the command: Ctrl-C,
kill -9 or the network. The rest comes as an HTTP range, which repositories in Xet storage serve as well. The
tag is of the file's checksum: a part of another version is never continued, and the whole file is checked.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import hf_raise_for_status
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, http_stream_backoff
from tqdm import tqdm

RECORD = Path(".cache", "download.json")  # in a folder: which version each of its files is
PARTIAL = ".partial"  # ends the name of a folder that is not whole
WORKERS = 4  # files at once; one connection seldom fills the line
ATTEMPTS = 5  # in a row of which none brought a byte
PASSING = (408, 500, 502, 503, 504)  # answers that may be others a moment later
BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        name: path in the repository, and below the folder it goes to.
        size: in bytes.
        checksum: sha256 of a file in LFS or Xet storage, git's sha1 of any other; `commit-...` from a mirror
            that tells neither, and then only the size is checked.
    """

    name: str
    size: int
    checksum: str
    url: str


# ----------------------------------------------------------------------------------------------------
# what is there


def read_record(folder: Path) -> dict[str, str]:
    """File -> checksum; a damaged record is none, and the files are then read to be known."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_record(folder: Path, record: dict[str, str]) -> None:
    (folder / RECORD).parent.mkdir(parents=True, exist_ok=True)
    beside = folder / RECORD.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, folder / RECORD)


def missing_bytes(folder: Path, files: Iterable[RemoteFile]) -> int:
    """What is still to be fetched. A file that no record knows counts by its size, and is read later."""
    record = read_record(folder)
    return sum(_missing(folder, file, record) for file in files)


def _missing(folder: Path, file: RemoteFile, record: dict[str, str]) -> int:
    if _has_size(folder / file.name, file) and record.get(file.name, file.checksum) == file.checksum:
        return 0
    return max(file.size - _size(_part(folder / file.name, file)), 0)


def _has_size(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _part(target: Path, file: RemoteFile) -> Path:
    return target.with_name(f"{target.name}.{file.checksum[:16]}.part")


def _remove_parts(target: Path, but: Path | None = None) -> None:
    for part in target.parent.glob("*.part"):
        if part.name.rsplit(".", 2)[0] == target.name and part != but:
            part.unlink(missing_ok=True)


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether size and checksum are the Hub's. Reads all of the file."""
    if not _has_size(path, file):
        return False
    if len(file.checksum) == 64:
        digest = hashlib.sha256()
    elif len(file.checksum) == 40:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    else:
        return True
    if file.size > 1e9:
        tqdm.write(f"checking {file.name}", file=sys.stderr)  # the bar stands still meanwhile
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest() == file.checksum


# ----------------------------------------------------------------------------------------------------
# a folder


def work_folder(folder: Path) -> Path:
    """Beside the final one until that is there."""
    return folder if folder.exists() else folder.with_name(folder.name + PARTIAL)


def fetch_folder(folder: Path, files: Sequence[RemoteFile], subset: bool) -> None:
    """Complete a folder. What ends it early leaves no mixture of two versions under the final name.

    A new folder appears when it is whole. In one that is there, files wait in parts until all of them came,
    and are put in place while the folder has the name of a partial one.

    Args:
        subset: whether more files of the same version may follow. They are put in place as they come, and
            other files stay; else recorded ones that are not among `files` are removed in the end.

    Raises:
        HTTPError, OSError: of the first file that did not come. What arrived stays.
    """
    work, beside = work_folder(folder), folder.with_name(folder.name + PARTIAL)
    record = read_record(work)
    changed = any(record.get(file.name, file.checksum) != file.checksum for file in files)
    waiting = fetch_files(work, files, at_once=work == beside or (subset and not changed))
    dropped = set() if subset else record.keys() - {file.name for file in files}
    if work == folder:  # what is beside was begun before the folder came from elsewhere
        shutil.rmtree(beside, ignore_errors=True)
        if waiting or dropped:
            with contextlib.suppress(OSError):  # a mount point keeps its name
                work = folder.rename(beside)
    if waiting or dropped:
        _exchange(work, waiting, dropped)
    if work == beside:
        work.rename(folder)


def _exchange(folder: Path, waiting: Sequence[RemoteFile], dropped: Collection[str]) -> None:
    """Meanwhile no record knows the files that change: after an interruption they are read."""
    for name in dropped:
        (folder / name).unlink(missing_ok=True)
    touched = {*dropped, *(file.name for file in waiting)}
    record = {name: checksum for name, checksum in read_record(folder).items() if name not in touched}
    write_record(folder, record)
    for file in waiting:
        os.replace(_part(folder / file.name, file), folder / file.name)
    write_record(folder, record | {file.name: file.checksum for file in waiting})


def fetch_files(folder: Path, files: Sequence[RemoteFile], at_once: bool) -> list[RemoteFile]:
    """Fetch what is missing, with a progress bar over all bytes; the files that wait in parts.

    The first error ends it. So does Ctrl-C, at once: threads that wait for the network are left behind.

    Args:
        at_once: whether each file is put in place when it is whole.
    """
    waiting: list[RemoteFile] = []
    record = read_record(folder)
    known = [f for f in files if _has_size(folder / f.name, f) and record.get(f.name) == f.checksum]
    _clear(folder, known)
    recording = threading.Lock()
    total = sum(file.size for file in files)
    with tqdm(
        total=total,
        initial=total - missing_bytes(folder, files),
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # in a log file every refresh is a line
    ) as bar:

        def advance(amount: int) -> None:
            with bar.get_lock():
                bar.update(amount)

        def fetch(file: RemoteFile, stop: threading.Event) -> None:
            if fetch_file(folder / file.name, file, file.name in record, at_once, advance, stop):
                with recording:
                    record[file.name] = file.checksum
                    write_record(folder, record)
            else:
                waiting.append(file)

        _side_by_side([file for file in files if file not in known], fetch)
    return waiting


def _clear(folder: Path, done: Iterable[RemoteFile]) -> None:
    """Away with parts of files that are done, and with huggingface_hub's, which nothing continues."""
    for file in done:
        _remove_parts(folder / file.name)
    for left in (folder / ".cache" / "huggingface").rglob("*.incomplete"):
        left.unlink(missing_ok=True)


def _side_by_side(files: Sequence[RemoteFile], fetch: Callable[[RemoteFile, threading.Event], None]) -> None:
    """Daemon threads instead of a pool: Python would wait for a pool's at its exit."""
    stop = threading.Event()
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                file = waiting.get_nowait()
                try:
                    fetch(file, stop)
                    ended.put(None)
                except Exception as error:
                    ended.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(files)))]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            if (error := ended.get()) is not None:
                raise error
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=0.5)


# ----------------------------------------------------------------------------------------------------
# one file


def fetch_file(
    target: Path,
    file: RemoteFile,
    recorded: bool,
    at_once: bool,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> bool:
    """Continue a file until it is whole or stopped; whether it is in its place then.

    Args:
        recorded: whether it is known that a file in its place is another version; else that one is read.
        at_once: whether it is put in its place; else it stays a part.
        advance: told how many bytes came, or less than nothing for those that turned out useless.

    Raises:
        HTTPError, OSError: it did not come, or came damaged, and then its part is gone too.
    """
    if not recorded and _has_size(target, file):
        if is_whole(target, file):
            _remove_parts(target)
            return True
        advance(_size(_part(target, file)) - file.size)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target, file)
    _remove_parts(target, but=part)
    with part.open("ab") as handle:
        _lock(handle, part)
        _receive(file, handle, advance, stop)
        if stop.is_set():
            return False
        os.fsync(handle.fileno())
        if not is_whole(part, file):
            part.unlink()
            raise OSError(f"{file.name} came damaged (its checksum is not the Hub's) and was removed")
        if at_once:
            os.replace(part, target)
        return at_once


def _lock(handle: BinaryIO, part: Path) -> None:
    """Raises OSError while another process writes the part."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another download is writing {part}") from None
    except OSError:
        pass  # a file system without locks


def _receive(
    file: RemoteFile, handle: BinaryIO, advance: Callable[[int], None], stop: threading.Event
) -> None:
    """Ask for the rest until it is there, however often a connection that brought something breaks."""
    failures = 0
    while (had := handle.seek(0, os.SEEK_END)) < file.size and not stop.is_set():
        reason: Exception = OSError(f"{file.name} ended after {had} of {file.size} bytes")
        try:
            _receive_rest(file, had, handle, advance, stop)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            reason = error
        if had < handle.seek(0, os.SEEK_END):
            failures = 0
        elif (failures := failures + 1) > ATTEMPTS:
            raise reason
        if handle.tell() < file.size:
            stop.wait(0.5 * 2**failures)


def _receive_rest(
    file: RemoteFile, had: int, handle: BinaryIO, advance: Callable[[int], None], stop: threading.Event
) -> None:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a range of compressed bytes is no use
    if had:
        headers["Range"] = f"bytes={had}-"
    with http_stream_backoff(
        "GET",
        file.url,
        headers=headers,
        timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(429,),  # it says how long to wait
    ) as response:
        hf_raise_for_status(response)
        if had and not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
            handle.truncate(0)  # all of it comes, from a server that knows no ranges
            advance(-had)
        for chunk in response.iter_bytes():
            handle.write(chunk)
            handle.flush()  # what stands in a buffer would not survive a kill
            advance(len(chunk))
            if stop.is_set():
                return

"""What makes a folder a complete checkpoint: a list of its files with sizes and checksums, durably written.

Checksums are xxh3-128 (xxhash): above 10 GB/s on one core, and made to notice damage, not to withstand an
attacker.
"""

import json
import os
from pathlib import Path

import xxhash

MANIFEST = Path("state") / "manifest.json"
_CHUNK = 16 * 2**20


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then list them all in state/manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for path in files:
        sync(path)
        listed[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "xxh3_128": checksum(path),
        }
    target = folder / MANIFEST
    target.write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    sync(target)
    for directory in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        sync(directory)


def problem_of(folder: Path) -> str | None:
    """None when `folder` is what its manifest says, else one line naming the first file that is not."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} is missing or unreadable ({type(error).__name__})"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if checksum(path) != digest:
            return f"{path} does not match its checksum"
    return None


def sync(path: Path) -> None:
    """Wait until a file's, or a directory's, contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

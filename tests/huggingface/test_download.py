"""Downloads from a Hub on this machine, through the real client: sizes, pins, resuming, failures.

What ends a command (kill -9, Ctrl-C, a broken connection) is tried on the command itself. The server says how
far it goes before it breaks or waits, so that no test depends on how fast the machine is.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import HfApi

from huggingface import transfer
from huggingface.download import LOCK, SOURCES, human, main, plan, read_lock

ROOT = Path(__file__).parents[2]
MODEL = "fla-hub/gla-1.3B-100B"
CORPUS = "AlppAI/SlimPajama-chunked"
FDA = "hazyresearch/based-fda"
SQUAD = "hazyresearch/based-squad"
LARGE = (".safetensors", ".bin", ".jsonl")  # in LFS: named by their sha256, and served from elsewhere
MB = 1_000_000
FIRST = "1" * 40


def noise(size: int, seed: str = "") -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def checksum(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """What the server serves, how it misbehaves, and what it was asked for."""

    def __init__(self) -> None:
        self.commits: dict[str, list[str]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refuses: dict[str, tuple[int, str]] = {}  # repository -> status, the Hub's name of the error
        self.lost: set[str] = set()  # repositories whose large files are gone
        self.cuts: set[str] = set()  # repositories whose connections break without an answer
        self.breaks: list[int] = []  # the next large files break off after so many bytes
        self.waits_after: int | None = None  # large files come that far, and then nothing more
        self.knows_ranges = True
        self.asked: list[str] = []  # revisions
        self.ranges: list[tuple[str, str | None]] = []  # large files: name, range
        self.over = threading.Event()
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.commits.setdefault(repo, [])
        commits.append(str(len(commits) + 1) * 40)
        self.files[repo, commits[-1]] = files
        return commits[-1]

    def newest(self, repo: str) -> dict[str, bytes]:
        return self.files[repo, self.commits[repo][-1]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path).split("?")[0]
        about = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        stored = re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        repo = next((match[1] for match in (about, file, stored) if match), "")
        if repo in self.hub.cuts:
            self.close_connection = True
        elif repo in self.hub.refuses:
            status, name = self.hub.refuses[repo]
            self.answer(b"", status, {"X-Error-Code": name})
        elif about and about[2] == "tree":
            self.tree(repo, about[3])
        elif about:
            self.repository(repo, about[3])
        elif file:
            self.file(*file.groups())
        elif stored and repo not in self.hub.lost:
            self.storage(*stored.groups())
        else:
            self.answer(b"", 404)

    def repository(self, repo: str, revision: str) -> None:
        self.hub.asked.append(revision)
        commit = self.hub.commits[repo][-1] if revision == "main" else revision
        if (repo, commit) not in self.hub.files:
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            | ({"lfs": {"size": len(content), "sha256": checksum(name, content), "pointerSize": 1}})
            if name.endswith(LARGE)
            else {"rfilename": name, "size": len(content), "blobId": checksum(name, content)}
            for name, content in self.hub.files[repo, commit].items()
        ]
        self.answer(json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def tree(self, repo: str, commit: str) -> None:
        """Asked for by huggingface_hub's own downloads."""
        files = self.hub.files[repo, commit].items()
        rows = [{"type": "file", "path": n, "size": len(c), "oid": checksum(n, c)} for n, c in files]
        self.answer(json.dumps(rows).encode())

    def file(self, repo: str, commit: str, name: str) -> None:
        content = self.hub.files[repo, commit][name]
        tag = {"ETag": f'"{checksum(name, content)}"', "X-Repo-Commit": commit}
        if name.endswith(LARGE):
            tag |= {"X-Linked-ETag": tag["ETag"], "X-Linked-Size": str(len(content))}
            self.answer(b"", 302, tag | {"Location": f"{self.hub.url}/storage/{repo}/{commit}/{name}"})
        else:
            self.answer(content, 200, tag)

    def storage(self, repo: str, commit: str, name: str) -> None:
        content, wanted = self.hub.files[repo, commit][name], self.headers["Range"]
        tag = {"ETag": f'"{checksum(name, content)}"', "X-Repo-Commit": commit}
        if self.command == "HEAD":
            self.answer(content, 200, tag)
            return
        self.hub.ranges.append((name, wanted))
        start = int(wanted[6:].split("-")[0]) if wanted and self.hub.knows_ranges else 0
        end = len(content)
        if self.hub.breaks:
            end = start + self.hub.breaks.pop(0)
        elif self.hub.waits_after is not None:
            end = self.hub.waits_after
        self.send_response(206 if start else 200)
        for key, value in (tag | {"Content-Length": str(len(content) - start)}).items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])
        if self.hub.waits_after is not None:
            self.hub.over.wait(60)
        self.close_connection = end < len(content)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    weights = noise(100)
    model = {
        "config.json": b"{}",
        "model.safetensors": weights,
        "pytorch_model.bin": weights,
        "logo.png": b"p",
    }
    hub.commit(MODEL, model)
    hub.commit(CORPUS, {f"chunk{c}/{i}.jsonl": noise(10, f"{c}{i}") for c in range(2) for i in range(3)})
    hub.commit(FDA, {"data/validation.jsonl": noise(7), "README.md": b"r"})
    hub.commit(SQUAD, {"data/validation.jsonl": noise(8)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads, server.block_on_close = True, False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.over.set()
    server.shutdown()
    server.server_close()


def download(hub: Hub, out: Path, *words: str) -> int:
    return main([*words, f"out={out}"], api=HfApi(endpoint=hub.url))


def start(hub: Hub, out: Path, *words: str) -> subprocess.Popen:
    """The command as a user calls it. It waits long for the network: a test ends it, or what it waits for."""
    offline = {"HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "50", "HF_HOME": str(out.parent / "home")}
    return subprocess.Popen(
        [sys.executable, "huggingface/download.py", *words, f"out={out}"],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, **offline},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(hub: Hub, out: Path, *words: str) -> tuple[int, str, str]:
    with start(hub, out, *words) as process:
        told, errors = process.communicate(timeout=100)
    return process.returncode, told, errors


def size_of(file: Path) -> int:
    """0 of one that is renamed in this moment."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def wait_for_bytes(process: subprocess.Popen, out: Path, amount: int) -> None:
    """Until that many are on the disk, by whatever name."""
    for _ in range(600):
        if sum(size_of(file) for file in out.rglob("*")) >= amount:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{amount} bytes did not come")


def parts(out: Path) -> list[Path]:
    return [file for file in out.rglob("*") if file.name.endswith((".part", ".incomplete"))]


# ----------------------------------------------------------------------------------------------------
# what comes, and which


def test_a_model_comes_once_with_its_size_shown_and_its_commit_kept(
    hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    assert download(hub, tmp_path, "--only", "gla-1.3B-100B") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{MODEL}: 2 files, 102 B -> ")  # not the same weights as .bin, and no picture
    assert shown.index("to fetch: 102 B") < shown.index("[1/1]")
    folder = tmp_path / "gla-1.3B-100B"
    assert sorted(file.name for file in folder.iterdir()) == [".cache", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == hub.newest(MODEL)["model.safetensors"]
    assert json.loads((tmp_path / LOCK).read_text()) == {MODEL: FIRST}


def test_later_downloads_fetch_the_pinned_commit_unless_updated(hub: Hub, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    weights = tmp_path / "gla-1.3B-100B" / "model.safetensors"
    old = weights.read_bytes()
    second = hub.commit(MODEL, {"config.json": b"{}", "model.safetensors": noise(100, "second")})
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert read_lock(tmp_path)[MODEL] == FIRST
    assert weights.read_bytes() == old
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 0
    assert read_lock(tmp_path)[MODEL] == second
    assert weights.read_bytes() == noise(100, "second")  # of the same size as before
    assert hub.asked == ["main", FIRST, "main"]
    assert download(hub, tmp_path, "gla-1.3B-100B", f"--revision={FIRST}") == 0
    assert weights.read_bytes() == old
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert hub.asked[-1] == FIRST  # pinned by --revision


def test_that_update_and_revision_pin_is_said(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "fetch the newest commit and pin it" in told
    assert "fetch this branch, tag or commit and pin it" in told


def test_nothing_that_is_there_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("same", [True, False])
def test_a_file_that_came_by_another_way_is_read_to_be_known(hub: Hub, tmp_path: Path, same: bool) -> None:
    weights = tmp_path / "gla-1.3B-100B" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(hub.newest(MODEL)["model.safetensors"] if same else bytes(100))
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert weights.read_bytes() == hub.newest(MODEL)["model.safetensors"]
    assert len(hub.ranges) == (0 if same else 1)


def test_dry_run_writes_nothing(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    assert download(hub, tmp_path / "out", "only=corpus", "dry_run=true") == 0
    assert "6 files, 60 B" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_some_files_of_the_corpus_then_more(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    assert download(hub, tmp_path, "only=corpus", "files=2") == 0
    folder = tmp_path / "slimpj-chunked"
    assert len(list(folder.rglob("*.jsonl"))) == 2
    assert download(hub, tmp_path, "only=corpus", "files=4") == 0
    assert "4 files, 40 B, 20 B missing" in capsys.readouterr().out
    assert len(list(folder.rglob("*.jsonl"))) == 4


def test_evaluation_data_goes_where_the_evaluation_looks(hub: Hub, tmp_path: Path) -> None:
    from eval.registry import load_families
    from eval.settings import read_settings

    assert download(hub, tmp_path, "based-fda") == 0
    settings = read_settings(["model=m", f"data={tmp_path / 'eval_data'}"])
    families = load_families()
    assert families["recall"].lacks("fda", settings) is None
    folders = {Path(source.folder).name for source in SOURCES if source.group == "eval"}
    for family in ("recall", "icl", "commonsense"):
        for task in families[family].tasks:
            reason = families[family].lacks(task, settings)
            if reason:
                wanted = reason.split(" in ")[1].split(": ")[0].split(", ")
                assert {Path(folder).name for folder in wanted} <= folders


# ----------------------------------------------------------------------------------------------------
# interruptions


def test_a_file_that_is_renamed_while_bytes_are_counted_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "weights.part").symlink_to(tmp_path / "gone")  # listed, and nothing by the time of its stat()
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    with subprocess.Popen(["sleep", "0"]) as process:
        wait_for_bytes(process, tmp_path, 0)


def test_a_killed_download_asks_for_the_rest_only(hub: Hub, tmp_path: Path) -> None:
    weights = noise(12 * MB)
    hub.commit(MODEL, {"config.json": b"{}", "model.safetensors": weights})
    hub.waits_after = 11 * MB
    out = tmp_path / "out"
    with start(hub, out, "gla-1.3B-100B") as process:
        wait_for_bytes(process, out, 10 * MB)
        process.kill()
    kept = sum(part.stat().st_size for part in parts(out))
    assert not (out / "gla-1.3B-100B").exists()  # nothing looks whole
    hub.waits_after = None
    status, told, _ = command(hub, out, "gla-1.3B-100B")
    assert status == 0
    assert f"12.0 MB, {human(12 * MB + 2 - kept)} missing" in told
    assert hub.ranges[1:] == [("model.safetensors", f"bytes={kept}-")]
    assert (out / "gla-1.3B-100B" / "model.safetensors").read_bytes() == weights
    assert not parts(out)


def test_ctrl_c_ends_at_once_and_keeps_what_came(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    files = {f"chunk0/{i}.jsonl": noise(12 * MB, str(i)) for i in range(6)}
    hub.commit(CORPUS, files)
    hub.waits_after = 11 * MB  # the threads are then in the middle of a read
    out = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits that it is ignored
    with start(hub, out, "slimpj-chunked") as process:
        signal.signal(signal.SIGINT, before)
        wait_for_bytes(process, out, transfer.WORKERS * 11 * MB)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        try:
            _, errors = process.communicate(timeout=30)  # it would be 50 for the network
        finally:
            process.kill()
    assert process.returncode == 130
    assert time.monotonic() - begun < 20
    assert "the same command goes on" in errors
    kept = {part.name.split(".jsonl")[0] + ".jsonl": part.stat().st_size for part in parts(out)}
    assert sum(kept.values()) == transfer.WORKERS * 11 * MB
    hub.waits_after, before = None, len(hub.ranges)
    assert download(hub, out, "slimpj-chunked") == 0
    asked = {Path(name).name: wanted for name, wanted in hub.ranges[before:]}
    assert {name: asked[name] for name in kept} == {
        name: f"bytes={size}-" for name, size in kept.items() if size
    }
    assert all((out / "slimpj-chunked" / name).read_bytes() == content for name, content in files.items())


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    weights = noise(MB)
    hub.commit(MODEL, {"model.safetensors": weights})
    hub.breaks = [300_000, 0, 400_000]
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    starts = [None, "bytes=300000-", "bytes=300000-", "bytes=700000-"]
    assert [wanted for _, wanted in hub.ranges] == starts
    assert (tmp_path / "gla-1.3B-100B" / "model.safetensors").read_bytes() == weights
    assert "1.00M/1.00M" in capsys.readouterr().err  # the bar


def test_a_connection_that_stays_broken_is_an_error_and_the_part_stays(
    hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    hub.commit(MODEL, {"model.safetensors": noise(MB)})
    hub.breaks = [300_000, 0, 0]
    assert download(hub, tmp_path, "gla-1.3B-100B") == 1
    assert not (tmp_path / "gla-1.3B-100B").exists()
    assert not (tmp_path / LOCK).exists()
    capsys.readouterr()
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert "700.0 KB missing" in capsys.readouterr().out


def test_a_part_of_another_version_is_never_continued(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 0)
    hub.commit(MODEL, {"model.safetensors": noise(MB, "old")})
    hub.breaks = [300_000, 0]
    assert download(hub, tmp_path, "gla-1.3B-100B") == 1
    assert len(parts(tmp_path)) == 1
    hub.commit(MODEL, {"model.safetensors": noise(MB, "new")})
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert hub.ranges[-1] == ("model.safetensors", None)
    assert (tmp_path / "gla-1.3B-100B" / "model.safetensors").read_bytes() == noise(MB, "new")
    assert not parts(tmp_path)


def test_a_server_that_knows_no_ranges_sends_it_all_again(hub: Hub, tmp_path: Path) -> None:
    weights = noise(MB)
    hub.commit(MODEL, {"model.safetensors": weights})
    hub.breaks, hub.knows_ranges = [300_000], False
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert (tmp_path / "gla-1.3B-100B" / "model.safetensors").read_bytes() == weights


def test_damaged_bytes_are_noticed_and_fetched_again(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    weights = noise(100)
    tag = checksum("model.safetensors", weights)[:16]
    part = tmp_path / "gla-1.3B-100B.partial" / f"model.safetensors.{tag}.part"
    part.parent.mkdir()
    part.write_bytes(bytes(60))
    assert download(hub, tmp_path, "gla-1.3B-100B") == 1
    assert "model.safetensors came damaged" in capsys.readouterr().err
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert (tmp_path / "gla-1.3B-100B" / "model.safetensors").read_bytes() == weights


def test_what_earlier_interruptions_left_goes_away(hub: Hub, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    folder = tmp_path / "gla-1.3B-100B"
    library = folder / ".cache" / "huggingface" / "download" / "abc.incomplete"
    library.parent.mkdir(parents=True)
    own = [folder / f"{name}.{'0' * 16}.part" for name in ("model.safetensors", "other.safetensors")]
    for file in (library, *own):
        file.write_bytes(b"x")
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert parts(tmp_path) == [own[1]]  # of a file that this command knows nothing of


def test_two_commands_do_not_write_one_file(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    import fcntl

    tag = checksum("model.safetensors", noise(100))[:16]
    part = tmp_path / "gla-1.3B-100B.partial" / f"model.safetensors.{tag}.part"
    part.parent.mkdir()
    with part.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert download(hub, tmp_path, "gla-1.3B-100B") == 1
    assert "another download is writing" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# another version


def contents(folder: Path) -> dict[str, bytes]:
    """What a reader of the folder finds."""
    files = [file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.suffix != ".part"}


def shards(version: str) -> dict[str, bytes]:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    return {"config.json": version.encode(), **{name: noise(100, version + name) for name in names}}


@pytest.mark.parametrize("recorded", [True, False])  # a folder that was copied may come without its record
@pytest.mark.parametrize("how", ["update=true", f"revision={'3' * 40}"])
def test_an_interrupted_update_leaves_the_old_version_whole(
    hub: Hub, tmp_path: Path, monkeypatch: Any, how: str, recorded: bool
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 0)
    monkeypatch.setattr(transfer, "WORKERS", 1)
    old, new = shards("old"), shards("new")
    hub.commit(MODEL, old)
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    hub.commit(MODEL, new)
    hub.breaks = [100, 40, 0]  # the first shard comes, the second breaks off
    folder = tmp_path / "gla-1.3B-100B"
    if not recorded:
        (folder / transfer.RECORD).unlink()
    assert download(hub, tmp_path, "gla-1.3B-100B", how) == 1
    assert contents(folder) == old
    assert download(hub, tmp_path, "gla-1.3B-100B", how) == 0
    assert hub.ranges[-1] == ("model-00002-of-00002.safetensors", "bytes=40-")
    assert contents(folder) == new
    assert not parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


def test_an_abandoned_update_goes_away(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 0)
    hub.commit(MODEL, shards("old"))
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    hub.commit(MODEL, shards("new"))
    hub.breaks = [40, 0, 40, 0]
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 1
    asked = len(hub.ranges)
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert len(hub.ranges) == asked
    assert not parts(tmp_path)


@pytest.mark.parametrize("ends_at", range(1, 6))
def test_an_exchange_that_ends_midway_looks_partial_and_is_finished(
    hub: Hub, tmp_path: Path, monkeypatch: Any, ends_at: int
) -> None:
    """Ended at a rename (of the record, three files, the record); then the pinned version is wanted."""
    hub.commit(MODEL, old := shards("old"))
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    hub.commit(MODEL, new := shards("new"))
    folder = tmp_path / "gla-1.3B-100B"
    replace, renames = os.replace, []

    def ends(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == ends_at:
            raise OSError("ended")
        replace(source, target)

    monkeypatch.setattr(os, "replace", ends)
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 1
    monkeypatch.setattr(os, "replace", replace)
    assert not folder.exists()
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert contents(folder) == old
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 0
    assert contents(folder) == new


def test_a_folder_that_cannot_be_renamed_is_updated_in_its_place(
    hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    hub.commit(MODEL, shards("old"))
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    hub.commit(MODEL, shards("new"))

    def busy(*_: Path) -> None:
        raise OSError("Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)  # as of a mount point
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 0
    assert contents(tmp_path / "gla-1.3B-100B") == shards("new")


def test_files_that_a_version_no_longer_has_go_and_a_users_own_stay(hub: Hub, tmp_path: Path) -> None:
    rows = noise(7)
    hub.commit(FDA, {"data/validation-00000-of-00001-abc.jsonl": rows, "README.md": b"r"})
    assert download(hub, tmp_path, "based-fda") == 0
    folder = tmp_path / "eval_data" / "based-fda"
    (folder / "data" / "own.jsonl").write_bytes(b"own")
    hub.commit(FDA, {"data/validation-00000-of-00001.jsonl": rows, "README.md": b"r"})
    assert download(hub, tmp_path, "based-fda", "update=true") == 0
    newest = {"data/validation-00000-of-00001.jsonl": rows, "README.md": b"r"}
    assert contents(folder) == newest | {"data/own.jsonl": b"own"}
    assert set(transfer.read_record(folder)) == set(newest)


def test_more_of_the_corpus_comes_in_its_place_and_fewer_remove_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 0)
    monkeypatch.setattr(transfer, "WORKERS", 1)
    assert download(hub, tmp_path, "slimpj-chunked", "files=2") == 0
    hub.breaks = [10, 0]
    assert download(hub, tmp_path, "slimpj-chunked", "files=4") == 1
    assert len(contents(tmp_path / "slimpj-chunked")) == 3
    assert download(hub, tmp_path, "slimpj-chunked", "files=1") == 0
    assert len(contents(tmp_path / "slimpj-chunked")) == 3


# ----------------------------------------------------------------------------------------------------
# failures


def test_a_repository_that_fails_keeps_no_other_from_coming(hub: Hub, tmp_path: Path) -> None:
    """Gone, gated and cut off, among others that are there."""
    hub.refuses = {"hazyresearch/based_drop": (404, "RepoNotFound"), "mteb/banking77": (403, "GatedRepo")}
    hub.cuts = {SQUAD}
    for source in SOURCES:
        if source.group == "eval" and source.repo not in hub.commits:
            hub.commit(source.repo, {"data/validation.jsonl": noise(9)})
    out = tmp_path / "out"
    status, told, errors = command(hub, out, "eval")
    assert status == 1
    wanted = {source.repo for source in SOURCES if source.group == "eval"}
    failed = {SQUAD, *hub.refuses}
    assert set(read_lock(out)) == wanted - failed
    assert {folder.name for folder in (out / "eval_data").iterdir()} == {
        repo.split("/")[1] for repo in wanted - failed
    }
    last = errors[errors.index("error: 3 of 19 repositories failed") :]
    assert all(f"  {repo}: " in last for repo in failed)
    assert "Repository Not Found" in last
    assert "gated" in last
    assert "16 of 16 are complete" in told


def test_a_file_that_fails_keeps_no_other_repository_from_coming(
    hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    hub.lost = {FDA}
    assert download(hub, tmp_path, "only=based-fda,based-squad") == 1
    assert f"1 of 2 repositories failed:\n  {FDA}: " in capsys.readouterr().err
    assert set(read_lock(tmp_path)) == {SQUAD}
    hub.lost = set()
    assert download(hub, tmp_path, "only=based-fda,based-squad") == 0
    assert set(read_lock(tmp_path)) == {FDA, SQUAD}


def test_without_a_network_few_are_tried_and_nothing_is_written(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    tried = []

    def repo_info(repo: str, **_: Any) -> None:
        tried.append(repo)
        raise ConnectionError("no route")

    api = SimpleNamespace(repo_info=repo_info)
    assert main(["eval", f"out={tmp_path / 'out'}"], api=api) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: 19 of 19 repositories failed")
    assert told.count("no route") == len(tried) == 3
    assert "without a network, copy the folders" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only=based-fad"], "did you mean based-fda"),
        (["only=gla"], "did you mean gla-1.3B-100B"),
        (["only=corpus", "revision=x", "only=eval"], "for one repository"),
        (["files=2"], "--files is for the corpus"),
        (["based-fda", "files=1"], "--files is for the corpus"),
        (["based-fda", "update=true", "revision=x"], "give one of them"),
        (["only=corpus", "files=0"], "at least 1"),
        (["only=corpus", "dry_run=ture"], "not true or false"),
        (["only=corpus", "--update=maybe"], "not true or false"),
        (["only=corpus", "fils=2"], "fils"),
    ],
)
def test_bad_input_is_refused(hub: Hub, tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    try:
        status = download(hub, tmp_path, *words)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not hub.asked


def test_a_disk_that_is_too_small_is_noticed_first(
    hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50))
    assert download(hub, tmp_path / "out", "gla-1.3B-100B") == 2
    assert "102 B do not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_lock_is_an_error(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / LOCK).write_text("{")
    assert download(hub, tmp_path, "gla-1.3B-100B") == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("script.py", "has none of the files"), ("../../x.json", "outside of its folder")]
)
def test_a_repository_without_fitting_files_is_an_error(hub: Hub, name: str, message: str) -> None:
    source = next(source for source in SOURCES if source.repo == FDA)
    hub.commit(FDA, {name: b"x"})
    with pytest.raises(ValueError, match=message):
        plan(source, "main", HfApi(endpoint=hub.url), None)

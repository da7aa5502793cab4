"""Downloads with a Hub made of dictionaries: sizes, pins, resuming, and life without a network."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from huggingface.download import LOCK, SOURCES, main, missing_bytes, plan, read_lock

MODEL = "fla-hub/gla-1.3B-100B"
FILES = {
    MODEL: {
        "config.json": b"{}",
        "model.safetensors": b"w" * 100,
        "pytorch_model.bin": b"w" * 100,
        "logo.png": b"p" * 9,
    },
    "AlppAI/SlimPajama-chunked": {f"chunk{c}/{i}.jsonl": b"t" * 10 for c in range(2) for i in range(3)},
    "hazyresearch/based-fda": {"data/validation.jsonl": b"d" * 7, "README.md": b"r"},
}


class Hub:
    """What HfApi.repo_info and snapshot_download do here; the newest commit is a number."""

    def __init__(self) -> None:
        self.commit = 1
        self.asked: list[tuple[str, str, str]] = []
        self.stop_after: int | None = None

    def repo_info(self, repo: str, repo_type: str, revision: str, files_metadata: bool) -> Any:
        self.asked.append((repo, repo_type, revision))
        siblings = [SimpleNamespace(rfilename=n, size=len(c)) for n, c in FILES[repo].items()]
        sha = f"commit{self.commit}" if revision == "main" else revision
        return SimpleNamespace(sha=sha, siblings=siblings)

    def snapshot_download(
        self, repo: str, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> None:
        for number, name in enumerate(allow_patterns):
            if number == self.stop_after:
                raise ConnectionError("Name or service not known")
            file = Path(local_dir) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(FILES[repo][name])


@pytest.fixture
def hub() -> Hub:
    return Hub()


def download(hub: Hub, out: Path, *words: str) -> int:
    return main([*words, f"out={out}"], api=hub, snapshot_download=hub.snapshot_download)


def test_a_model_comes_once_with_its_size_shown_and_its_commit_kept(
    hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    assert download(hub, tmp_path, "--only", "gla-1.3B-100B") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{MODEL}: 2 files, 102 B -> ")  # not the same weights as .bin, and no picture
    assert shown.index("to fetch: 102 B") < shown.index("[1/1]")
    folder = tmp_path / "gla-1.3B-100B"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / LOCK).read_text()) == {MODEL: "commit1"}


def test_later_downloads_fetch_the_locked_commit_unless_updated(hub: Hub, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    hub.commit = 2
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert read_lock(tmp_path)[MODEL] == "commit1"
    assert download(hub, tmp_path, "gla-1.3B-100B", "update=true") == 0
    assert read_lock(tmp_path)[MODEL] == "commit2"
    assert [revision for *_, revision in hub.asked] == ["main", "commit1", "main"]
    assert download(hub, tmp_path, "gla-1.3B-100B", "--revision=v1") == 0
    assert hub.asked[-1] == (MODEL, "model", "v1")


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


def test_an_interrupted_download_leaves_no_folder_that_looks_whole_and_goes_on(
    hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    hub.stop_after = 1
    assert download(hub, tmp_path, "gla-1.3B-100B") == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "gla-1.3B-100B").exists()
    assert not (tmp_path / LOCK).exists()
    hub.stop_after = None
    assert download(hub, tmp_path, "gla-1.3B-100B") == 0
    assert "100 B missing" in capsys.readouterr().out
    assert (tmp_path / "gla-1.3B-100B").is_dir()
    assert not (tmp_path / "gla-1.3B-100B.partial").exists()


def test_without_a_network_nothing_is_written(
    hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error in (ConnectionError("no route"), LocalEntryNotFoundError("offline")):
        monkeypatch.setattr(hub, "repo_info", lambda *a, e=error, **k: (_ for _ in ()).throw(e))
        assert download(hub, tmp_path / "out", "eval") == 1
        told = capsys.readouterr().err
        assert told.startswith("error: the download stopped")
        assert len(told.splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only=based-fad"], "did you mean based-fda"),
        (["only=gla"], "did you mean gla-1.3B-100B"),
        (["only=corpus", "revision=x", "only=eval"], "for one repository"),
    ],
)
def test_bad_input_is_refused(hub: Hub, tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    assert download(hub, tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not hub.asked
    for word in ("files=0", "dry_run=ture", "--update=maybe", "fils=2"):
        with pytest.raises(SystemExit) as stopped:
            download(hub, tmp_path, "only=corpus", word)
        assert stopped.value.code == 2
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


def test_a_repository_without_the_needed_files_is_an_error(hub: Hub, monkeypatch: Any) -> None:
    source = next(source for source in SOURCES if source.name == "based-fda")
    monkeypatch.setitem(FILES, source.repo, {"script.py": b"x"})
    with pytest.raises(ValueError, match="has none of the files"):
        plan(source, "main", hub, None)


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
    source = next(source for source in SOURCES if source.name == "based-fda")
    assert missing_bytes(plan(source, "main", hub, None), tmp_path) == 0

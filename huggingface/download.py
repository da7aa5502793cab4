"""`python huggingface/download.py [--only NAME,...]`: starting points, corpus, evaluation data.

Sizes are shown before anything is fetched, and interrupted downloads go on. The first download of a
repository writes its commit into download.lock.json, and later ones fetch that commit (`--update` asks for
the newest): keep the file under version control to have the same bytes everywhere.
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCK = "download.lock.json"
PARTIAL = ".partial"
MODEL_FILES = ("*.safetensors*", "*.bin", "*.json", "*.model", "*.txt", "LICENSE*", "README.md")
DATA_FILES = ("*.parquet", "*.json", "*.jsonl", "*.jsonl.gz", "*.csv", "README.md")


@dataclass(frozen=True)
class Source:
    """A repository of the Hub and the folder it goes to.

    Attributes:
        group: models, corpus or eval.
        files: patterns of the files that are needed.
        revision: branch, tag or commit that is fetched when the lock file names none.
    """

    name: str
    repo: str
    group: str
    folder: str
    files: tuple[str, ...]
    revision: str = "main"

    @property
    def kind(self) -> str:
        return "model" if self.group == "models" else "dataset"


def _models(*repos: str) -> list[Source]:
    return [Source(r.split("/")[1], r, "models", r.split("/")[1], MODEL_FILES) for r in repos]


def _data(*repos: str) -> list[Source]:
    return [Source(r.split("/")[1], r, "eval", f"eval_data/{r.split('/')[1]}", DATA_FILES) for r in repos]


SOURCES = [
    *_models("fla-hub/gla-1.3B-100B", "rokyang/mamba2-1.3b-hf", "state-spaces/mamba2-1.3b"),
    # the original Mamba2 checkpoint comes without its tokenizer
    Source(
        "gpt-neox-20b-tokenizer",
        "EleutherAI/gpt-neox-20b",
        "models",
        "gpt-neox-20b-tokenizer",
        ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt"),
    ),
    Source(
        "slimpj-chunked",
        "AlppAI/SlimPajama-chunked",
        "corpus",
        "slimpj-chunked",
        ("*.jsonl", "*.jsonl.zst", "*.jsonl.gz"),
    ),
    *_data("hazyresearch/based-swde-v2", "hazyresearch/based-fda", "hazyresearch/based-squad"),
    *_data("hazyresearch/based_triviaqa", "hazyresearch/based_drop"),
    *_data(*(f"hazyresearch/based_nq_{length}" for length in (512, 1024, 2048))),
    *_data("baber/paul_graham_essays"),
    *_data("baber/piqa", "Rowan/hellaswag", "allenai/winogrande", "allenai/ai2_arc", "lighteval/siqa"),
    *_data("SetFit/sst2", "SetFit/ag_news", "SetFit/TREC-QC", "SetFit/subj", "mteb/banking77"),
]
GROUPS = ("models", "corpus", "eval")
DEFAULT = ("models", "eval")  # the corpus is larger than most disks: it comes when it is named
SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
ADVICE = (
    "What had arrived is kept, and the same command goes on. HF_ENDPOINT names a mirror, HF_TOKEN opens "
    "gated repositories; without a network, copy the folders from a machine that has one"
)


@dataclass(frozen=True)
class Plan:
    source: Source
    commit: str
    files: tuple[tuple[str, int], ...]  # path in the repository, bytes

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


# ----------------------------------------------------------------------------------------------------
# arguments


def parse(argv: Sequence[str]) -> argparse.Namespace:
    names = f"groups: {', '.join(GROUPS)}; single ones: {', '.join(source.name for source in SOURCES)}"
    parser = argparse.ArgumentParser(
        prog="python huggingface/download.py", description=__doc__.split("\n\n")[1], epilog=names
    )
    parser.add_argument("names", nargs="*", help="the same as --only")
    parser.add_argument(
        "--only", default="", help="groups or names with commas between (default: models,eval)"
    )
    parser.add_argument(
        "--files", type=int, help="fetch this many files of the corpus (default: all of it, over 1 TB)"
    )
    parser.add_argument("--out", default=str(HERE), help="folder to fetch into (default: huggingface/)")
    parser.add_argument(
        "--revision", help="branch, tag or commit instead of the locked one; with one name only"
    )
    parser.add_argument("--update", action="store_true", help="the newest commit instead of the locked one")
    parser.add_argument("--dry_run", action="store_true", help="show sizes and fetch nothing")
    switches = {"dry_run", "update"}
    words = []
    for word in argv:  # key=value as in every other command of this repository
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key in switches:
            if value.lower() not in SWITCH:  # a misspelt dry_run=true would fetch a terabyte
                parser.error(f"{key}={value!r} is not true or false")
            words += [f"--{key}"] if SWITCH[value.lower()] else []
        else:
            words.append(f"--{key}={value}" if equals else word)
    arguments = parser.parse_args(words)
    if arguments.files is not None and arguments.files < 1:
        parser.error(f"files={arguments.files} must be at least 1")
    return arguments


def select(names: Sequence[str]) -> list[Source]:
    """Raises ValueError for an unknown name; the nearest ones are shown."""
    import difflib

    chosen: dict[str, Source] = {}
    known = {source.name: source for source in SOURCES}
    for name in names or DEFAULT:
        if name in GROUPS:
            chosen.update({source.name: source for source in SOURCES if source.group == name})
        elif name in known:
            chosen[name] = known[name]
        else:
            near = [other for other in known if name.lower() in other.lower()][:3]
            near = near or difflib.get_close_matches(name, [*GROUPS, *known], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"groups are {', '.join(GROUPS)}"
            raise ValueError(f"unknown name {name!r}; {hint}")
    return list(chosen.values())


# ----------------------------------------------------------------------------------------------------
# what will be fetched


def read_lock(out: Path) -> dict[str, str]:
    """Repository -> commit."""
    file = out / LOCK
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is damaged; restore or remove it") from None


def write_lock(out: Path, lock: dict[str, str]) -> None:
    part = out / (LOCK + ".tmp")
    part.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, out / LOCK)


def plan(source: Source, revision: str, api: Any, corpus_files: int | None) -> Plan:
    """Ask the Hub for the commit behind a revision and the sizes of its files.

    Raises:
        ValueError: the repository holds nothing that is needed.
    """
    info = api.repo_info(source.repo, repo_type=source.kind, revision=revision, files_metadata=True)
    files = sorted(
        (entry.rfilename, entry.size or 0)
        for entry in info.siblings
        if any(fnmatch.fnmatch(entry.rfilename, pattern) for pattern in source.files)
    )
    if any(name.endswith(".safetensors") for name, _ in files):
        files = [(name, size) for name, size in files if not name.endswith(".bin")]  # the same weights twice
    if source.group == "corpus" and corpus_files is not None:
        files = files[:corpus_files]
    if not files:
        raise ValueError(f"{source.repo} at {revision} has none of the files {', '.join(source.files)}")
    return Plan(source, info.sha, tuple(files))


def missing_bytes(entry: Plan, out: Path) -> int:
    """What is not there yet, in the folder or in what an interruption left of it."""
    folder = out / entry.source.folder
    homes = (folder, folder.with_name(folder.name + PARTIAL))
    return sum(
        size
        for name, size in entry.files
        if not any((home / name).is_file() and (home / name).stat().st_size == size for home in homes)
    )


def show(plans: Sequence[Plan], out: Path) -> int:
    """Print sizes; the bytes still to be fetched."""
    total = 0
    for entry in plans:
        missing = missing_bytes(entry, out)
        total += missing
        there = "" if missing == entry.size else f", {human(missing)} missing"
        where = f"{out / entry.source.folder} at {entry.commit[:12]}"
        print(f"{entry.source.repo}: {len(entry.files)} files, {human(entry.size)}{there} -> {where}")
    print(f"to fetch: {human(total)}")
    return total


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


# ----------------------------------------------------------------------------------------------------
# fetching


def fetch(entry: Plan, out: Path, snapshot_download: Any) -> None:
    """Into a folder beside the final one, which appears when complete; one that is there is completed."""
    folder = out / entry.source.folder
    partial = folder.with_name(folder.name + PARTIAL)
    target = folder if folder.exists() else partial
    target.parent.mkdir(parents=True, exist_ok=True)
    snapshot_download(
        entry.source.repo,
        repo_type=entry.source.kind,
        revision=entry.commit,
        local_dir=target,
        allow_patterns=[name for name, _ in entry.files],
    )
    absent = [name for name, _ in entry.files if not (target / name).is_file()]
    if absent:
        raise OSError(f"{entry.source.repo}: {len(absent)} files did not arrive, among them {absent[0]}")
    if target is partial:
        partial.rename(folder)


def run(arguments: argparse.Namespace, api: Any, snapshot_download: Any) -> None:
    out = Path(arguments.out)
    names = [name for text in [*arguments.names, arguments.only] for name in text.split(",") if name]
    sources = select(names)
    if arguments.revision and len(sources) != 1:
        raise ValueError(f"--revision is for one repository, and {len(sources)} are chosen")
    lock = read_lock(out)
    plans = []
    for source in sources:
        locked = None if arguments.update else lock.get(source.repo)
        revision = arguments.revision or locked or source.revision
        plans.append(plan(source, revision, api, arguments.files))
    total = show(plans, out)
    if arguments.dry_run:
        return
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise ValueError(
            f"{human(total)} do not fit: {human(free)} are free in {out}; choose with --only or --files"
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(plans, 1):
        print(f"[{number}/{len(plans)}] {entry.source.repo}")
        fetch(entry, out, snapshot_download)
        lock[entry.source.repo] = entry.commit
        write_lock(out, lock)
    print(f"done; commits are in {out / LOCK}")


def main(argv: Sequence[str] | None = None, api: Any = None, snapshot_download: Any = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 the Hub cannot be reached or refuses, 130 interrupted."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        run(
            arguments,
            api or huggingface_hub.HfApi(),
            snapshot_download or huggingface_hub.snapshot_download,
        )
    except (OSError, HTTPError) as error:
        # first: what the Hub's client raises without a network is a ValueError as well
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"error: the download stopped ({reason}). {ADVICE}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python huggingface/download.py [--only NAME,...]`: starting points, corpus, evaluation data.

Sizes are shown first. What arrived is kept, of a file in progress too: after an interruption the same command
asks for the rest. The first download of a repository takes its newest commit and pins it in
download.lock.json; later ones fetch the pinned commit. `--update` fetches and pins the newest instead,
`--revision` the one it names. No lock file is shipped: two machines fetch the same bytes only when one's
download.lock.json is committed and the other has it.
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of a script Python knows the own folder only

from huggingface.transfer import RemoteFile, fetch_folder, missing_bytes, work_folder

Item = TypeVar("Item")
Result = TypeVar("Result")
HERE = Path(__file__).resolve().parent
LOCK = "download.lock.json"
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
    "the same command tries again and asks only for what is missing. HF_ENDPOINT names a mirror, HF_TOKEN "
    "opens gated repositories; without a network, copy the folders from a machine that has one"
)
ANSWER_TIMEOUT = 30  # seconds for a repository's list of files
GIVE_UP = 3  # failures in a row that no answer of the Hub explains


@dataclass(frozen=True)
class Plan:
    source: Source
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def folder(self, out: Path) -> Path:
        return out / self.source.folder


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
        "--files", type=int, help="with the corpus: this many of its files (default: all, over 1 TB)"
    )
    parser.add_argument("--out", default=str(HERE), help="folder to fetch into (default: huggingface/)")
    parser.add_argument(
        "--revision", help="fetch this branch, tag or commit and pin it instead; with one name only"
    )
    parser.add_argument("--update", action="store_true", help="fetch the newest commit and pin it instead")
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
    if arguments.update and arguments.revision:
        parser.error("--update asks for the newest commit, --revision for another; give one of them")
    return arguments


def chosen_sources(arguments: argparse.Namespace) -> list[Source]:
    """Raises ValueError for an unknown name, and for an option that fits none of what is chosen."""
    names = [name for text in [*arguments.names, arguments.only] for name in text.split(",") if name]
    sources = select(names)
    if arguments.revision and len(sources) != 1:
        raise ValueError(f"--revision is for one repository, and {len(sources)} are chosen")
    if arguments.files is not None and all(source.group != "corpus" for source in sources):
        raise ValueError("--files is for the corpus, which is not among what is chosen; add --only corpus")
    return sources


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


def plan(source: Source, revision: str, api: HfApi, corpus_files: int | None) -> Plan:
    """Ask the Hub for the commit behind a revision, and for sizes and checksums of its files.

    Raises:
        ValueError: the repository holds nothing that is needed, or names that lead out of the folder.
    """
    info = api.repo_info(
        source.repo, repo_type=source.kind, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT
    )
    needed = {
        entry.rfilename: entry
        for entry in info.siblings
        if any(fnmatch.fnmatch(entry.rfilename, pattern) for pattern in source.files)
    }
    names = sorted(needed)
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".bin")]  # the same weights twice
    if source.group == "corpus":
        names = names[:corpus_files]
    if not names:
        raise ValueError(f"{source.repo} at {revision} has none of the files {', '.join(source.files)}")
    return Plan(source, info.sha, tuple(remote_file(needed[name], source, info.sha, api) for name in names))


def remote_file(entry: Any, source: Source, commit: str, api: HfApi) -> RemoteFile:
    name = entry.rfilename
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{source.repo} names a file that is outside of its folder: {name}")
    if entry.size is None:
        raise ValueError(f"{source.repo}: {api.endpoint} does not tell the size of {name}")
    checksum = (entry.lfs and entry.lfs.sha256) or entry.blob_id or f"commit-{commit}"
    url = hf_hub_url(source.repo, name, repo_type=source.kind, revision=commit, endpoint=api.endpoint)
    return RemoteFile(name, entry.size, checksum, url)


def show(plans: Sequence[Plan], out: Path) -> int:
    """Print sizes; the bytes still to be fetched."""
    total = 0
    for entry in plans:
        missing = missing_bytes(work_folder(entry.folder(out)), entry.files)
        total += missing
        there = "" if missing == entry.size else f", {human(missing)} missing"
        where = f"{entry.folder(out)} at {entry.commit[:12]}"
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


def try_each(
    items: Sequence[Item],
    action: Callable[[Item], Result],
    name: Callable[[Item], str],
    failures: dict[str, str],
) -> list[Result]:
    """Results of the items that have one; why the others have none goes to `failures`.

    One repository that is gone or gated keeps no other from coming. When several in a row fail without an
    answer of the Hub, it is the network or the disk, and the rest are not tried.
    """
    results, unanswered = [], 0
    for item in items:
        if unanswered == GIVE_UP:
            failures[name(item)] = f"not tried after {GIVE_UP} failures in a row"
            continue
        try:
            results.append(action(item))
            unanswered = 0
        except (OSError, HTTPError, ValueError) as error:
            failures[name(item)] = " ".join(str(error).split())[:300] or type(error).__name__
            unanswered = 0 if isinstance(error, (HfHubHTTPError, ValueError)) else unanswered + 1
    return results


def run(arguments: argparse.Namespace, api: HfApi) -> int:
    """Exit status: 1 when something did not come."""
    out = Path(arguments.out)
    sources = chosen_sources(arguments)
    lock = read_lock(out)
    failures: dict[str, str] = {}

    def ask(source: Source) -> Plan:
        pinned = None if arguments.update else lock.get(source.repo)
        return plan(source, arguments.revision or pinned or source.revision, api, arguments.files)

    plans = try_each(sources, ask, lambda source: source.repo, failures)
    total = show(plans, out)
    if plans and not arguments.dry_run:
        check_space(total, out)
        fetch_all(plans, out, lock, failures)
    if failures:
        print(f"error: {len(failures)} of {len(sources)} repositories failed:", file=sys.stderr)
        for repo, reason in failures.items():
            print(f"  {repo}: {reason}", file=sys.stderr)
        print(ADVICE, file=sys.stderr)
    return 1 if failures else 0


def check_space(total: int, out: Path) -> None:
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise ValueError(
            f"{human(total)} do not fit: {human(free)} are free in {out}; choose with --only or --files"
        )


def fetch_all(plans: Sequence[Plan], out: Path, lock: dict[str, str], failures: dict[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)

    def fetch_one(entry: Plan) -> None:
        print(f"[{plans.index(entry) + 1}/{len(plans)}] {entry.source.repo}", flush=True)
        fetch_folder(entry.folder(out), entry.files, subset=entry.source.group == "corpus")
        lock[entry.source.repo] = entry.commit
        write_lock(out, lock)

    came = try_each(plans, fetch_one, lambda entry: entry.source.repo, failures)
    if came:
        print(f"{len(came)} of {len(plans)} are complete; their commits are pinned in {out / LOCK}")


def main(argv: Sequence[str] | None = None, api: HfApi | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 something could not be fetched, 130 interrupted."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments, api or HfApi())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what arrived is kept, and the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

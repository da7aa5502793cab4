"""Tables, figures and docs/results.md from the raw records:

    python -m benchmarks.recall_study.report [results=FOLDER] [page=docs/results.md] [figures=docs/results]

Reads every *.jsonl of the folder, groups records by fingerprint, and rebuilds everything; a GPU's results
come before a CPU's. The hand-written part of the page is kept.
"""

import os
import sys
from pathlib import Path

from .figures import draw_all
from .page import BEGIN, END, page
from .settings import REPOSITORY
from .store import Record, read_records
from .summary import family_results

DEFAULTS = {
    "results": "benchmarks/recall_study/results",
    "page": "docs/results.md",
    "figures": "docs/results",
}


def groups_of(folder: Path) -> list[list[Record]]:
    """Records by fingerprint, those of GPUs first. Raises ValueError when the folder does not exist."""
    if not folder.is_dir():
        raise ValueError(f"results={folder}: no such folder")
    by_fingerprint: dict[str, list[Record]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for record in read_records(file):
            by_fingerprint.setdefault(record["fingerprint"], []).append(record)
    groups = [records for records in by_fingerprint.values() if any(r["kind"] == "arm" for r in records)]
    return sorted(groups, key=lambda records: any(r.get("device") == "CPU" for r in records))


def build(results: Path, target: Path, figures: Path) -> None:
    groups = groups_of(results)
    pictures = {}
    for records in groups:
        fingerprint = records[0]["fingerprint"]
        for result in family_results(records):
            stem = f"{result.settings.name}-{fingerprint}"
            files = draw_all(result, figures, stem)
            pictures[fingerprint, result.family] = [os.path.relpath(file, target.parent) for file in files]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(groups, pictures, _kept(target)), encoding="utf-8")
    print(f"{target}: {sum(map(len, groups))} records, {sum(map(len, pictures.values()))} figures")


def _kept(target: Path) -> str:
    text = target.read_text(encoding="utf-8") if target.is_file() else ""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main(arguments: list[str]) -> int:
    given = dict(DEFAULTS)
    try:
        for argument in arguments:
            key, equals, text = argument.removeprefix("--").partition("=")
            if key not in given or not equals:
                raise ValueError(f"{argument!r}: expected one of {', '.join(f'{k}=...' for k in given)}")
            given[key] = text
        results, target, figures = (REPOSITORY / given[key] for key in ("results", "page", "figures"))
        build(results, target, figures)
    except ValueError as error:
        print(f"benchmarks.recall_study.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

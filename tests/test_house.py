"""The house rules: import floors, a README whose commands exist, nothing that only one machine knows."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data", "training", "eval", "huggingface", "benchmarks", "train", "scripts", "tests")
# a room and the rooms that it may import besides itself; docs/design.md says the same in words
FLOORS = {
    "models": set(),
    "data": set(),
    "training": {"models", "data"},
    "eval": {"models", "data", "huggingface"},
    "huggingface": {"models"},
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that match, without what is only lying around."""
    command = ["git", "ls-files", "-z", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported_modules(file: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too; relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join((*above, node.module or "")).strip("."))
    return found


def rooms_imported(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(file)} & set(ROOMS)


@pytest.mark.parametrize("room", FLOORS)
def test_no_import_runs_back_up(room):
    allowed = FLOORS[room] | {room}
    wrong = {
        str(file.relative_to(ROOT)): rooms_imported(file) - allowed
        for file in tracked(f"{room}/*.py")
        if rooms_imported(file) - allowed
    }
    assert not wrong


def test_operators_know_nothing_above_them():
    for file in tracked("models/ops/*.py"):
        names = {name for name in imported_modules(file) if name.split(".")[0] in ROOMS}
        assert all(name.startswith("models.ops") for name in names), (file, names)


def test_files_of_models_import_each_other_relatively():
    """A saved folder carries them along and has to load without this repository."""
    for file in tracked("models/*.py"):
        if file.parent == ROOT / "models":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) models\b", text, re.MULTILINE), file


def test_train_py_reads_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) < 120


def test_nothing_names_one_machine():
    """No path of one machine, no registry host; whoever clones the repository has neither."""
    forbidden = re.compile(r"(^|[^\w/.-])/(work|root|farm)/|files\.pythonhosted|pypi\.org|download\.pytorch")
    found = []
    for file in tracked("*.py", "*.sh", "*.md", "*.txt", "*.json", "*.yaml", "*.toml", ".ci/run"):
        if file != Path(__file__).resolve() and forbidden.search(file.read_text(encoding="utf-8")):
            found.append(file)
    assert not found


# ---------------------------------------------------------------------------------------------------- README


def commands() -> list[str]:
    """Lines of the README's bash blocks, continuations joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_readme_commands_name_what_is_there():
    assert len(commands()) > 15
    for command in commands():
        program, target, *arguments = command.split()
        assert program in ("bash", "python"), command
        if target == "-m":
            module = arguments[0].replace(".", "/")
            assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file(), command
        else:
            assert (ROOT / target).is_file(), command


def test_readme_arguments_are_keys_of_a_run():
    """Every key=value behind a training script passes the run configuration's own checks."""
    from training.config import parse_arguments

    scripts = re.compile(r"bash scripts/((?:gla|mamba2)_(?:StateX|LPT))\.sh(.*)")
    local = {"n_nodes", "node_rank", "main_address", "main_port", "scale"}
    seen = 0
    for match in filter(None, map(scripts.match, commands())):
        given = [argument for argument in match[2].split() if argument.split("=")[0] not in local]
        needs = ["drop_prop=6"] if "StateX" in match[1] and not any("drop_prop" in a for a in given) else []
        assert parse_arguments([*needs, *given])
        seen += 1
    assert seen > 8


def test_links_lead_somewhere():
    for file in tracked("*.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", file.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", link):
                assert (file.parent / link).exists(), (file, link)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_scripts_parse(file):
    subprocess.run(["bash", "-n", f"scripts/{file}"], cwd=ROOT, check=True)


def test_scripts_keep_to_bash_3():
    """macOS ships bash 3.2: no associative arrays, no mapfile, no case conversion."""
    newer = r"\b(declare -A|local -A|mapfile|readarray|coproc)\b|\bwait -n\b|\$\{\w+(,,?|\^\^?)\}|\|&|&>>"
    for file in (ROOT / "scripts").glob("*.sh"):
        assert not re.search(newer, file.read_text(encoding="utf-8")), file

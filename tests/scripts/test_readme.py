"""Every training command that the README and the SLURM example show makes a plan: it fits together."""

import re

import pytest

from tests.scripts.conftest import REPOSITORY, script
from tests.test_house import commands

TRAINING = re.compile(r"bash scripts/((?:gla|mamba2)_(?:StateX|LPT))\.sh(.*)")
SHOWN = [(match[1], match[2].split()) for match in map(TRAINING.match, commands()) if match]
SLURM = (REPOSITORY / "scripts" / "slurm_example.sh").read_text(encoding="utf-8")


def plan(name: str, *arguments: str) -> None:
    given = {argument.split("=")[0] for argument in arguments}
    more = [key for key in ("plan=true", "init_from=scratch") if key.split("=")[0] not in given]
    answer = script(name, *arguments, *more)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "tokens a step" in answer.stdout


def test_the_readme_shows_training_commands():
    assert len(SHOWN) > 10


@pytest.mark.parametrize(("name", "arguments"), SHOWN, ids=[" ".join([n, *a]) for n, a in SHOWN])
def test_a_command_of_the_readme_can_be_planned(name, arguments):
    plan(name, *arguments)


def test_the_commands_of_the_slurm_example_can_be_planned():
    nodes, gpus = (
        int(re.search(rf"^#SBATCH --{key}=(\d+)", SLURM, re.M)[1]) for key in ("nodes", "gpus-per-node")
    )
    shown = re.findall(r"^# +sbatch (?:--nodes=(\d+) )?scripts/slurm_example\.sh(.*)", SLURM, re.M)
    assert len(shown) == 2
    for other_nodes, words in shown:
        count = int(other_nodes or nodes)
        name, *arguments = words.split(" #")[0].split() or ["gla_StateX.sh"]
        address = ("node_rank=0", "main_address=10.0.0.1", "main_port=29500")
        plan(name.removesuffix(".sh"), f"n_nodes={count}", f"n_gpus={count * gpus}", *address, *arguments)

"""The published shape's launch, eight processes with one sequence each, rehearsed through gloo on loopback.

Oracle: one process that accumulates the same eight sequences a step.
"""

import json

import pytest

from tests.training.conftest import run_arguments
from tests.training.launching import launch, losses


@pytest.mark.slow
def test_eight_processes_with_a_sequence_each_train_stop_and_go_on_like_one(world, tmp_path):
    def arguments(name: str) -> list[str]:
        return [*run_arguments(world, tmp_path / name), "tokens_per_step=256", "batch_size=1", "resume=auto"]

    assert launch(arguments("one")) == [0]
    assert launch([*arguments("eight"), "stop_at_step=4"], 8) == [0] * 8
    folder = tmp_path / "eight" / "p" / "model" / "r"
    state = json.loads((folder / "ckpt_4" / "state" / "trainer.json").read_text())
    assert (state["launch"], state["world_size"]) == ("cpu", 8)
    before = losses(folder)
    assert launch(arguments("eight"), 8) == [0] * 8
    after = losses(folder)
    assert {step: after[step] for step in before} == before
    # the same numbers summed in another order, in fp32
    expected = losses(tmp_path / "one" / "p" / "model" / "r")
    assert list(after.values()) == pytest.approx(list(expected.values()), rel=1e-4)

"""DeepSpeed ZeRO on two CPU processes: same losses, fp32 parameters, checkpoints that any launch kind reads.

Oracle: one plain process. accelerate does not support DeepSpeed on a CPU, so these runs are rehearsals of the
GPU path: same engine, same optimiser, same gathering of states, gloo in place of NCCL.
"""

import json
import shutil

import pytest

from tests.training.conftest import run_arguments
from tests.training.launching import launch, losses

pytest.importorskip("deepspeed")
if shutil.which("ninja") is None or shutil.which("g++") is None:
    pytest.skip("DeepSpeed on a CPU compiles its communication: needs ninja and g++", allow_module_level=True)

CPU = {"STATEX_CPU_REHEARSAL": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory) -> dict[int, float]:
    output = tmp_path_factory.mktemp("plain")
    assert launch(run_arguments(world, output)) == [0]
    return losses(output / "p" / "model" / "r")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_zero_trains_saves_and_hands_over_to_a_plain_process(world, tmp_path, plain, kind):
    arguments = [*run_arguments(world, tmp_path), "resume=auto", "batch_size=1"]
    assert launch(
        [*arguments, f"launch={kind}", "stop_at_step=4"], 2, environment=CPU, log=tmp_path / "log"
    ) == [0, 0]
    folder = tmp_path / "p" / "model" / "r"
    state = json.loads((folder / "ckpt_4" / "state" / "trainer.json").read_text())
    assert (state["launch"], state["world_size"]) == (kind, 2)
    assert launch(arguments) == [0]
    # the same numbers summed in another order, in fp32
    assert list(losses(folder).values()) == pytest.approx(list(plain.values()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_zero_takes_over_from_a_plain_process(world, tmp_path, plain, kind):
    arguments = [*run_arguments(world, tmp_path), "resume=auto", "batch_size=1"]
    assert launch([*arguments, "stop_at_step=4"]) == [0]
    assert launch([*arguments, f"launch={kind}"], 2, environment=CPU) == [0, 0]
    assert list(losses(tmp_path / "p" / "model" / "r").values()) == pytest.approx(
        list(plain.values()), rel=1e-4
    )


@pytest.mark.slow
def test_one_process_needs_no_launcher(world, tmp_path, plain):
    assert launch([*run_arguments(world, tmp_path), "launch=zero1"], environment=CPU) == [0]
    expected = list(plain.values())
    assert list(losses(tmp_path / "p" / "model" / "r").values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_zero_computes_in_bf16_over_fp32_parameters_and_resumes_to_the_bit(world, tmp_path):
    keys = ["launch=zero1", "dtype=bf16", "batch_size=1", "drop_prop=2", "freeze_rest=true"]
    whole, halves = (
        [*run_arguments(world, tmp_path / name), *keys, "resume=auto"] for name in ("whole", "halves")
    )
    assert launch(whole, 2, environment=CPU) == [0, 0]
    assert launch([*halves, "stop_at_step=4"], 2, environment=CPU) == [0, 0]
    assert launch(halves, 2, environment=CPU) == [0, 0]
    expected = losses(tmp_path / "whole" / "p" / "model" / "r")
    assert losses(tmp_path / "halves" / "p" / "model" / "r") == expected

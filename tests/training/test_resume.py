"""Killed anywhere, on one process and on two: the run goes on to the same losses, to the last bit.

Oracle: the same run without interruption.
"""

import gzip
from pathlib import Path

import pytest

from tests.training.conftest import run_arguments
from tests.training.launching import launch, losses
from training.checkpoint import checkpoints
from training.manifest import problem_of

VARIANTS = {
    "plain": [],
    "worker": ["num_workers=1"],
    "carried": ["state_passing=true"],
    "expanded": ["drop_prop=2", "drop_mode=extend", "freeze_rest=true", "reset_at_documents=true"],
}


@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory):
    """Losses of whole runs, by variant and number of processes; each is made once."""
    known: dict[tuple[str, int], dict[int, float]] = {}

    def get(variant: str, world_size: int) -> dict[int, float]:
        if (variant, world_size) not in known:
            output = tmp_path_factory.mktemp("whole")
            arguments = run_arguments(world, output) + VARIANTS[variant]
            assert launch(arguments, world_size) == [0] * world_size
            known[variant, world_size] = losses(output / "p" / "model" / "r")
        return known[variant, world_size]

    return get


@pytest.mark.parametrize(
    ("variant", "world_size", "point"),
    [
        ("plain", 1, ("step", 1)),
        ("plain", 1, ("weights", 4)),
        ("plain", 1, ("manifest", 4)),
        ("plain", 1, ("rename", 4)),
        ("carried", 1, ("step", 5)),
        ("expanded", 1, ("step", 4)),
        ("worker", 1, ("step", 6)),
        ("carried", 2, ("step", 6)),
        ("plain", 2, ("manifest", 6)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_losses(world, tmp_path, uninterrupted, variant, world_size, point):
    arguments = [*run_arguments(world, tmp_path), *VARIANTS[variant], "resume=auto"]
    statuses = launch(arguments, world_size, dies=point)
    assert statuses[0] == -9
    folder = tmp_path / "p" / "model" / "r"
    assert all(problem_of(checkpoint) is None for checkpoint in checkpoints(folder))
    assert launch(arguments, world_size) == [0] * world_size
    whole = uninterrupted("plain" if variant == "worker" else variant, world_size)
    assert losses(folder) == whole
    assert not list(folder.glob("*.tmp"))


def test_killed_again_and_again_still_the_same_losses(world, tmp_path, uninterrupted):
    arguments = [*run_arguments(world, tmp_path), "resume=auto", "keep_last=1"]
    for point in (("prune", 2), ("step", 4), ("rename", 4), ("step", 8)):
        assert launch(arguments, dies=point) == [-9]
    assert launch(arguments) == [0]
    assert losses(tmp_path / "p" / "model" / "r") == uninterrupted("plain", 1)


def test_one_and_two_processes_train_on_the_same_global_batches(uninterrupted):
    one, two = uninterrupted("plain", 1), uninterrupted("plain", 2)
    assert one.keys() == two.keys()
    # the same numbers summed in another order, in fp32
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(world, tmp_path, uninterrupted, before, after):
    arguments = [*run_arguments(world, tmp_path), "state_passing=true", "resume=auto", "batch_size=1"]
    assert launch([*arguments, "stop_at_step=4"], before) == [0] * before
    assert launch(arguments, after) == [0] * after
    expected = uninterrupted("carried", 1)
    assert list(losses(tmp_path / "p" / "model" / "r").values()) == pytest.approx(
        list(expected.values()), rel=1e-4
    )


def test_a_run_goes_on_from_a_compressed_copy_of_its_corpus(world, tmp_path, uninterrupted):
    arguments = [*run_arguments(world, tmp_path), "resume=auto"]
    assert launch([*arguments, "stop_at_step=4"]) == [0]
    (tmp_path / "copy").mkdir()
    content = (world / "corpus" / "a.jsonl").read_bytes()
    (tmp_path / "copy" / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert launch([*arguments, f"data_path={tmp_path / 'copy'}"]) == [0]
    assert losses(run_folder(tmp_path)) == uninterrupted("plain", 1)


def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "p" / "model" / "r"


@pytest.mark.parametrize("damage", ["truncate", "tamper", "remove", "manifest"])
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    world, tmp_path, uninterrupted, damage
):
    arguments = [*run_arguments(world, tmp_path), "resume=auto"]
    assert launch([*arguments, "stop_at_step=6"]) == [0]
    newest = run_folder(tmp_path) / "ckpt_6"
    weights = newest / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "tamper":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        (newest / "state" / "rng-0.safetensors").unlink()
    else:
        (newest / "state" / "manifest.json").write_text("{")
    log = tmp_path / "log"
    assert launch(arguments, log=log) == [0]
    said = log.read_text()
    assert "ckpt_6 is refused" in said
    assert "going on from" in said
    assert "ckpt_4" in said
    assert losses(run_folder(tmp_path)) == uninterrupted("plain", 1)


@pytest.mark.parametrize(("name", "world_size"), [("SIGTERM", 1), ("SIGUSR1", 2)])
def test_a_signal_saves_leaves_a_request_to_be_requeued_and_the_run_goes_on(
    world, tmp_path, uninterrupted, name, world_size
):
    arguments = [*run_arguments(world, tmp_path), "resume=auto"]
    assert launch(arguments, world_size, send=(name, 3)) == [75] * world_size
    folder = run_folder(tmp_path)
    assert [path.name for path in checkpoints(folder)] == ["ckpt_3", "ckpt_2"]
    assert (folder / "requeue").read_text().startswith("75\n")
    assert launch(arguments, world_size) == [0] * world_size
    assert not (folder / "requeue").exists()
    assert losses(folder) == uninterrupted("plain", world_size)


def test_old_checkpoints_go_but_for_keep_last_and_keep_every(world, tmp_path):
    arguments = [*run_arguments(world, tmp_path), "save_interval=1", "keep_last=2", "keep_every=3"]
    assert launch(arguments) == [0]
    assert [path.name for path in checkpoints(run_folder(tmp_path))] == [
        "ckpt_8",
        "ckpt_7",
        "ckpt_6",
        "ckpt_3",
    ]

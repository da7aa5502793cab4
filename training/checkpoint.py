"""Checkpoints: complete or not there at all.

`ckpt_{step}/` is a Hugging Face folder (model.safetensors in fp32, config.json, tokenizer) with the training
state in `state/`:

    trainer.json              step, tokens, skipped steps, position of every slot in the corpus
    optimizer-*.safetensors   AdamW's moments by parameter name (training.optimizer_state)
    rng-{rank}.safetensors    random generators of a rank
    carried-{rank}.safetensors  recurrent states of a rank's slots (state_passing)
    manifest.json             every file with size and checksum (training.manifest)

It is written as `ckpt_{step}.tmp`, brought to the disk, and renamed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.config import RunError
from training.distribution import Distribution
from training.manifest import problem_of, sync, write_manifest

TRAINER_FILE = Path("state") / "trainer.json"
_NAME = re.compile(r"ckpt_(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, complete or not."""
    found = [path for path in run_dir.glob("ckpt_*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match.group(1))


def newest_complete(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are named and passed over."""
    for folder in checkpoints(run_dir):
        problem = problem_of(folder)
        if problem is None:
            return folder
        say(f"{folder.name} is refused: {problem}; trying the one before")
    return None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER_FILE).read_text(encoding="utf-8"))


def save_checkpoint(
    distribution: Distribution,
    run_dir: Path,
    step: int,
    writers: Sequence[Callable[[Path], None]],
    bytes_needed: int,
) -> Path:
    """Write `ckpt_{step}` by calling every writer with a temporary folder, on every rank.

    Args:
        writers: each puts some files in place and raises when it cannot, but only after its last collective
            operation, or other ranks would wait for ever.
        bytes_needed: estimate that must fit on the disk beforehand.

    Raises:
        RunError: on every rank, when any rank failed; the checkpoints before are as they were.
    """
    target = run_dir / f"ckpt_{step}"
    beside = run_dir / f"ckpt_{step}.tmp"
    _together(distribution, target, lambda: distribution.is_main and _make_room(beside, target, bytes_needed))
    for write in writers:
        _together(distribution, target, partial(write, beside), cleanup=beside)
    _together(distribution, target, lambda: distribution.is_main and _finish(beside, target), cleanup=beside)
    return target


def prune(run_dir: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete old checkpoints, but for the newest `keep_last` and the multiples of `keep_every`.

    Those beyond `step`, the one just saved, were refused as damaged when the run went on from before them:
    they stand in for none that is whole, and are overwritten when the run gets there.
    """
    if keep_last == 0:
        return
    for folder in [path for path in checkpoints(run_dir) if step_of(path) <= step][keep_last:]:
        if not (keep_every and step_of(folder) % keep_every == 0):
            doomed = folder.with_name(folder.name + ".tmp")
            os.rename(folder, doomed)  # half-deleted must not look like a checkpoint
            shutil.rmtree(doomed)


def remove_leftovers(run_dir: Path) -> None:
    """Folders that a killed run was writing or deleting."""
    for folder in run_dir.glob("ckpt_*.tmp"):
        shutil.rmtree(folder)


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of a checkpoint: fp32 weights, and two moments of everything that trains."""
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (weights + 2 * trained)


def full_state_dict(distribution: Distribution, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole weights on rank 0, None elsewhere; collective. Under ZeRO-3 each rank holds only a share."""
    if not (distribution.uses_deepspeed and distribution.engine.zero_optimization_stage() == 3):
        return model.state_dict() if distribution.is_main else None
    import deepspeed

    whole: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if distribution.is_main:
                whole[name] = parameter.detach().to("cpu", copy=True)
    return whole if distribution.is_main else None


def _make_room(beside: Path, target: Path, bytes_needed: int) -> None:
    if beside.exists():
        shutil.rmtree(beside)
    free = shutil.disk_usage(beside.parent).free
    if free < bytes_needed:
        raise OSError(
            errno.ENOSPC,
            f"about {bytes_needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free",
        )
    (beside / "state").mkdir(parents=True)


def _finish(beside: Path, target: Path) -> None:
    write_manifest(beside)
    if target.exists():
        shutil.rmtree(target)  # refused as damaged before, or the same step again after a resume
    os.rename(beside, target)
    sync(target.parent)


def _together(
    distribution: Distribution, target: Path, action: Callable[[], Any], cleanup: Path | None = None
) -> None:
    """Run `action` on every rank; when any failed, all raise the same RunError."""
    failure = None
    try:
        action()
    except Exception as error:  # whatever a rank met, the others must not wait for it
        failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    failures = [text for text in distribution.gather_objects(failure) if text]
    if not failures:
        return
    if cleanup and distribution.is_main:
        shutil.rmtree(cleanup, ignore_errors=True)
    before = checkpoints(target.parent)
    whole = (
        f"the last checkpoint, {before[0].name}, is untouched" if before else "there is no earlier checkpoint"
    )
    full = any(word in failures[0] for word in ("No space", "are free", "quota"))
    hint = "; free some space, then resume=auto" if full else ""
    raise RunError(f"{target} could not be written ({failures[0]}); {whole}{hint}")

"""The folder of a comparison: who may write to it, and what it must not lose."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .opening import Source, identity_key
from .store import belongs, check_identity

Identified = tuple[Source, dict[str, Any]]


def claim(output: Path, models: Sequence[Identified]) -> list[Identified]:
    """The models with the labels under which their answers are kept there; the folder is made.

    Raises:
        ValueError: the folder has another model's answers or report, or cannot be made or written to.
    """
    _check_report(output, models)
    labelled = _with_kept_labels(output, models)
    for source, identity in labelled:
        check_identity(output / source.label, identity)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ValueError(f"output={output} cannot be written to ({error})") from None
    return labelled


def _check_report(output: Path, models: Sequence[Identified]) -> None:
    """A report of models that are not in this run would be written over."""
    known = {identity_key(identity) for _, identity in models}
    paths = [source.path for source, _ in models]
    others = [
        kept["path"]
        for kept in _reported(output)
        if identity_key(kept["identity"]) not in known and kept["path"] not in paths
    ]
    if others:
        raise ValueError(
            f"{output} holds the evaluation of {', '.join(others)}; give another output=, or compare them: "
            f"model={','.join(others + paths)} (what is answered is not asked again)"
        )


def _reported(output: Path) -> list[dict[str, Any]]:
    models = _results(output).get("models", [])
    return [model for model in models if {"path", "identity"} <= model.keys()]


def plots(output: Path) -> set[str]:
    """Names of the files that the last report there shows."""
    return set(_results(output).get("plots", []))


def _results(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # none yet, or none that could be lost


def _with_kept_labels(output: Path, models: Sequence[Identified]) -> list[Identified]:
    """A model that was evaluated alone keeps its short label when others of the same name join it."""
    labelled: list[Identified] = []
    for source, identity in models:
        taken = {other.label for other, _ in labelled}
        for label in source.shorter:
            if label not in taken and belongs(output / label, identity):
                source = dataclasses.replace(source, label=label)
                break
        labelled.append((source, identity))
    return labelled

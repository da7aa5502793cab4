"""Saving: folders that appear whole, with the code that rebuilds the model; published layouts.

transformers loads code from a model folder by following flat relative imports only (`from .name import x`
finds name.py beside the file). So the files of models/ that a model needs are copied under flat names,
ops/gla.py as ops_gla.py, and their relative imports are rewritten.
"""

import ast
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def auto_map(model_class: type) -> dict[str, str]:
    """config.json's pointer from transformers' Auto classes to the bundled code."""
    package, source = _source(model_class)
    module = _flat_name(source, package)
    return {
        "AutoConfig": f"{module}.{model_class.config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }


def bundle_code(model_class: type, folder: Path) -> None:
    """Write the source files that `model_class` needs into a folder, flat."""
    package, source = _source(model_class)
    waiting, done = [source], set()
    while waiting:
        file = waiting.pop()
        if file in done:
            continue
        done.add(file)
        text, needed = _flattened(file, package)
        (folder / f"{_flat_name(file, package)}.py").write_text(text, encoding="utf-8")
        waiting += needed


def _source(model_class: type) -> tuple[Path, Path]:
    file = Path(sys.modules[model_class.__module__].__file__).resolve()
    return file.parent, file


def _flat_name(file: Path, package: Path) -> str:
    return "_".join(file.relative_to(package).with_suffix("").parts)


def _flattened(file: Path, package: Path) -> tuple[str, list[Path]]:
    """Source with its relative imports made flat, and the files these name."""
    text = file.read_text(encoding="utf-8")
    lines, needed = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        written, line = f"from {'.' * node.level}{node.module} import", lines[node.lineno - 1]
        assert written in line, f"{file}:{node.lineno}: write `from .module import name` on one line"
        target = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
        lines[node.lineno - 1] = line.replace(written, f"from .{_flat_name(target, package)} import")
        needed.append(target)
    return "".join(lines), needed


@contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and else vanishes.

    Where `path` exists its files are replaced one by one, weights first and config.json last, its old weights
    go, and other files (a tokenizer, training state) stay.

    Raises:
        ValueError: `path` is a file.
    """
    target = Path(path).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is saved into a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            _replace_files(folder, target)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_files(new: Path, target: Path) -> None:
    stale = {file.name for pattern in WEIGHTS for file in target.glob(pattern)}
    names = sorted((file.name for file in new.iterdir()), key=lambda name: (name == "config.json", name))
    weights = [name for name in names if any(Path(name).match(pattern) for pattern in WEIGHTS)]
    for name in [*weights, *(name for name in names if name not in weights)]:
        os.replace(new / name, target / name)
    for name in stale - set(names):
        (target / name).unlink()


def save_published(model: Any, folder: str | os.PathLike) -> None:
    """Save an unexpanded model in its family's published layout, for transformers or flash-linear-attention.

    Raises:
        ValueError: a layer is expanded, for which the published layouts have no place, or there is no layout.
    """
    from huggingface_hub import save_torch_state_dict

    from .families import family_of

    config = model.config
    if changed := config.expanded_layers():
        raise ValueError(
            f"layers {changed} are expanded, which the published layout cannot say; use save_pretrained"
        )
    write_published = family_of(config).write_published
    if write_published is None:
        raise ValueError(f"the {family_of(config).name} family has no published layout; use save_pretrained")
    raw, tensors = write_published(model)
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    with complete_folder(folder) as temporary:
        save_torch_state_dict(dict(tensors), temporary, metadata={"format": "pt"})
        model.generation_config.save_pretrained(temporary)
        text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")

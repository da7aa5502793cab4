"""What a run starts from: its model's shape and weights, its tokenizer, its place among earlier runs."""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from models import build_model, expand_state, load_pretrained
from models.expansion import freeze_all_but_expanded
from models.language_model import LanguageModel
from models.loading import read_config
from models.ops.matmul import set_products
from training.checkpoint import checkpoints
from training.config import REPOSITORY, ConfigError, RunConfig, to_json
from training.trackers import check_trackers

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_BESIDE = "weights"  # name of the thread that makes them
# keys that must not change between a run and its continuation: they decide what the checkpoint's tensors and
# its position in the corpus mean
_FIXED = (
    "model_name", "drop_prop", "layers", "drop_mode", "expand_factor", "freeze_rest", "max_len", "seed",
    "reset_at_documents", "state_passing",
)  # fmt: skip


def model_file(config: RunConfig) -> Path:
    """The config.json of the starting model: model_name's, or ckpt_path's when model_name is only a label.

    Raises:
        ConfigError: neither exists.
    """
    folder = REPOSITORY / "configs" / "models"
    for candidate in (folder / f"{config.model_name}.json", Path(config.model_name)):
        if candidate.is_file():
            return candidate
    if (
        config.init_from == "pretrained"
        and config.ckpt_path
        and (Path(config.ckpt_path) / "config.json").is_file()
    ):
        return Path(config.ckpt_path) / "config.json"
    offered = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
    raise ConfigError(f"model_name={config.model_name}: no such file in configs/models; there are {offered}")


def shape_model(config: RunConfig) -> LanguageModel:
    """The starting model on meta tensors.

    Raises:
        ConfigError: its config.json cannot be used.
    """
    file = model_file(config)
    try:
        return build_model(str(file), device="meta")
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} describes no model that can be built: {error}") from None


def expansion_arguments(config: RunConfig) -> dict[str, Any]:
    """The run's keys as keyword arguments of `expand_state`."""
    return {
        "drop_prop": config.drop_prop,
        "drop_mode": config.drop_mode,
        "layers": config.layers,
        "expand_factor": config.expand_factor,
        "seed": config.seed,
        "freeze_rest": config.freeze_rest,
        "reinit": config.reinit,
    }


def start_shape(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    """The model that trains, expanded as the run asks, on meta tensors: there long before its weights.

    Matrix products are set to the run's format, for every model of this process.

    Args:
        checkpoint: a checkpoint of this run to go on from; its layers are expanded already.

    Raises:
        ConfigError: its config.json cannot be read.
    """
    try:
        shape = build_model(_source(config, checkpoint), device="meta")
        if config.expands and checkpoint is None:
            expand_state(shape, **expansion_arguments(config))
        set_products(config.products)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return shape


def start_model(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    """The model that trains, in fp32 on the CPU, expanded and frozen as the run asks.

    Args:
        checkpoint: a checkpoint of this run to go on from; its layers are expanded already.

    Raises:
        ConfigError: the weights do not fit their config.json, or cannot be read.
    """
    source = _source(config, checkpoint)
    try:
        if config.init_from == "scratch" and checkpoint is None:
            model = build_model(source, seed=config.seed)
        else:
            model = load_pretrained(source, dtype=torch.float32)
        if config.expands and checkpoint is None:
            expand_state(model, **expansion_arguments(config))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    if config.freeze_rest and checkpoint is not None:
        freeze_all_but_expanded(model)
    return model.train()


def start_model_beside(config: RunConfig, checkpoint: Path | None) -> Future[LanguageModel]:
    """`start_model` in a thread: 1.3B parameters take one core some 15 s, while the GPU is free to compile.

    Weights come from a generator of their own, so that a seed means the same ones whatever runs beside.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix=_BESIDE)
    model = thread.submit(start_model, config, checkpoint)
    thread.shutdown(wait=False)
    return model


def end_with(program: Callable[[], int]) -> NoReturn:
    """Run it and end the process with its status; by itself Python would wait for the weights first.

    Nobody wants them any more after a wrong argument, an error or Ctrl-C.
    """
    try:
        status = program()
    except (Exception, KeyboardInterrupt):
        if not _weights_are_coming():
            raise
        traceback.print_exc()
        status = 1
    if not _weights_are_coming():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _weights_are_coming() -> bool:
    return any(thread.name.startswith(_BESIDE) for thread in threading.enumerate())


def _source(config: RunConfig, checkpoint: Path | None) -> Path:
    """What the starting model is read from: a checkpoint, a folder of weights, or a config.json."""
    if checkpoint is None and config.init_from == "scratch":
        return model_file(config)
    return checkpoint or Path(str(config.ckpt_path))


def tokenizer_folder(config: RunConfig) -> Path:
    """Where the tokenizer lies: `tokenizer`, else the folder of the starting weights.

    Raises:
        ConfigError: neither is given.
    """
    folder = config.tokenizer or config.ckpt_path
    if folder is None:
        raise ConfigError(
            "tokenizer: init_from=scratch has no checkpoint folder to take it from; give tokenizer=FOLDER"
        )
    return Path(folder)


# checks that look at folders, made before anything is written


def check_vocabulary(config: RunConfig, tokenizer: Any) -> None:
    """Every token needs a row in the embeddings.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    rows = shape_model(config).config.vocab_size
    if len(tokenizer) > rows:
        raise ConfigError(
            f"tokenizer: {tokenizer_folder(config)} has {len(tokenizer)} tokens, the model's vocabulary only"
            f" {rows}; use the tokenizer that belongs to the model"
        )


def check_weights(config: RunConfig) -> None:
    """A pretrained start needs a folder with config.json and weights.

    Raises:
        ConfigError: something is missing; the message says where to get it.
    """
    if config.init_from != "pretrained":
        return
    if config.ckpt_path is None:
        raise ConfigError(
            "ckpt_path: init_from=pretrained needs the folder of the starting weights (or init_from=scratch)"
        )
    folder = Path(config.ckpt_path)
    hint = "python -m huggingface.download fetches the starting points, init_from=scratch needs none"
    if not folder.is_dir():
        raise ConfigError(f"ckpt_path={folder}: no such folder; {hint}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"ckpt_path={folder}: holds no config.json; {hint}")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ConfigError(f"ckpt_path={folder}: holds no weights (model.safetensors); {hint}")
    for file in sorted(folder.glob("*.safetensors")):
        _check_whole(file)
    _check_same_shape(config, folder)


def _check_whole(file: Path) -> None:
    """A file cut short shows in its header already; reading all of it is for the run itself."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"ckpt_path={file.parent}: {file.name} cannot be read ({error}); fetch it again"
        ) from None


def _check_same_shape(config: RunConfig, folder: Path) -> None:
    """The plan speaks of model_name's shape, and the run trains the folder's: they have to be one."""
    named = shape_model(config).config
    try:
        stored = read_config(folder)
    except ValueError as error:
        raise ConfigError(f"ckpt_path={folder}: {' '.join(str(error).split())}") from None
    for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "layers"):
        if getattr(named, field) != getattr(stored, field):
            values = "" if field == "layers" else f" ({getattr(stored, field)}, not {getattr(named, field)})"
            raise ConfigError(
                f"ckpt_path={folder}: its {field} differs from model_name={config.model_name}{values};"
                " a model_name that is no file in configs/models takes the folder's own shape"
            )


def check_output(config: RunConfig) -> None:
    """The run's folder can be written, and does not silently replace or mix with an earlier run.

    Raises:
        ConfigError: not writable, a run is there and resume is not asked for, or what it is resumed with
        contradicts it.
    """
    check_trackers(config)
    try:
        existing = config.run_dir
        while not existing.exists():
            existing = existing.parent
        problem = None if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        existing, problem = config.run_dir, error.strerror
    if problem:
        raise ConfigError(
            f"output_dir={config.output_dir}: {existing} cannot be written ({problem}); give another"
            " output_dir or run_name"
        )
    before = started_with(config)
    if config.resume != "auto" and (before is not None or checkpoints(config.run_dir)):
        raise ConfigError(
            f"{config.run_dir} holds a run already; resume=auto goes on with it, another run_name starts"
            " a new one"
        )
    for key in _FIXED if before is not None else ():
        now, then = to_json(config).get(key), before.get(key)
        if now != then:
            raise ConfigError(
                f"{key}={now}: {config.run_dir} was started with {key}={then}; use that, or another run_name"
            )


def started_with(config: RunConfig) -> dict[str, Any] | None:
    """The args.json in the run's folder; None where there is none yet.

    Raises:
        ConfigError: it cannot be read.
    """
    saved = config.run_dir / "args.json"
    if not saved.is_file():
        return None
    try:
        return dict(json.loads(saved.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{saved} is no readable JSON object; delete it to go on with the arguments given now, or use"
            " another run_name"
        ) from None

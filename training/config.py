"""The configuration of a run: one frozen dataclass, filled by command line over JSON file over default.

Reading a configuration touches one file at most, the JSON that `train_config` names; what needs models,
corpora or folders is checked in `training.validate`, still before anything is written.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """The configuration cannot run; the message is one line that says what to change. Exit status 2."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line. Exit status 1."""


@dataclass(frozen=True)
class RunConfig:
    """All keys of a run; each may stand on the command line (`key=value`, `--key=value`) or in the file."""

    # model
    model_name: str = "gla-1.3B"  # a file in configs/models (without .json), or a path to such a file
    init_from: str = "pretrained"  # pretrained: weights from ckpt_path; scratch: random, model_name's shape
    ckpt_path: str | None = None  # folder of the starting weights
    tokenizer: str | None = None  # tokenizer folder; none: the one in ckpt_path

    # expansion of the recurrent state; without drop_prop and layers nothing is expanded (LPT)
    drop_prop: int | None = None  # expand layer i when i % drop_prop == 0; must divide the number of layers
    layers: tuple[int, ...] | None = None  # expand these layers instead, comma-separated
    drop_mode: str | None = None  # how a layer is expanded; none: gla (GLA) or mamba4 (Mamba2)
    expand_factor: int | None = None  # growth of the state, mode extend only; none: 4
    freeze_rest: bool = False  # train only the expanded mixers and the norms in front of them
    reinit: str = "standard"  # standard, or published: the resets of the published code

    # where things go
    output_dir: str = "output"  # root of all runs; on a file system that every rank sees
    proj_name: str = "statex"  # first folder below output_dir
    run_name: str | None = None  # folder of this run; none: made from the expansion and train_config
    train_config: str | None = None  # JSON file with any of these keys; the command line rules over it
    resume: str = "never"  # never, or auto: go on from the newest complete checkpoint of this run

    # data
    data_name: str = "corpus"  # name of the training data, for the records
    data_path: str | None = None  # folder of chunk*/ with *.jsonl[.gz|.zst], or a pretokenised folder
    validation_data_name: str | None = None  # name of the held-out data, for the records
    validation_data_path: str | None = None  # folder like data_path; none: no validation
    max_len: int = 65536  # tokens of a training sequence
    batch_size: int = 1  # sequences of a micro-batch on one GPU
    grad_accum_steps: int = 1  # micro-batches of a step on one GPU; ignored when tokens_per_step is given
    tokens_per_step: int | None = None  # tokens of an optimiser step over all GPUs, kept by accumulation
    num_workers: int = 2  # loader processes of each rank; 0: read in the training process
    reset_at_documents: bool = False  # every document starts from an empty state (cu_seqlens)
    state_passing: bool = False  # every batch starts from the state its slot's stream left, without gradient

    # optimisation
    lr_scheduler: str = "cosine"  # cosine, constant, wsd, or cosine_restarts; all after a linear warm-up
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of a decay
    n_train_steps: int = 20000  # optimiser steps of the schedule
    n_warmup_steps: int = 1000  # optimiser steps of linear warm-up
    n_decay_steps: int | None = None  # optimiser steps of the final decay, wsd only; none: a tenth of the run
    n_restarts: int = 4  # cosine cycles, cosine_restarts only
    stop_at_step: int | None = None  # leave after this step with a checkpoint, the schedule unchanged
    weight_decay: float = 0.1  # AdamW, matrices only (not norms, biases, A_log, dt_bias, D)
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_nonfinite_steps: int = 10  # skipped steps in a row (non-finite loss or gradient) that end the run
    seed: int = 0  # file order, initial weights, expansion

    # machine
    launch: str = "zero1"  # zero1, zero2, zero3 (DeepSpeed), ddp, or cpu
    n_gpus: int | None = None  # processes, one a GPU; none: all visible GPUs (one process on a CPU)
    dtype: str = "bf16"  # compute type, bf16 or fp32; parameters and optimiser are always fp32
    products: str = "bf16"  # products of the blocks, bf16 or fp8 (wide ones, outputs and input gradients)
    grad_comm_dtype: str = "fp32"  # type in which ZeRO sums gradients over GPUs, fp32 or bf16
    recompute: str = "auto"  # activations not kept: auto, none, conv, scan, mlp, mixer, full or group
    compile: bool = False  # torch.compile the model

    # checkpoints and records
    save_interval: int = 1000  # steps between checkpoints
    save_last: bool = True  # a checkpoint at the last step too; false: a trial run that leaves its records
    keep_last: int = 0  # newest checkpoints kept; 0: all
    keep_every: int = 0  # besides keep_last, keep every checkpoint whose step is a multiple of this; 0: none
    log_interval: int = 1  # steps between records
    val_interval: int = 0  # steps between validations; 0: only at the end
    val_batches: int = 16  # sequences of max_len read by a validation, at most
    report_to: tuple[str, ...] = ("tensorboard",)  # also wandb, swanlab, trackio; none: metrics.jsonl only

    # instead of training
    plan: bool = False  # print what the run would do and exit
    validate_only: bool = False  # check everything and exit

    @property
    def expands(self) -> bool:
        """Whether any layer's state grows."""
        return self.drop_prop is not None or self.layers is not None

    @property
    def model_label(self) -> str:
        """Folder name of the model below the project."""
        return Path(self.model_name).stem if self.model_name.endswith(".json") else Path(self.model_name).name

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.proj_name / self.model_label / str(self.run_name)

    @property
    def last_step(self) -> int:
        """The step after which this process leaves."""
        return min(self.n_train_steps, self.stop_at_step or self.n_train_steps)


# keys that say what to do now, and so never stand in a file
COMMAND_LINE_ONLY = ("train_config", "plan", "validate_only")
_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
_TYPES = typing.get_type_hints(RunConfig)
# what other programs call some keys, for "did you mean"
_OTHER_NAMES = {
    "learning_rate": "lr", "max_steps": "n_train_steps", "sequence_length": "max_len",
    "max_norm": "grad_clip", "num_gpus": "n_gpus", "checkpoint": "ckpt_path",
    "accumulation_steps": "grad_accum_steps",
    "report": "report_to", "experiment": "run_name", "project": "proj_name",
}  # fmt: skip
_NONE_WORDS = ("none", "null", "")


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """Command line -> configuration with every value checked.

    Args:
        arguments: `key=value` or `--key=value`; a bare `--key` sets a switch.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, or keys that exclude each other.
    """
    from training.rules import check_rules

    given = dict(_split(argument) for argument in arguments)
    path = given.get("train_config")
    from_file = {} if path is None or path.lower() in _NONE_WORDS else read_json(path)
    typed = {key: _from_text(key, text) for key, text in given.items()}
    if "grad_accum_steps" in typed:
        if typed.get("tokens_per_step") is not None:
            raise ConfigError("grad_accum_steps and tokens_per_step exclude each other; give one of them")
        from_file["tokens_per_step"] = None  # the command line rules over the file
    config = RunConfig(**{**from_file, **typed})
    check_rules(config)
    return dataclasses.replace(config, run_name=config.run_name or _default_run_name(config))


def read_json(path: str) -> dict[str, object]:
    """Keys and typed values of a JSON configuration.

    Raises:
        ConfigError: no such file, not JSON, not an object, or a key or value that is not allowed.
    """
    file = find_train_config(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"train_config={path}: {file} is not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"train_config={path}: {file} must hold a JSON object of key: value pairs")
    for key in values:
        require_known(key, where=f" in {file}")
        if key in COMMAND_LINE_ONLY:
            raise ConfigError(f"{key} in {file}: this key belongs on the command line")
    return {key: _from_json(key, value, file) for key, value in values.items()}


def find_train_config(path: str) -> Path:
    """The file that `train_config` names: a path, or a name below configs/training.

    Raises:
        ConfigError: there is none; the message lists what configs/training offers.
    """
    folder = REPOSITORY / "configs" / "training"
    for candidate in (Path(path), REPOSITORY / path, folder / path, folder / f"{path}.json"):
        if candidate.is_file():
            return candidate
    offered = ", ".join(sorted(str(file.relative_to(REPOSITORY)) for file in folder.rglob("*.json")))
    raise ConfigError(f"train_config={path}: no such file; there are {offered}")


def to_json(config: RunConfig) -> dict[str, object]:
    """The resolved configuration; written as args.json it starts the same run again as `train_config`."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in COMMAND_LINE_ONLY}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _split(argument: str) -> tuple[str, str]:
    key, equals, text = argument.removeprefix("--").partition("=")
    key = key.strip().replace("-", "_")
    if not equals and not (argument.startswith("--") and _TYPES.get(key) is bool):
        if key in _FIELDS or argument.startswith("--"):
            require_known(key)
            raise ConfigError(f"{argument}: give the value as {key}=VALUE")
        raise ConfigError(f"{argument!r} is no key=value argument")
    require_known(key)
    return key, text.strip() if equals else "true"


def require_known(key: str, where: str = "") -> None:
    """Raises ConfigError for a key that there is not, with the one that may be meant."""
    if key not in _FIELDS:
        close = difflib.get_close_matches(key, [*_FIELDS, *_OTHER_NAMES], n=1, cutoff=0.5)
        hint = (
            f"did you mean {_OTHER_NAMES.get(close[0], close[0])}?"
            if close
            else f"known keys: {', '.join(_FIELDS)}"
        )
        raise ConfigError(f"unknown key {key!r}{where}; {hint}")


def _default_run_name(config: RunConfig) -> str:
    if not config.expands:
        method = "LPT"
    else:
        which = f"prop{config.drop_prop}" if config.drop_prop else f"{len(config.layers or ())}layers"
        method = f"StateX_{which}_{config.drop_mode or 'default'}"
    return f"{method}_{Path(config.train_config).stem}" if config.train_config else method


# values: one table from a field's type to what is accepted for it


def _base_type(key: str) -> tuple[object, bool]:
    """A field's type without None, and whether None is allowed."""
    hint = _TYPES[key]
    if isinstance(hint, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not type(None)), True
    return hint, False


def _describe(key: str) -> str:
    kind, optional = _base_type(key)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    name = names.get(kind) or (  # type: ignore[call-overload]
        "whole numbers joined by commas" if kind == tuple[int, ...] else "names joined by commas"
    )
    return f"{name}, or none" if optional else name


def _wrong(key: str, value: object, where: str = "") -> ConfigError:
    shown = value if isinstance(value, str) else json.dumps(value)
    return ConfigError(f"{key}={shown}{where}: expected {_describe(key)}")


def _from_text(key: str, text: str) -> object:
    kind, optional = _base_type(key)
    if text.lower() in _NONE_WORDS and (optional or kind == tuple[str, ...]):
        return None if optional else ()
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(","))
    except (ValueError, KeyError):
        raise _wrong(key, text) from None
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(","))
    if not text:
        raise _wrong(key, text)
    return text


def _from_json(key: str, value: object, file: Path) -> object:
    kind, optional = _base_type(key)
    where = f" in {file}"
    if value is None and optional:
        return None
    if kind is bool and value in (0, 1):  # the published files write 0 and 1
        return bool(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    if kind in (tuple[int, ...], tuple[str, ...]) and isinstance(value, list):
        member = typing.get_args(kind)[0]
        if all(type(item) is member for item in value):
            return tuple(value)
    if isinstance(value, str) and kind in (tuple[int, ...], tuple[str, ...]):
        return _from_text(key, value)
    raise _wrong(key, value, where)

"""Which part of the corpus this rank reads: its slots of every step, in micro-batches."""

from typing import Any

from data import TrainingLoader, ValidationLoader, slots_of_rank
from data import load_tokenizer as read_tokenizer
from data.registry import open_dataset
from training.checkpoint import checkpoints, read_trainer_state
from training.config import ConfigError, RunConfig
from training.progress import Console
from training.rules import slots_per_step
from training.start import check_vocabulary, tokenizer_folder


def load_tokenizer(config: RunConfig) -> Any:
    """The run's tokenizer.

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    folder = tokenizer_folder(config)
    try:
        return read_tokenizer(folder)
    except ValueError as error:
        raise ConfigError(f"tokenizer: {_one_line(error)}") from None


def own_groups(config: RunConfig, rank: int, world_size: int) -> list[list[int]]:
    """Slots of each of this rank's micro-batches of a step, in order."""
    slots = slots_of_rank(slots_per_step(config, world_size), rank, world_size)
    return [
        list(slots[start : start + config.batch_size]) for start in range(0, len(slots), config.batch_size)
    ]


def build_loader(
    config: RunConfig, tokenizer: Any, rank: int, world_size: int, console: Console | None = None
) -> TrainingLoader:
    """This rank's micro-batches, without end.

    Raises:
        ConfigError: no corpus, or too small a one for one step.
    """
    n_slots = slots_per_step(config, world_size)
    try:
        return TrainingLoader(
            open_dataset(config.data_name, config.data_path),
            tokenizer,
            max_len=config.max_len,
            n_slots=n_slots,
            slots=slots_of_rank(n_slots, rank, world_size),
            micro_batch_size=config.batch_size,
            seed=config.seed,
            reset_at_documents=config.reset_at_documents,
            num_workers=config.num_workers,
            pin_memory=config.launch != "cpu",
            on_broken_line=None
            if console is None
            else lambda report: console.say(f"skipped a broken line: {report}"),
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"data_path={config.data_path}: {_one_line(error)}") from None


def build_validation(
    config: RunConfig, tokenizer: Any, rank: int, world_size: int, n_sequences: int | None = None
) -> ValidationLoader | None:
    """This rank's share of the held-out sequences; None without validation_data_path.

    Args:
        n_sequences: instead of val_batches.

    Raises:
        ConfigError: nothing to read there.
    """
    if config.validation_data_path is None:
        return None
    try:
        return ValidationLoader(
            open_dataset(config.validation_data_name or config.data_name, config.validation_data_path),
            tokenizer,
            max_len=config.max_len,
            n_sequences=n_sequences or config.val_batches,
            micro_batch_size=config.batch_size,
            rank=rank,
            world_size=world_size,
            reset_at_documents=config.reset_at_documents,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"validation_data_path={config.validation_data_path}: {_one_line(error)}") from None


def check_data(config: RunConfig, world_size: int) -> None:
    """Tokenizer and corpora are there, fit the model, and fill at least one step.

    Raises:
        ConfigError: which of them does not, and what to do.
    """
    if config.data_path is None:
        raise ConfigError(
            "data_path: give the folder of the corpus (chunk*/ with *.jsonl, .jsonl.gz or .jsonl.zst)"
        )
    tokenizer = load_tokenizer(config)
    check_vocabulary(config, tokenizer)
    _check_position(config, build_loader(config, tokenizer, 0, world_size))
    build_validation(config, tokenizer, 0, world_size, n_sequences=1)


def _check_position(config: RunConfig, loader: TrainingLoader) -> None:
    """Where the newest checkpoint stands in the corpus has to mean something to this run."""
    newest = checkpoints(config.run_dir)[:1] if config.resume == "auto" else []
    for folder in newest:
        try:
            position = dict(read_trainer_state(folder)["data"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # damaged: the run will name it and take the one before
        try:
            loader.load_state_dict(position)
        except ValueError as error:
            raise ConfigError(f"{folder}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

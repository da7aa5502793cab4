"""The arguments of the evaluation command, checked before a model is opened."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from models.command_line import parse_arguments

RECALL_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class EvalArguments:
    """Evaluate one model, or several side by side.

    python -m eval model=FOLDER[,FOLDER...] [key=value ...]

    model=FOLDER,...     folders that load_pretrained opens; causal models of transformers, in folders or as
                         OWNER/NAME of the Hub; or
                         scripted:oracle, scripted:silent, scripted:rambling, which try tasks without a model
    tasks=NAME,...       families or single tasks (all but recall_twice); tasks=list names them, and any task
                         of lm-eval is lm_eval:NAME
    lengths=N,...        tokens of the prompts of niah and passkey (1K,4K,16K,64K) and ppl (4K); recall takes
                         those of 512, 1024, 2048 that are named, and all three if none is
    limit=N              items of a task and length (each family has its own default)
    output=DIR           answers, results.json, report.md, plots (eval_output); finished answers are reused
    depths=X,...         where needles lie, 0 the beginning, 1 the end (0,0.25,0.5,0.75,1)
    pairs=N,...          mqar: key-value pairs to remember (4,16,64)
    distances=N,...      mqar: tokens between the last pair and the first question (0,256)
    shots=N,...          icl: examples before the question (4,16,64)
    corpus=DIR           ppl: folder of jsonl files (.jsonl, .jsonl.gz, .jsonl.zst)
    data=DIR             evaluation data (huggingface/eval_data)
    seed=N               of everything generated (0)
    tokenizer=FOLDER     for models whose folder has none
    device=NAME          cuda where there is one, else cpu
    dtype=NAME           bfloat16, float32, ...; bfloat16 on a GPU, as stored elsewhere
    piece=N              tokens of a prompt read at once, the state carried on (32768 for this repository's
                         models on a GPU, 8192 elsewhere)
    batch_tokens=N       tokens of a batch, padding included (65536 on a GPU, 4096 elsewhere)
    allow_long=false     also prompts beyond the length that the tokenizer's folder names
    plots=true           draw the plots
    """

    model: str = ""
    tasks: str = "all"
    lengths: str | None = None
    limit: int | None = None
    output: str = "eval_output"
    depths: str = "0,0.25,0.5,0.75,1"
    pairs: str = "4,16,64"
    distances: str = "0,256"
    shots: str = "4,16,64"
    corpus: str | None = None
    data: str = "huggingface/eval_data"
    seed: int = 0
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str | None = None
    piece: int | None = None
    batch_tokens: int | None = None
    allow_long: bool = False
    plots: bool = True


@dataclass(frozen=True)
class Settings:
    """The same, with every value read and within its range."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] | None
    limit: int | None
    output: Path
    depths: tuple[float, ...]
    pairs: tuple[int, ...]
    distances: tuple[int, ...]
    shots: tuple[int, ...]
    corpus: Path | None
    data: Path
    seed: int
    tokenizer: str | None
    device: str
    dtype: str | None
    piece: int | None
    batch_tokens: int | None
    allow_long: bool
    plots: bool

    def lengths_or(self, *default: int) -> tuple[int, ...]:
        return self.lengths or default

    @property
    def recall_lengths(self) -> tuple[int, ...]:
        """Recall is defined at three lengths; others of `lengths` are for other families."""
        chosen = tuple(length for length in self.lengths or () if length in RECALL_LENGTHS)
        return chosen or RECALL_LENGTHS


def read_settings(argv: Sequence[str]) -> Settings:
    """Raises ValueError for an unknown key or a value out of range, naming it."""
    given = parse_arguments(EvalArguments, argv)
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    values["models"] = _names("model", values.pop("model"))
    values["tasks"] = _names("tasks", given.tasks)
    values["lengths"] = None if given.lengths is None else _numbers("lengths", given.lengths, 64)
    for name, low in (("pairs", 1), ("distances", 0), ("shots", 1)):
        values[name] = _numbers(name, values[name], low)
    values["depths"] = _depths(given.depths)
    for name in ("limit", "piece", "batch_tokens"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{name}={values[name]} must be at least 1")
    if not given.output:
        raise ValueError("missing output=...: a folder for answers and report")
    if given.seed < 0:
        raise ValueError(f"seed={given.seed} must not be negative")
    values.update(output=Path(given.output), data=Path(given.data))
    values["corpus"] = None if given.corpus is None else Path(given.corpus)
    return Settings(**values)


def _names(key: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ValueError(f"missing {key}=...; for example: model=huggingface/gla-1.3B-100B tasks=passkey")
    return names


def _numbers(key: str, text: str, low: int) -> tuple[int, ...]:
    """'512,64K,1M' -> (512, 65536, 1048576)."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d[\d_]*)([kKmM]?)", part.strip())
        if match is None:
            raise ValueError(f"{key}={text!r}: {part!r} is no whole number (1000000, 64K and 1M are)")
        number = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]
        if number < low:
            raise ValueError(f"{key}={text!r}: {part.strip()} is below {low}")
        numbers.append(number)
    return tuple(dict.fromkeys(numbers))


def _depths(text: str) -> tuple[float, ...]:
    try:
        depths = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"depths={text!r} are not numbers with commas between") from None
    if any(math.isnan(depth) or not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={text!r} must lie between 0 (the beginning) and 1 (the end)")
    return tuple(dict.fromkeys(depths))

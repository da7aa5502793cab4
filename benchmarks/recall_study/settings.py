"""Every size of the study: a JSON file of configs/study, overridden by `key=value`; unknown keys fail.

seeds=0,1,2  workers=12  families=gla  arms.gla=LPT,extend  base_steps=3000  shard_seconds=540
"""

import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# what does not change a run's numbers, and so stands in no fingerprint
EXECUTION = (
    "name",
    "families",
    "seeds",
    "first_seeds",
    "arms",
    "sweep",
    "sweep_best",
    "cost_steps",
    "workers",
    "device",
    "shard_seconds",
    "grace_seconds",
)
# came later: where they are at their default, they are no part of a fingerprint
ADDED = {
    **{"layers": (), "first_gate_width": 1.0, "embedding_width": 1.0, "curriculum_steps": 0, "own": {}},
    "keys_per_pair": 0,
}
OWN = (
    *("base_lr", "post_lr", "weight_decay", "base_steps", "base_min_steps"),
    *("first_gate_width", "embedding_width", "curriculum_steps", "layers"),
)
# of the task, where no key says it: part of every fingerprint
TASK = "an example a row, keys asked for with replacement"


@dataclass(frozen=True)
class Settings:
    """All sizes and switches. Fields without a default have to stand in the file."""

    name: str  # of this configuration; the raw file is named after it
    families: tuple[str, ...]  # of those in `models`, the ones to run
    models: dict[str, dict]  # family -> config.json fields without vocab_size
    arms: dict[str, tuple[str, ...]]  # family -> MODE or MODE:published; LPT is the control
    drop_prop: int  # layer i is expanded when i % drop_prop == 0, unless `layers` names them
    sweep: tuple[int, ...]  # further drop_prop for the best arms
    sweep_best: int  # how many best arms of a family are swept
    seeds: tuple[int, ...]  # data order, initial weights, expansion
    first_seeds: int  # this many seeds are finished, sweep included, before the others

    sequence_length: int  # tokens of a row
    rows: int  # rows of a step
    recall_rows: int  # of these, rows of recall; the others are text
    train_pairs: tuple[int, ...]  # pairs of the training examples
    eval_pairs: tuple[int, ...]  # pairs of the test examples
    eval_rows: int  # test examples of each size
    eval_queries: int  # questions of a test example at most; fewer where a row has no room for them
    text_eval_rows: int  # rows of held-out text
    n_keys: int
    n_values: int
    recall_pool_rows: int  # different rows of recall training data
    text_vocabulary: int  # BPE words, bytes and all

    base_steps: int  # the base's steps at most, before its decay
    base_min_steps: int  # and at least
    base_decay_steps: int  # linear decay to 0 behind the plateau
    base_eval_every: int
    plateau_window: int  # evaluations; the mean of the last ones is compared with that of those before
    plateau_gain: float  # mean recall: below this gain the base is on its plateau
    plateau_learned: float  # recall at the fewest pairs without which nothing counts as a plateau
    post_steps: int  # steps of every arm, cosine to 0
    post_eval_every: int
    post_early_evals: tuple[int, ...]  # further evaluated steps, early on
    warmup_steps: int
    base_lr: float
    post_lr: float
    cost_steps: int  # timed steps of a cost measurement, alone on the device; 0: none

    weight_decay: float = 0.1
    grad_clip: float = 1.0
    layers: tuple[int, ...] = ()  # the ones to expand, but for arms that name theirs
    first_gate_width: float = (
        1.0  # GLA: both forget-gate matrices of a base's first layer begin this much wider
    )
    embedding_width: float = 1.0  # a base's embeddings begin this much wider
    keys_per_pair: int = 0  # an example's keys are from the first this many times its pairs; 0: from all
    curriculum_steps: int = 0  # a base's steps until all train_pairs come up; they begin with the first one
    own: dict[str, dict] = dataclasses.field(
        default_factory=dict
    )  # family -> fields of OWN that differ there
    dtype: str = "bf16"  # of products; parameters and optimiser are fp32
    device: str = "cuda"
    workers: int = 12  # processes sharing the device; 1: none besides this one
    shard_seconds: int = 540  # this command's wall-clock limit
    grace_seconds: int = 20  # of these, to save what is under way

    @property
    def fingerprint(self) -> str:
        """Of everything that changes a run's numbers; records of other fingerprints are never mixed in."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in EXECUTION}
        for name, default in ADDED.items():
            if values[name] == default:
                del values[name]
        values["task"] = TASK
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def of(self, family: str) -> "Settings":
        """These settings with what `own` says for a family."""
        return dataclasses.replace(self, **self.own.get(family, {}), own={})

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.sequence_length


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_TYPES = typing.get_type_hints(Settings)


def read_settings(path: str | Path, overrides: dict[str, str] | None = None) -> Settings:
    """Settings of a JSON file with overrides from the command line.

    Raises:
        ValueError: no such file, an unknown or missing key, a wrong type, or sizes that do not fit together.
    """
    file = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if file is None:
        raise ValueError(f"config={path}: no such file; there is configs/study/gpu.json and cpu.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    for key, text in (overrides or {}).items():
        name, _, part = key.partition(".")
        _require_known(name)
        if part:  # arms.gla=LPT,merge
            values[name] = {**values[name], part: text.split(",")}
        else:
            values[name] = _from_text(name, text)
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> Settings:
    for key in values:
        _require_known(key)
    missing = [name for name, f in FIELDS.items() if _required(f) and name not in values]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    settings = Settings(**{key: _typed(key, value) for key, value in values.items()})
    _check(settings)
    return settings


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_dict(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _require_known(key: str) -> None:
    if key not in FIELDS:
        close = difflib.get_close_matches(key, FIELDS, n=1)
        raise ValueError(
            f"unknown key {key!r}" + (f"; did you mean {close[0]}?" if close else f": {', '.join(FIELDS)}")
        )


def _from_text(key: str, text: str) -> Any:
    kind = _TYPES[key]
    try:
        if typing.get_origin(kind) is tuple:
            return [typing.get_args(kind)[0](part) for part in text.split(",") if part]
        if typing.get_origin(kind) is dict:
            raise ValueError
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text!r}: expected {kind}") from None


def _typed(key: str, value: Any) -> Any:
    kind = _TYPES[key]
    if kind is float and isinstance(value, int):
        return float(value)
    origin = typing.get_origin(kind) or kind
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if not isinstance(value, origin) or isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: expected {kind}")
    if key == "arms":
        return {family: tuple(names) for family, names in value.items()}
    if key == "own":
        return {family: _typed_own(family, fields) for family, fields in value.items()}
    return value


def _typed_own(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    for key in fields:
        if key not in OWN:
            raise ValueError(f"own.{family}.{key}: a family may have its own {', '.join(OWN)}")
    return {key: _typed(key, value) for key, value in fields.items()}


def _check(s: Settings) -> None:
    for part in (s, *map(s.of, s.own)):
        _check_numbers(part)
    unknown = set(s.own) - set(s.models)
    if unknown:
        raise ValueError(f"own.{unknown.pop()}: the configuration has models for {', '.join(s.models)}")
    for family in s.families:
        if family not in s.models or family not in s.arms:
            raise ValueError(f"families={family}: the configuration has models for {', '.join(s.models)}")
    _check_recall(s)
    if not s.recall_rows < s.rows:
        raise ValueError(f"recall_rows={s.recall_rows} must leave rows of text (rows={s.rows})")
    if s.dtype not in ("bf16", "fp32"):
        raise ValueError(f"dtype={s.dtype}: expected bf16 or fp32")


def _check_numbers(s: Settings) -> None:
    may_be_0 = (
        "cost_steps",
        "grace_seconds",
        "sweep_best",
        "curriculum_steps",
        "keys_per_pair",
        "weight_decay",
        "plateau_gain",
    )
    for key, value in dataclasses.asdict(s).items():
        if isinstance(value, (int, float)) and not (value > 0 or (value == 0 and key in may_be_0)):
            raise ValueError(f"{key}={value}: expected a positive number")
    if s.curriculum_steps and list(s.train_pairs) != sorted(set(s.train_pairs)):
        raise ValueError(f"curriculum_steps={s.curriculum_steps}: train_pairs must rise, are {s.train_pairs}")


def _check_recall(s: Settings) -> None:
    pairs: Sequence[int] = (*s.train_pairs, *s.eval_pairs)
    longest = 1 + 2 * max(pairs) + 2  # with one question at least
    if longest > s.sequence_length:
        raise ValueError(f"{max(pairs)} pairs need {longest} tokens: sequence_length={s.sequence_length}")
    if max(pairs) > s.n_keys:
        raise ValueError(f"n_keys={s.n_keys}: {max(pairs)} pairs have as many different keys")

"""The models behind the rows of benchmarks.throughput, built as their users build them.

A row's name may end in `@LEVEL`, a level of recomputation for every layer, or in `@ROW`, the levels that the
automatic choice gives another row: `gla-lpt@gla-statex` is the unexpanded model with the expanded one's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.random_weights import draw_weights
from models import build_model, expand_state
from models.gla import GLABlock
from models.mamba2 import Mamba2Block
from models.ops import matmul
from models.trunk import GROUP
from training.config import RunConfig
from training.recompute import choose_recompute

CONFIGS = Path(__file__).parents[1] / "configs/models"
DEVICE = "cuda"


@dataclass(frozen=True)
class Spec:
    """What a row trains."""

    family: str
    source: str = "ours"  # or fla: flash-linear-attention's own model
    drop_prop: int | None = None
    drop_mode: str | None = None
    products: str | None = None  # of the matrix products; None is what training does by itself
    num_heads: int = 4  # fla's GLA only


ROWS = {
    "fla-gla": Spec("gla", "fla"),
    "fla-gla-one-head": Spec("gla", "fla", num_heads=1),
    "gla-lpt": Spec("gla"),
    "gla-statex": Spec("gla", drop_prop=6, drop_mode="gla"),
    "gla-one-head": Spec("gla", drop_prop=1, drop_mode="gla"),
    "gla-lpt-fp8": Spec("gla", products="fp8"),
    "fla-mamba2": Spec("mamba2", "fla"),
    "mamba2-lpt": Spec("mamba2"),
    "mamba2-statex": Spec("mamba2", drop_prop=6, drop_mode="mamba4"),
    "mamba2-all": Spec("mamba2", drop_prop=1, drop_mode="mamba4"),
    "mamba2-lpt-fp8": Spec("mamba2", products="fp8"),
}
# each family has some of them
LEVELS = tuple(dict.fromkeys((*GLABlock.recompute_levels, *Mamba2Block.recompute_levels, GROUP)))


@dataclass(frozen=True)
class Load:
    """What a step reads, and the bytes it may take."""

    length: int
    batch: int
    memory: float


def split_name(name: str) -> tuple[str, str]:
    """Row and what it recomputes: `auto`, a level, or the name of a row.

    Raises:
        ValueError: no such row, or levels that no row has.
    """
    row, _, levels = name.partition("@")
    if row not in ROWS:
        raise ValueError(f"unknown row {row!r}; rows: {', '.join(ROWS)}")
    if levels and ROWS[row].source == "fla":
        raise ValueError(f"{name}: flash-linear-attention recomputes every layer; leave @{levels} out")
    if levels and levels != "auto" and levels not in (*LEVELS, *ROWS):
        raise ValueError(f"{name}: expected a level ({', '.join(LEVELS)}) or a row behind the @")
    if levels in ROWS and (ROWS[levels].family, ROWS[levels].source) != (ROWS[row].family, "ours"):
        raise ValueError(f"{name}: the levels must come from a row of the same family, and of ours")
    return row, levels or "auto"


def build(name: str, load: Load) -> tuple[nn.Module, list[str]]:
    """The model of a row on the GPU, in training mode, and the level of recomputation of each layer."""
    row, levels = split_name(name)
    return _fla(ROWS[row]) if ROWS[row].source == "fla" else _ours(row, levels, load)


@contextmanager
def products_of(spec: Spec) -> Iterator[None]:
    """Matrix products as the row wants them, and afterwards as they were."""
    if spec.products is None:
        yield
        return
    before = matmul.products()
    matmul.set_products(spec.products)
    try:
        yield
    finally:
        matmul.set_products(before)


def _config(spec: Spec, load: Load) -> RunConfig:
    given = {} if spec.products is None else {"products": spec.products}
    return RunConfig(launch="ddp", max_len=load.length, batch_size=load.batch, **given)


def _shapes(spec: Spec) -> nn.Module:
    model = build_model(CONFIGS / f"{spec.family}-1.3B.json", device="meta")
    if spec.drop_prop is not None:
        expand_state(model, drop_prop=spec.drop_prop, drop_mode=spec.drop_mode)
    return model


def _ours(row: str, levels: str, load: Load) -> tuple[nn.Module, list[str]]:
    """This repository's 1.3B model as `train.py` prepares it, with random weights drawn on the GPU."""
    model = _shapes(ROWS[row])
    count = len(model.blocks)
    chosen = [levels] * count if levels in LEVELS else automatic(row if levels == "auto" else levels, load)
    model.set_recompute(list(chosen))
    return draw_weights(model, DEVICE).train(), list(chosen)


@cache
def automatic(row: str, load: Load) -> tuple[str, ...]:
    """The levels that training chooses by itself for a row; measured once."""
    spec = ROWS[row]
    device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == "cuda" else torch.device(DEVICE)
    with products_of(spec):
        return tuple(choose_recompute(_shapes(spec), _config(spec, load), 1, device, load.memory))


def _fla(spec: Spec) -> tuple[nn.Module, list[str]]:
    """flash-linear-attention's 1.3B models (its Mamba2 on mamba_ssm and causal_conv1d), bf16 parameters."""
    import fla.models

    if spec.family == "gla":
        config, model_class = fla.models.GLAConfig(num_heads=spec.num_heads), fla.models.GLAForCausalLM
    else:
        shape = {"vocab_size": 50288, "tie_word_embeddings": True, "state_size": 128, "head_dim": 64}
        config, model_class = fla.models.Mamba2Config(**shape), fla.models.Mamba2ForCausalLM
    with torch.device(DEVICE):
        model = model_class(config)
    model = model.to(DEVICE, torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    return model, ["full"] * config.num_hidden_layers

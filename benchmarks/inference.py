"""Prefill and decoding speed of the evaluation's own code, from random weights: no download.

    python -m benchmarks.inference                # both 1.3B shapes, as published and expanded, at 64K
    python -m benchmarks.inference model=gla-1.3B drop_prop=6 length=65536 batch=1,8
    python -m benchmarks.inference drop_prop=6 batch=1,8 passkey=1000000

Prints a line of JSON for each shape and batch size: prefill tokens/s, decoding tokens/s through CUDA graphs
and without them (summed over the batch; what was read before does not matter to it) and peak memory; then for
a passkey task the share of its time that was spent outside the model; then, with `passkey`, the seconds and
the peak memory of one passkey prompt of that length, read in pieces, beside those of one of 65,536 tokens.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.items import GENERATE, Item, as_tokens
from eval.model import EvalModel
from eval.registry import select
from eval.scripted import byte_tokenizer
from eval.session import Session
from eval.settings import read_settings
from eval.store import Store
from models import build_model, expand_state, state_report
from models.command_line import run_command
from models.decoding import GraphedDecoder

from .random_weights import draw_weights

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 256  # the byte tokenizer's
SHORT = 1024  # tokens in front of what is decoded


@dataclass(frozen=True)
class Arguments:
    """Measure prefill and decoding.

    model=NAME,...     files of configs/models (gla-1.3B,mamba2-1.3B)
    drop_prop=N,...    expand every N-th layer with the family's default mode; 0 leaves it as it is (0,6)
    length=N           tokens of the prompt (65536)
    batch=N,...        prompts at once (1,8)
    new_tokens=N       tokens decoded (256); an eighth of them without graphs
    piece=N            tokens read at once, of all prompts (the evaluation's: 32768 on a GPU, else 8192)
    tasks=true         also run a passkey task and report the share of its time outside the model
    passkey=N          also read one passkey prompt of N tokens (0: none)
    """

    model: str = "gla-1.3B,mamba2-1.3B"
    drop_prop: str = "0,6"
    length: int = 65536
    batch: str = "1,8"
    new_tokens: int = 256
    piece: int | None = None
    tasks: bool = True
    passkey: int = 0


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(action: Callable[[], Any]) -> float:
    if device() == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def prompts(count: int, length: int, new_tokens: int, vocabulary: int) -> list[Item]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, vocabulary, (count, length), generator=draw).numpy()
    return [
        Item("speed", str(i), GENERATE, as_tokens(row), max_new_tokens=new_tokens)
        for i, row in enumerate(rows)
    ]


def build(name: str, drop_prop: int) -> Any:
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    model = build_model(ROOT / f"configs/models/{name}.json", device="meta", dtype=dtype)
    if drop_prop:
        expand_state(model, drop_prop)
    return draw_weights(model, device()).eval()


def rate(model: EvalModel, count: int, new_tokens: int, graphs: bool | None) -> float | None:
    """Decoding tokens/s: a long generation less a one-token one, behind a short prompt.

    None where both took as long: too few tokens, or a machine that others use.
    """
    model.decoder = GraphedDecoder(model.model, graphs)
    one, many = (prompts(count, SHORT, n, VOCABULARY) for n in (1, 1 + new_tokens))
    model.answer(prompts(count, SHORT, 3, VOCABULARY))  # compiles, and captures
    reading = min(timed(lambda: model.answer(one)) for _ in range(2))
    both = min(timed(lambda: model.answer(many)) for _ in range(2))
    model.decoder.close()
    model.decoder = GraphedDecoder(model.model)
    return count * new_tokens / (both - reading) if both > reading else None


def measure(model: EvalModel, count: int, arguments: Arguments) -> dict[str, float | None]:
    model.end_ids = []  # random weights end texts at random
    model.answer(prompts(count, 2 * model.piece, 1, VOCABULARY))  # compiles
    reset_peak()
    long = prompts(count, arguments.length, 1, VOCABULARY)
    prefill = min(timed(lambda: model.answer(long)) for _ in range(2 if count == 1 else 1))
    peak = peak_gb()
    graphed = rate(model, count, arguments.new_tokens, None) if model.decoder.uses_graphs else None
    return {
        "prefill_tokens_per_second": count * arguments.length / prefill,
        "decode_tokens_per_second": graphed,
        "decode_tokens_per_second_without_graphs": rate(model, count, arguments.new_tokens // 8, False),
        "prefill_seconds": prefill,
        "peak_gb": peak,
    }


def reset_peak() -> None:
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device() == "cuda" else 0.0


def long_passkeys(model: EvalModel, length: int) -> dict[str, float]:
    """One passkey prompt of 65,536 tokens and one of `length`, each through the evaluation's path."""
    figures: dict[str, float] = {}
    ((family, task),) = select(["passkey"])
    assert family.build is not None
    for tokens in (min(65536, length), length):
        settings = read_settings(["model=speed", f"lengths={tokens}", "limit=1"])
        (item,) = family.build(task, settings, model.tokenizer)
        model.check(item)
        reset_peak()
        figures[f"passkey_{tokens}_tokens_read"] = len(item.tokens)
        figures[f"passkey_{tokens}_seconds"] = timed(lambda item=item: model.answer([item]))
        figures[f"passkey_{tokens}_peak_gb"] = peak_gb()
    return figures


def share_outside(model: EvalModel, length: int) -> float:
    """Of a passkey task: writing prompts, tokenising, scoring and keeping answers."""
    settings = read_settings(["model=speed", f"lengths={length}", "limit=8"])
    ((family, task),) = select(["passkey"])
    identity = {"path": "speed", "weights": "", "config": "", "tokenizer": "", "dtype": None}
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "speed", identity) as store:
        session = Session(model, store, "speed", quiet=True)
        assert family.build is not None
        session.run(task, family.build(task, settings, model.tokenizer))
    return 1 - session.model_seconds[task] / session.seconds[task]


def rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 3) for key, value in figures.items()}


def act(arguments: Arguments) -> None:
    where = torch.cuda.get_device_name() if device() == "cuda" else "cpu"
    for name in arguments.model.split(","):
        for drop_prop in (int(text) for text in arguments.drop_prop.split(",")):
            model = build(name, drop_prop)
            evaluated = EvalModel(model, byte_tokenizer(), piece=arguments.piece, batch_tokens=2**17)
            piece = evaluated.piece
            shape = {
                "model": name,
                "drop_prop": drop_prop,
                "state_elements": state_report(model).total_elements,
                "length": arguments.length,
                "piece": piece,
                "device": where,
            }
            for count in (int(text) for text in arguments.batch.split(",")):
                evaluated.piece = max(piece // count, 1)  # as much memory for many prompts as for one
                figures = measure(evaluated, count, arguments)
                print(json.dumps({**shape, "batch": count, **rounded(figures)}), flush=True)
            evaluated.piece = piece
            if arguments.tasks:  # last: the kernels are warm
                outside = round(share_outside(evaluated, arguments.length), 4)
                print(json.dumps({**shape, "passkey_share_outside_model": outside}), flush=True)
            if arguments.passkey:
                figures = long_passkeys(evaluated, arguments.passkey)
                print(json.dumps({**shape, **rounded(figures)}), flush=True)
            del model, evaluated
            if device() == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(run_command(Arguments, act))

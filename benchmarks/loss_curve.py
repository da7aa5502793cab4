"""Does training with the fast kernels lose anything? The loss curve beside the plain path's, on real text.

    python -m benchmarks.loss_curve [steps=200] [fp8=false] [families=gla,mamba2] [seconds=120]
                                    [output=loss_curve.json]

A small model of each family (4 layers, hidden 1024, one layer's state expanded) reads the same bytes of the
running Python's own sources in the same order, from the same weights:

| run        | operators    | precision                      |                                             |
| ---------- | ------------ | ------------------------------ | ------------------------------------------- |
| plain      | plain torch  | fp32, no TF32                  | what the others are compared with           |
| fast       | as installed | bf16 autocast, fp32 parameters | what training runs                          |
| fp8        | as installed | likewise, fp8 products         | with fp8=true                               |
| plain bf16 | plain torch  | bf16 autocast, fp32 parameters | what rounding to bf16 does without kernels  |
| moved      | plain torch  | fp32                           | weights moved by 1e-6 of themselves         |
| reseeded N | as installed | as fast                        | other initial weights: the run-to-run noise |

Prints the largest and mean difference of the smoothed loss for each, and whether fast (and fp8) stay within
the noise: the means over the reseeded runs of their largest and mean differences from fast. The learning
rate is that of the published recipe; at 1e-3 GLA's loss is chaotic: moved differs from plain more than half
as much as reseeded from fast.
Writes JSON and a PNG beside it; status 1 when outside. On a GPU all runs share it as processes of their own
(about 100 s); on a CPU, one after the other:

    python -m benchmarks.loss_curve steps=5 length=64 batch=2 hidden=64 families=gla
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loss_curve_report import RESEEDED, compare, draw, summary, within_noise
from data.quickstart import source_files
from models import build_model, expand_state
from models.command_line import run_command
from models.language_model import LanguageModel
from models.ops import matmul
from training.config import RunConfig
from training.optimizer import build_optimizer, set_learning_rate
from training.schedule import learning_rate

ROOT = Path(__file__).parents[1]
BYTES = 256  # the vocabulary


@dataclass(frozen=True)
class Arguments:
    """Loss curves of the fast and the plain path.

    steps=N        optimiser steps (200)
    families=...   gla,mamba2
    fp8=true       also with fp8 products
    length=N       tokens of a sequence (1024)
    batch=N        sequences of a step (4)
    hidden=N       width of the models, a multiple of 64 (1024)
    lr=X           peak learning rate (0.0003)
    seconds=N      after which runs stop where they are (120)
    workers=N      runs at once; none: all on a GPU, one on a CPU
    output=FILE    JSON; the picture has its name (loss_curve.json)
    """

    steps: int = 200
    families: str = "gla,mamba2"
    fp8: bool = False
    length: int = 1024
    batch: int = 4
    hidden: int = 1024
    lr: float = 3e-4
    seconds: float = 120.0
    workers: int | None = None
    output: str = "loss_curve.json"


@dataclass(frozen=True)
class Run:
    """How one curve is made."""

    name: str
    plain: bool = False  # plain torch operators
    half: bool = True  # bf16 autocast
    products: str = "bf16"
    seed: int = 0  # of the initial weights
    moved: float = 0.0  # relative change of the initial weights


RUNS = (
    Run("plain", plain=True, half=False),
    Run("fast"),
    Run("moved", plain=True, half=False, moved=1e-6),
    Run("plain bf16", plain=True),
    *(Run(name, seed=seed) for seed, name in enumerate(RESEEDED, start=1)),
)
FP8 = Run("fp8", products="fp8")


def read_rows(length: int, count: int) -> Tensor:
    """`count` sequences `[count, length]` of source text, byte by byte, in a fixed random order."""
    text = b"\n".join(path.read_bytes() for _, path in source_files())
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    available = len(rows) // length
    if available < count:
        raise ValueError(
            f"the standard library holds {available} sequences of {length} bytes, and {count} are needed; "
            "give fewer steps, a smaller batch or length"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))[:count]
    return rows[: available * length].view(available, length)[order].long()


def make_model(family: str, run: Run, arguments: Arguments) -> LanguageModel:
    """Four layers, the first one's state expanded; a seed gives the same weights on any device."""
    shape = {"vocab_size": BYTES, "hidden_size": arguments.hidden, "num_hidden_layers": 4}
    if family == "gla":
        shape["num_heads"] = 4
    else:
        shape |= {"head_dim": 64, "num_heads": 2 * arguments.hidden // 64, "state_size": 128}
    model = build_model(ROOT / f"configs/models/{family}-tiny.json", seed=run.seed, **shape)
    expand_state(model, drop_prop=4, seed=run.seed)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + run.moved * torch.randn(parameter.shape, generator=noise))
    return model.train()


def train(family: str, run: Run, arguments: Arguments, until: float) -> list[float]:
    """Losses of one run, step by step; stops early when the clock reads `until`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["STATEX_BACKEND"] = "torch" if run.plain else "auto"
    torch.set_float32_matmul_precision("highest")
    matmul.set_products(run.products)
    rows = read_rows(arguments.length, arguments.steps * arguments.batch).to(device)
    model = make_model(family, run, arguments).to(device)
    config = RunConfig(
        lr=arguments.lr,
        n_train_steps=arguments.steps,
        n_warmup_steps=max(1, arguments.steps // 10),
        lr_scheduler="constant",
    )
    optimizer = build_optimizer(model, config)
    losses = []
    for step, tokens in enumerate(rows.split(arguments.batch), start=1):
        set_learning_rate(optimizer, learning_rate(config, step))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=run.half):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if time.time() > until:
            break
    return torch.stack(losses).double().tolist()


def _job(family: str, run: Run, arguments: Arguments, until: float) -> list[float] | str:
    """Losses, or what went wrong."""
    before, products = os.environ.get("STATEX_BACKEND"), matmul.products()
    begin = time.time()
    try:
        losses = train(family, run, arguments, until)
        print(f"{family} {run.name}: {len(losses)} steps in {time.time() - begin:.0f} s", flush=True)
        return losses
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        matmul.set_products(products)
        if before is None:
            os.environ.pop("STATEX_BACKEND", None)
        else:
            os.environ["STATEX_BACKEND"] = before


def all_curves(arguments: Arguments, until: float) -> dict[str, dict[str, list[float] | str]]:
    """family -> run -> losses, or what went wrong."""
    families = arguments.families.split(",")
    runs = [*RUNS, FP8] if arguments.fp8 else list(RUNS)
    jobs = [(family, run, arguments, until) for run in runs for family in families]
    workers = arguments.workers
    if workers is None:
        workers = len(jobs) if torch.cuda.is_available() else 1
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            found = pool.starmap(_job, jobs, chunksize=1)
    else:
        found = [_job(*job) for job in jobs]
    curves: dict[str, dict[str, list[float] | str]] = {family: {} for family in families}
    for (family, run, _, _), losses in zip(jobs, found):
        curves[family][run.name] = losses
    return curves


def act(arguments: Arguments) -> int:
    unknown = [name for name in arguments.families.split(",") if name not in ("gla", "mamba2")]
    if unknown:
        raise ValueError(f"families: {unknown[0]!r} is unknown; there are gla and mamba2")
    if arguments.hidden % 64 or min(arguments.steps, arguments.batch, arguments.length - 1) < 1:
        raise ValueError(
            "expected hidden a multiple of 64, steps and batch of 1 or more, length of 2 or more"
        )
    begin = time.time()
    # early enough that what runs at the end still fits
    curves = all_curves(arguments, begin + 0.9 * arguments.seconds)
    results = {family: compare(runs) for family, runs in curves.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for family, result in results.items():
        print(summary(family, result, curves[family], arguments.steps))
    output = Path(arguments.output)
    record = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    record |= {"arguments": asdict(arguments), "results": results, "losses": curves}
    output.write_text(json.dumps(record, indent=1) + "\n")
    picture = draw(curves, output.with_suffix(".png"))
    print(f"wrote {output}{f' and {picture}' if picture else ', no picture: matplotlib is missing'}")
    print(f"{time.time() - begin:.0f} s")
    good = [within_noise(result, name) for result in results.values() for name in ("fast", "fp8")]
    return 0 if all(verdict is not False for verdict in good) else 1


if __name__ == "__main__":
    sys.exit(run_command(Arguments, act))

"""From a job to a record: train a base to its plateau, post-train an arm, measure an arm's cost.

A run that is told to stop saves itself under `work` and goes on from there next time, bit by bit the same
data: the batch of a step is a function of seed and step.
"""

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model, state_report
from training.config import RunConfig
from training.optimizer import build_optimizer, clip_coefficient, set_learning_rate
from training.schedule import learning_rate

from .arms import expand, parse_arm
from .corpus import StudyCorpus
from .measure import autocast, mean_recall, measure
from .settings import Settings

STOP_CHECK = 5  # steps between looks at the clock


@dataclass(frozen=True)
class Job:
    kind: str  # base, arm, or cost
    family: str
    seed: int
    arm: str = ""

    @property
    def label(self) -> str:
        return f"{self.kind} {self.family} seed {self.seed} {self.arm}".rstrip()


@dataclass
class Bench:
    """What runs stand on: settings, data on its device, a folder for weights, and whether to stop."""

    settings: Settings
    corpus: StudyCorpus
    work: Path  # of this fingerprint
    stopped: Callable[[], bool]

    @property
    def device(self) -> torch.device:
        return self.corpus.text.device


@dataclass
class Run:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        kept = {k: getattr(self, k) for k in ("step", "train_seconds", "eval_seconds", "curve", "facts")}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **kept}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)


def run_job(job: Job, bench: Bench) -> dict[str, Any] | None:
    """The record of a finished run, or None when it was told to stop (and has saved itself)."""
    bench = replace(bench, settings=bench.settings.of(job.family))
    work = {"base": run_base, "arm": run_arm, "cost": run_cost}[job.kind]
    record = work(job, bench)
    return record and _head(job, bench) | record


def _head(job: Job, bench: Bench) -> dict[str, Any]:
    where = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    names = {"kind": job.kind, "family": job.family, "seed": job.seed, "arm": job.arm}
    facts = {"corpus": bench.corpus.digest, "device": where, "torch": torch.__version__}
    return names | facts | {"date": time.strftime("%Y-%m-%d")}


def run_base(job: Job, bench: Bench) -> dict[str, Any] | None:
    """Constant learning rate up to the plateau of recall (or base_steps), then a linear decay to 0."""
    s = bench.settings
    schedule = _schedule(s, s.base_lr, s.base_steps)
    run = _begin(job, bench, build_base(job, bench), schedule)
    plateau = run.facts.get("plateau")
    while plateau is None:
        if run.step % s.base_eval_every == 0 and (not run.curve or run.curve[-1]["step"] < run.step):
            _evaluate(run, job, bench)
            plateau = _plateau(run.curve, s)
            _save(run, job, bench)
        if plateau is None and run.step % STOP_CHECK == 0 and bench.stopped():
            return _save(run, job, bench)
        if plateau is None:
            _step(run, job, bench, schedule)
    run.facts["plateau"] = plateau
    end = plateau["step"] + s.base_decay_steps
    schedule = _schedule(s, s.base_lr, end, warmup=0, lr_scheduler="wsd", n_decay_steps=s.base_decay_steps)
    if not _train_until(run, job, bench, end, schedule):
        return None
    _write(run.model.state_dict(), base_file(job, bench.work))
    return _finish(run, job, bench) | {"plateau": plateau, "weights": weights_digest(run.model)}


def run_arm(job: Job, bench: Bench) -> dict[str, Any] | None:
    """The same steps, schedule and batches for every arm of a seed."""
    s = bench.settings
    model = build_base(job, bench)
    model.load_state_dict(torch.load(base_file(job, bench.work), map_location=bench.device))
    weights = weights_digest(model)
    expand(model, parse_arm(job.arm), s, job.seed)
    schedule = _schedule(s, s.post_lr, s.post_steps, lr_scheduler="cosine")
    run = _begin(job, bench, model, schedule)
    run.facts.setdefault("weights", weights)
    due = {0, s.post_steps, *s.post_early_evals, *range(0, s.post_steps, s.post_eval_every)}
    if run.step == 0 and not run.curve:
        _evaluate(run, job, bench)
    for step in sorted(step for step in due if step > run.step and step <= s.post_steps):
        if not _train_until(run, job, bench, step, schedule):
            return None
    return _finish(run, job, bench) | {"weights": run.facts["weights"]}


def run_cost(job: Job, bench: Bench) -> dict[str, Any] | None:
    """Tokens a second and peak memory of training, with nothing else on the device."""
    s, device = bench.settings, bench.device
    model = build_base(job, bench)
    expand(model, parse_arm(job.arm), s, job.seed)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    schedule = _schedule(s, s.post_lr, s.post_steps)
    run = Run(model, build_optimizer(model, schedule))
    times = []
    for _ in range(s.cost_steps + 3):
        if bench.stopped():
            return None
        began = time.perf_counter()
        _step(run, job, bench, schedule)
        _wait(device)
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
    rate = s.tokens_per_step / statistics.median(times[3:])
    return {"tokens_per_second": round(rate), "peak_gb": peak and round(peak, 3), **_sizes(model)}


# --------------------------------------------------------------------------------------------------- parts


def build_base(job: Job, bench: Bench) -> nn.Module:
    """A base of the family with the weights that the job's seed draws."""
    config = bench.settings.models[job.family] | {"vocab_size": bench.corpus.vocab_size}
    model = build_model(config, device=bench.device, seed=job.seed).train()
    widen_first_gate(model, bench.settings.first_gate_width)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(bench.settings.embedding_width)
    return model


@torch.no_grad()
def widen_first_gate(model: nn.Module, factor: float) -> None:
    """Begin with a first layer that can forget at once.

    GLA divides a gate's logit by 16, so that a gate drawn narrow hardly forgets; without a short convolution
    the first layer needs one that does, to tell the token before from all others.
    """
    for name, parameter in model.blocks[0].token_mixer.named_parameters():
        if name.startswith("gk_proj") and name.endswith("weight"):
            parameter.mul_(factor)


def base_file(job: Job, work: Path) -> Path:
    return work / f"base-{job.family}-{job.seed}.pt"


def weights_digest(model: nn.Module) -> str:
    """Of all weights: arms with the same one began from the same base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _schedule(
    s: Settings, lr: float, steps: int, warmup: int | None = None, lr_scheduler: str = "constant", **more: Any
) -> RunConfig:
    return RunConfig(
        lr=lr,
        min_lr=0.0,
        n_train_steps=steps,
        n_warmup_steps=s.warmup_steps if warmup is None else warmup,
        lr_scheduler=lr_scheduler,
        weight_decay=s.weight_decay,
        grad_clip=s.grad_clip,
        **more,
    )


def _plateau(curve: list[dict[str, Any]], s: Settings) -> dict[str, Any] | None:
    """Where recall stopped to rise: None while it rises; reached=False when base_steps came first."""
    step, window = curve[-1]["step"], s.plateau_window
    gain = None
    if len(curve) >= 2 * window:
        last, before = curve[-window:], curve[-2 * window : -window]
        gain = sum(map(mean_recall, last)) / window - sum(map(mean_recall, before)) / window
    learned = curve[-1]["recall"][str(min(s.eval_pairs))] >= s.plateau_learned
    flat = gain is not None and gain < s.plateau_gain and learned and step >= s.base_min_steps
    if not flat and step < s.base_steps:
        return None
    over = window * s.base_eval_every  # steps between the two means
    return {"reached": flat, "step": step, "gain": gain and round(gain, 5), "over_steps": over}


def _begin(job: Job, bench: Bench, model: nn.Module, schedule: RunConfig) -> Run:
    """A run at its start, or where it was stopped."""
    run = Run(model, build_optimizer(model, schedule))
    file = _partial_file(job, bench)
    if file.is_file():
        run.load(torch.load(file, map_location=bench.device))
    return run


def _train_until(run: Run, job: Job, bench: Bench, step: int, schedule: RunConfig) -> bool:
    """Train up to `step` and measure there; False when told to stop before it."""
    while run.step < step:
        if run.step % STOP_CHECK == 0 and bench.stopped():
            _save(run, job, bench)
            return False
        _step(run, job, bench, schedule)
    if run.curve[-1]["step"] < step:
        _evaluate(run, job, bench)
    return True


def _step(run: Run, job: Job, bench: Bench, schedule: RunConfig) -> None:
    began = time.perf_counter()
    run.step += 1
    # a base reads batches of its own; all arms of a seed read the same ones
    phase = "base" if job.kind == "base" else "post"
    tokens, labels = bench.corpus.batch(bench.settings, job.seed, phase, run.step)
    with autocast(bench.settings, bench.device):
        loss = run.model(input_ids=tokens, labels=labels, logits_to_keep=1, use_cache=False).loss
    loss.backward()
    _update(run, schedule)
    run.train_seconds += time.perf_counter() - began


def _update(run: Run, schedule: RunConfig) -> None:
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norms: list[Tensor] = torch._foreach_norm(gradients)
    factor = clip_coefficient(torch.linalg.vector_norm(torch.stack(norms)), schedule.grad_clip)
    torch._foreach_mul_(gradients, factor)
    set_learning_rate(run.optimizer, learning_rate(schedule, run.step))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _evaluate(run: Run, job: Job, bench: Bench) -> None:
    began = time.perf_counter()
    _wait(bench.device)
    measured_from = time.perf_counter()
    run.train_seconds += measured_from - began  # steps that were launched but not yet done
    point = {"step": run.step, **measure(run.model, bench.corpus, bench.settings)}
    run.eval_seconds += time.perf_counter() - measured_from
    run.curve.append(point)
    if job.kind == "base":
        shares = " ".join(f"{n}:{share:.2f}" for n, share in point["recall"].items())
        print(f"  {job.label} step {run.step}: text {point['text_loss']}, recall {shares}", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sizes(model: nn.Module) -> dict[str, int]:
    report = state_report(model)
    return {
        "parameters": report.total_parameters,
        "state_elements": report.total_elements,
        "flops_per_token": report.flops_per_token,
    }


def _finish(run: Run, job: Job, bench: Bench) -> dict[str, Any]:
    _partial_file(job, bench).unlink(missing_ok=True)
    finite = all(point["text_loss"] is not None for point in run.curve)
    tokens = run.step * bench.settings.tokens_per_step
    rate = tokens / run.train_seconds if run.train_seconds > 0 else math.inf
    return {
        "steps": run.step,
        "tokens": tokens,
        "seconds": round(run.train_seconds + run.eval_seconds, 2),
        "shared_tokens_per_second": round(rate),  # beside the other workers
        "diverged": not finite,
        **_sizes(run.model),
        "curve": run.curve,
    }


def _partial_file(job: Job, bench: Bench) -> Path:
    name = f"{job.kind}-{job.family}-{job.seed}-{job.arm}".replace("/", "_").replace(":", "_")
    return bench.work / f"partial-{name}.pt"


def _save(run: Run, job: Job, bench: Bench) -> None:
    _write(run.state(), _partial_file(job, bench))


def _write(state: dict[str, Any], file: Path) -> None:
    """A kill while writing leaves the older file."""
    torch.save(state, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)

"""The training scripts on one and on several GPUs: the same losses, how much faster, and at what cost.

    python -m benchmarks.scaling                                       # 1 and 2 GPUs, about ten minutes
    python -m benchmarks.scaling n_gpus=1,8 limit=300 seconds=1200 resume=true
    python -m benchmarks.scaling n_gpus=1,2 launches=cpu scale=tiny    # on a CPU, through gloo

Runs `bash scripts/NAME.sh` from random weights on this Python's standard library: every script on every
number of GPUs with the first launch kind, then on more than the fewest with the others. Keys of a run that
are not listed below go to the scripts (`recompute=full drop_prop=4 data_path=... tokenizer=...`).

A step reads the same sequences in every run: it has tokens_per_step / max_len slots, each of them a stream of
its own, and a rank reads its range of slots (data/loader.py); one GPU accumulates over all of them. So the
losses may differ by rounding alone: at step 1 by 1e-4, relative, afterwards by `tolerance`, because AdamW's
first updates turn the rounding of small gradients into steps of full size.

- Steps are timed by the run itself, from metrics.jsonl: the median without the first two.
- `efficiency`: tokens/s a GPU over those of the run of the same script on the fewest GPUs.
- `lost a step`: the step's seconds beyond that run's divided among the GPUs. Under ZeRO the update is shared
  too, so on equal layers by recomputation this is communication that nothing hides, and waiting for the
  slowest rank; under ddp AdamW's undivided update as well. `recompute=full` makes the layers equal;
  `recompute=auto` recomputes less where several GPUs share the optimiser's state. Communication beside the
  backward pass shows only as far as it slows that pass down.
- `came up as` is what each run found by asking its parts; a run that is not what was asked for has failed.

`resume=true`: the first script's run on the most GPUs saves at its last step, and goes on from there for two
steps. Losses have to be those of the run on the fewest GPUs, which does not stop in between, and every slot
of the corpus has to stand where it was. No other run saves, and run folders are deleted (a checkpoint of the
1.3B models has 16.4 GB). A run that ends out of memory is repeated with recompute=full, and all later ones
run so.

A run of the 1.3B models takes 77 to 115 s with six steps (two H100s; a family's first one compiles, and a
run that saves writes 27 s), so the default's six runs some ten minutes, and `resume=true` 80 s more.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

from benchmarks.scaling_table import (
    Case,
    Row,
    baseline,
    check_distribution,
    check_position,
    check_records,
    disagreement,
    folder_bytes,
    loss_differences,
    read_output,
    summary,
    table,
)
from data.quickstart import build
from models.command_line import run_command
from training.config import REPOSITORY, RunConfig, read_json, require_known
from training.metrics import read_metrics
from training.rules import LAUNCHES

SCRIPTS = ("gla_StateX", "gla_LPT", "mamba2_StateX", "mamba2_LPT")
STEPS_AFTER_RESUME = 2
# keys of a run that this command sets itself, beside its own
_MANAGED = (
    "launch", "output_dir", "proj_name", "run_name", "n_train_steps", "stop_at_step", "save_interval",
    "save_last", "log_interval", "report_to", "plan", "validate_only", "grad_accum_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """The training scripts on one and on several GPUs.

    n_gpus=N,...       numbers of GPUs; with launches=cpu of processes (1,2)
    launches=...       zero1, zero2, zero3, ddp, cpu; the fewest GPUs run with the first alone (zero1,zero2)
    scripts=...        gla_StateX, gla_LPT, mamba2_StateX, mamba2_LPT (gla_StateX,mamba2_LPT)
    steps=N            optimiser steps of a run, 3 or more (6)
    tokens_per_step=N  tokens of a step in every run; none: one micro-batch a GPU on the most GPUs
    resume=true        save and go on from the checkpoint in one case
    tolerance=X        relative difference of losses that passes (0.005)
    train_config=...   file of the other keys (smoke_64k; tiny with scale=tiny)
    scale=tiny         tiny models
    limit=N            seconds after which a run is ended (150)
    seconds=N          seconds for everything: runs that no longer fit are not started (720)
    folder=...         for the corpus and for the run being made (output/scaling)
    logs=FOLDER        output of each run; none: logs in `folder`
    output=FILE        JSON, written after each run; none: scaling.json in `folder`
    """

    n_gpus: list[int] = field(default_factory=lambda: [1, 2])
    launches: str = "zero1,zero2"
    scripts: str = "gla_StateX,mamba2_LPT"
    steps: int = 6
    tokens_per_step: int | None = None
    resume: bool = False
    tolerance: float = 0.005
    train_config: str | None = None
    scale: str = ""
    limit: float = 150.0
    seconds: float = 720.0
    folder: str = "output/scaling"
    logs: str | None = None
    output: str | None = None


class Benchmark:
    """Arguments checked, and where everything goes."""

    def __init__(self, arguments: Arguments, extra: dict[str, str]) -> None:
        _check(arguments, extra)
        self.arguments, self.extra = arguments, extra
        self.began = time.monotonic()
        self.folder = Path(arguments.folder).resolve()
        self.logs = Path(arguments.logs or self.folder / "logs").resolve()
        self.output = Path(arguments.output or self.folder / "scaling.json").resolve()
        self.train_config = arguments.train_config or ("tiny" if arguments.scale else "smoke_64k")
        values = asdict(RunConfig()) | read_json(self.train_config) | extra
        self.max_len = int(values["max_len"])
        one_round = self.max_len * int(values["batch_size"]) * max(arguments.n_gpus)
        self.tokens_per_step = arguments.tokens_per_step or one_round

    @property
    def seconds_left(self) -> float:
        return self.arguments.seconds - (time.monotonic() - self.began)

    def settings(self, case: Case) -> dict[str, object]:
        """Keys of one run; where the command line names them too, its values rule."""
        corpus = self.folder / "corpus"
        data = {"data_path": corpus / "train", "tokenizer": corpus / "tokenizer"}
        return {
            **({"scale": self.arguments.scale} if self.arguments.scale else {}),
            **({} if "data_path" in self.extra else data),
            **{"init_from": "scratch", "train_config": self.train_config, "n_warmup_steps": 2, **self.extra},
            **{"launch": case.launch, "n_gpus": case.n_gpus, "tokens_per_step": self.tokens_per_step},
            **{"n_train_steps": self.arguments.steps + STEPS_AFTER_RESUME, "stop_at_step": case.last_step},
            **{"save_interval": 10**9, "save_last": str(case.saves).lower(), "log_interval": 1},
            **{"report_to": "none", "output_dir": self.folder / "runs", "proj_name": "scaling"},
            **{"run_name": case.folder, "resume": "auto" if case.resumes else "never"},
        }

    def run_dir(self, case: Case) -> Path:
        """Where the run writes; the model's name stands in between."""
        found = (self.folder / "runs" / "scaling").glob(f"*/{case.folder}")
        return next(found, self.folder / "runs" / "scaling" / "none")


def _check(arguments: Arguments, extra: dict[str, str]) -> None:
    for key, allowed in (("scripts", SCRIPTS), ("launches", LAUNCHES), ("scale", ("tiny", ""))):
        for name in getattr(arguments, key).split(","):
            if name not in allowed:
                raise ValueError(
                    f"{key}: {name!r} is unknown; use some of {', '.join(filter(None, allowed))}"
                )
    if min(arguments.n_gpus) < 1 or arguments.steps < 3:
        raise ValueError("expected n_gpus of 1 or more and steps of 3 or more: the first two are not timed")
    for key in extra:
        if key in _MANAGED:
            raise ValueError(f"{key}: this command sets it itself")
        require_known(key)


def cases(arguments: Arguments) -> list[Case]:
    """What to run, in order: the first launch kind, the continuation, the other launch kinds."""
    scripts, (first, *others) = arguments.scripts.split(","), arguments.launches.split(",")
    counts = sorted(set(arguments.n_gpus))
    beyond = arguments.steps + STEPS_AFTER_RESUME
    made = []
    for script in scripts:
        for n_gpus in counts:
            resumed = arguments.resume and script == scripts[0]
            saves = resumed and n_gpus == counts[-1]
            # the losses that the continuation has to meet
            last = beyond if resumed and not saves else arguments.steps
            made.append(Case(script, first, n_gpus, last, saves=saves))
    if arguments.resume:
        made.append(Case(scripts[0], first, counts[-1], beyond, resumes=True))
    more = [n for n in counts if n > counts[0]]
    made += [Case(s, launch, n, arguments.steps) for launch in others for s in scripts for n in more]
    return made


def run_case(benchmark: Benchmark, case: Case) -> Row:
    """Run the script to its end or its time limit; whatever it left is read and checked."""
    row = Row(case)
    limit = min(benchmark.arguments.limit, benchmark.seconds_left)
    settings = [f"{key}={value}" for key, value in benchmark.settings(case).items()]
    log = benchmark.logs / f"{case.name}.log"
    status, row.wall_seconds = run_command_line(["bash", f"scripts/{case.script}.sh", *settings], log, limit)
    if status != 0:
        ended = f"ended after its {limit:.0f} s" if status is None else f"exit status {status}"
        row.problem = f"{ended}; its last lines:"
    first_step = benchmark.arguments.steps + 1 if case.resumes else 1
    records = read_metrics(benchmark.run_dir(case) / "metrics.jsonl")
    row.records = [record for record in records if record["step"] >= first_step]
    read_output(row, log.read_text(encoding="utf-8", errors="replace"))
    problems = [] if row.problem else _problems(benchmark, row, first_step)
    row.problem = row.problem or "; ".join(filter(None, problems))
    return row


def _problems(benchmark: Benchmark, row: Row, first_step: int) -> list[str]:
    """What a run that ended well did wrong all the same."""
    problems = [check_distribution(row), check_records(row, first_step, benchmark.tokens_per_step)]
    if row.case.saves:
        folder = benchmark.run_dir(row.case) / f"ckpt_{row.case.last_step}"
        row.checkpoint_bytes = folder_bytes(folder)
        state = json.loads((folder / "state" / "trainer.json").read_text(encoding="utf-8"))
        slots = benchmark.tokens_per_step // benchmark.max_len
        problems.append(check_position(state, row.case.last_step, slots))
    return problems


def run_command_line(command: Sequence[str], log: Path, limit: float) -> tuple[int | None, float]:
    """Exit status and seconds; None where the time was up, and then all its processes have been ended."""
    environment = os.environ | {"STATEX_PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=max(limit, 0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_tree(process)
    return status, time.monotonic() - began


def end_tree(process: subprocess.Popen) -> None:
    """Kill a process with all that descend from it: launchers start ranks in sessions of their own."""
    import psutil

    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # SIGTERM would make the ranks save a checkpoint
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def run_all(benchmark: Benchmark) -> list[Row]:
    """Every case that fits into the time; the JSON file is written after each."""
    rows: list[Row] = []
    pending = cases(benchmark.arguments)
    while pending:
        case = pending.pop(0)
        shortest = min((row.wall_seconds for row in rows if not row.problem), default=0)
        saved = any(row.checkpoint_bytes for row in rows)
        if benchmark.seconds_left < max(shortest, 1):
            rows.append(
                Row(case, problem=f"not started: {benchmark.arguments.seconds:.0f} s are nearly over")
            )
        elif case.resumes and not saved:
            rows.append(Row(case, problem="not started: there is no checkpoint to go on from"))
        else:
            rows.append(run_case(benchmark, case))
            _judge_losses(benchmark, rows)
        if rows[-1].out_of_memory and "recompute" not in benchmark.extra:
            benchmark.extra["recompute"] = "full"
            pending.insert(0, case)
        # the continuation needs the folder, and again where it is repeated
        if not rows[-1].checkpoint_bytes and not (case.resumes and case in pending):
            shutil.rmtree(benchmark.run_dir(case), ignore_errors=True)
        _write(benchmark, rows)
        state = rows[-1].problem or "ok"
        print(f"{case.name}: {state} ({rows[-1].wall_seconds:.0f} s)", flush=True)
    return rows


def _judge_losses(benchmark: Benchmark, rows: list[Row]) -> None:
    row = rows[-1]
    differences = loss_differences(row, baseline(row, rows))
    if not row.problem:
        row.problem = disagreement(differences, benchmark.arguments.tolerance)


def _write(benchmark: Benchmark, rows: list[Row]) -> None:
    packages = ("torch", "accelerate", "deepspeed")
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "arguments": asdict(benchmark.arguments) | {"extra": benchmark.extra},
        "tokens_per_step": benchmark.tokens_per_step,
        "max_len": benchmark.max_len,
        "seconds": time.monotonic() - benchmark.began,
        "rows": [summary(row, rows) for row in rows],
    }
    benchmark.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError is one
        return None


def act(arguments: Arguments, extra: dict[str, str]) -> int:
    """Exit status 0 when every run did what it was asked to."""
    benchmark = Benchmark(arguments, extra)
    for folder in (benchmark.folder, benchmark.logs, benchmark.output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    runs = benchmark.folder / "runs"
    if runs.exists():
        shutil.rmtree(runs)  # of a benchmark that was killed
    if "data_path" not in extra:
        build(benchmark.folder / "corpus", recall_share=0.0)
    try:
        rows = run_all(benchmark)
    finally:
        shutil.rmtree(runs, ignore_errors=True)
    print(
        f"\n{benchmark.tokens_per_step:,} tokens a step of {benchmark.max_len:,} a sequence; wrote", end=" "
    )
    print(f"{benchmark.output}, logs in {benchmark.logs}; {time.monotonic() - benchmark.began:.0f} s\n")
    print(table(rows))
    return 1 if any(row.problem for row in rows) else 0


def main(words: Sequence[str]) -> int:
    """Keys of this command are parsed strictly, other keys of a run go to the scripts."""
    own = {item.name for item in fields(Arguments)}
    keys = {word: word.removeprefix("--").partition("=") for word in words}
    extra = {key: text for key, equals, text in keys.values() if equals and key not in own}
    mine = [word for word in words if keys[word][0] not in extra]
    return run_command(Arguments, lambda arguments: act(arguments, extra), mine)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    sys.exit(main(sys.argv[1:]))

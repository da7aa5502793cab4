"""Tokens a second of the training loader, on the fly and pretokenised, beside what a GPU consumes.

    python -m benchmarks.loader [megabytes=64] [max_len=65536] [n_slots=8] [micro_batch_size=1]
        [num_workers=0] [seconds=10] [tokenizer=FOLDER] [corpus=FOLDER]

`num_workers` is the number of cores to use (0: this process alone, which is one core). Without `corpus` one
is made from the standard library's sources, repeated to the given size, with a tokenizer of 32,000 tokens
trained on it. A second of CPU time is a second of all the cores that this process had: where others use the
machine, it is the figure to trust (worker processes are not in it).
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from data import TrainingLoader, load_tokenizer
from data.arguments import parse_arguments, run_command
from data.pretokenize import pretokenize
from data.quickstart import source_files, train_tokenizer

GPU_TOKENS_PER_SECOND = 60_000  # a 1.3B model on one H100 or H200, generously


def main(arguments: list[str]) -> None:
    settings = parse_arguments(
        arguments,
        {
            "megabytes": (int, 64),
            "max_len": (int, 65536),
            "n_slots": (int, 8),
            "micro_batch_size": (int, 1),
            "num_workers": (int, 0),
            "seconds": (float, 10.0),
            "tokenizer": (str, None),
            "corpus": (str, None),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), **settings)


def run(
    folder: Path,
    megabytes: int,
    tokenizer: str | None,
    corpus: str | None,
    seconds: float,
    **loader_settings: int,
) -> None:
    texts = [path.read_text(encoding="utf-8", errors="replace") for _, path in source_files()]
    reader = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(texts, 32_000)
    source = Path(corpus) if corpus else _write_corpus(folder / "corpus", texts, megabytes)
    print(f"corpus {source}, vocabulary {len(reader)}, {loader_settings}")
    start, start_cpu = time.perf_counter(), time.process_time()
    manifest = pretokenize(source, folder / "tokens", reader, workers=max(1, loader_settings["num_workers"]))
    n_tokens = sum(entry["tokens"] for entry in manifest["files"])
    elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    _report("pretokenising", n_tokens / elapsed, n_tokens / elapsed_cpu)
    _report("on the fly", *_throughput(source, reader, seconds, loader_settings))
    _report("pretokenised", *_throughput(folder / "tokens", reader, seconds, loader_settings))


def _write_corpus(folder: Path, texts: list[str], megabytes: int) -> Path:
    size = sum(map(len, texts))
    for index in range(max(1, megabytes * 1_000_000 // size)):
        path = folder / f"chunk{index + 1}" / "part_0.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts))
    return folder


def _throughput(source: Path, tokenizer, seconds: float, settings: dict[str, int]) -> tuple[float, float]:
    """Tokens a second of the clock, and of CPU time."""
    loader = TrainingLoader(source, tokenizer, **settings)
    batches = iter(loader)
    for _ in range(loader.batches_per_step):  # workers start, caches warm up, prefetched batches arrive
        next(batches)
    start, start_cpu, n_tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        n_tokens += next(batches)["input_ids"].numel()
    return n_tokens / (time.perf_counter() - start), n_tokens / (time.process_time() - start_cpu)


def _report(what: str, tokens_per_second: float, tokens_per_cpu_second: float) -> None:
    multiple = tokens_per_second / GPU_TOKENS_PER_SECOND
    print(
        f"{what:14s} {tokens_per_second:12,.0f} tokens/s = {multiple:6.1f} x {GPU_TOKENS_PER_SECOND:,}; "
        f"{tokens_per_cpu_second:12,.0f} a second of CPU time"
    )


if __name__ == "__main__":
    run_command(main)

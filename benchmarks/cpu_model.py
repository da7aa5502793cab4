"""Speed of the plain torch path on a CPU: forward and backward of a small GLA and a small Mamba2 model.

    python -m benchmarks.cpu_model [rounds=5]

Hidden size 128, 4 layers, 16 sequences of 256 tokens; GLA with 2 heads of K = 32, V = 64, Mamba2 with 4 heads
of 64 and a state size of 32. Prints tokens per second, the median of `rounds`.
"""

import statistics
import sys
import time

import torch

from models import build_model

BATCH, LENGTH, WORDS = 16, 256, 4096
SIZES = {"vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": 4}
SHAPES = {"gla": {"num_heads": 2}, "mamba2": {"num_heads": 4, "head_dim": 64, "state_size": 32}}


def tokens_per_second(family: str, rounds: int) -> float:
    """Median over `rounds` passes, after one to warm up."""
    model = build_model(f"configs/models/{family}-tiny.json", **SIZES, **SHAPES[family]).train()
    tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        times.append(time.perf_counter() - start)
    return tokens.numel() / statistics.median(times[1:])


def main(arguments: list[str]) -> int:
    given = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    unknown = set(given) - {"rounds"}
    if unknown or not given.get("rounds", "5").isdigit() or int(given.get("rounds", "5")) < 1:
        print("benchmarks.cpu_model: takes rounds=N, N at least 1", file=sys.stderr)
        return 2
    rounds = int(given.get("rounds", "5"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; forward and backward")
    for family in SHAPES:
        print(f"{family}: {tokens_per_second(family, rounds):,.0f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Times of the SSD and convolution kernels at 65,536 tokens: benchmarks/gpu_check_ssd.py runs them."""

import torch

from models.ops import conv_triton, ssd_triton, ssd_triton_shape
from models.ops.conv import causal_conv1d
from models.ops.ssd import ssd

TOKENS, HEADS, HEAD_DIM = 65536, 64, 64
CONVOLUTIONS = [
    {"TOKENS": 128, "BLOCK": 256, "num_warps": 2},
    {"TOKENS": 128, "BLOCK": 256, "num_warps": 1},
    {"TOKENS": 64, "BLOCK": 128, "num_warps": 1},
]


def milliseconds(function, repeats=5):
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def big_inputs(state_size, tokens=TOKENS):
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    wide = torch.randn(1, tokens, width + 2 * state_size, device="cuda", dtype=torch.bfloat16)
    x, B, C = wide.split([width, state_size, state_size], dim=2)
    dt = torch.nn.functional.softplus(torch.randn(1, tokens, HEADS, device="cuda") - 3)
    A = -torch.rand(HEADS, device="cuda") * 15 - 1
    return {
        "x": x.unflatten(2, (HEADS, HEAD_DIM)),
        "dt": dt,
        "A": A,
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.ones(HEADS, device="cuda"),
    }


def time_whole(backend, state_size):
    inputs = {n: t.detach().requires_grad_() for n, t in big_inputs(state_size).items()}
    dy = torch.randn(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def forward():
        return ssd(**inputs, backend=backend)[0]

    y = forward()
    forward_ms = milliseconds(lambda: forward())
    backward_ms = milliseconds(lambda: torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True))
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    times = f"forward {forward_ms:.3f} ms, backward {backward_ms:.3f} ms, backward peak {peak:.2f} GiB"
    print(f"{backend:10s} N={state_size} {times}")


class Pieces:
    """The launches of one call of the operator, one by one."""

    def __init__(self, state_size, chunk, tokens=TOKENS):
        self.i = big_inputs(state_size, tokens)
        ssd_triton_shape.CONFIGS[2] = dict(ssd_triton_shape.CONFIGS[2], chunk={"Q": chunk})
        self.shape = ssd_triton_shape.Shape(self.i["x"], self.i["B"], None)
        self.dy = torch.randn_like(self.i["x"], memory_format=torch.contiguous_format)
        self.decays = ssd_triton.running_decays(self.shape, self.i["dt"], self.i["A"])
        self.scores = ssd_triton.chunk_scores(self.shape, self.i["B"], self.i["C"])
        self.large = state_size >= ssd_triton.LARGE_STATE
        self.states = self.run_march() if self.large else self.run_states(True)
        self.gradients = self.states.clone()
        self.out = torch.empty_like(self.dy)
        self.keys = torch.empty_like(self.i["B"], memory_format=torch.contiguous_format)

    def run_states(self, forward=True):
        return ssd_triton.chunk_states(self.shape, self.i["x"], self.i["B"], self.decays, forward=forward)

    def run_march(self):
        return ssd_triton.march(self.shape, self.i["x"], self.i["B"], self.decays, None, False)[0]

    def run_march_back(self):
        shape, states = self.shape, self.states
        return ssd_triton.march(shape, self.dy, self.i["C"], self.decays, None, False, fronts=states)[0]

    def run_outputs(self, forward):
        ssd_triton.outputs(
            self.shape,
            self.i["x"],
            self.i["C"],
            self.states,
            self.scores,
            self.i["D"],
            self.decays,
            self.out,
            forward=forward,
        )
        return self.out

    def run_keys(self, queries):
        i = self.i
        ssd_triton.key_gradients(
            self.shape,
            i["x"],
            i["B"],
            i["C"],
            self.states,
            self.scores,
            self.decays,
            self.keys,
            queries=queries,
        )
        return self.keys

    def run_scores(self):
        return ssd_triton.score_gradients(self.shape, self.i["x"], self.dy, self.scores, self.decays, True)

    def launches(self):
        """Kernel -> its launches, for the kernels that benchmarks/tune_ssd.py tunes."""
        marches = {"march": [self.run_march], "march_back": [self.run_march_back]}
        return {
            "outputs": [lambda: self.run_outputs(True), lambda: self.run_outputs(False)],
            "score_gradients": [lambda: self.run_scores()[0].tril()],  # above, nothing is written
            "key_gradients": [lambda: self.run_keys(True), lambda: self.run_keys(False)],
            **(marches if self.large else {"states": [lambda: self.run_states(True)]}),
        }

    def table(self):
        """Kernel -> [(label, function, FLOPs, bytes)]."""
        state_size, chunk = self.shape.state_size, self.shape.chunk
        tokens = self.shape.length
        with_state, rows, state = self.sizes()
        intra = 1.0 * tokens * chunk * HEADS * HEAD_DIM
        s, d = self.shape, self.decays
        sums = self.sums()
        return {
            **(self.marches() if self.large else self.passes()),
            "outputs": [
                (f"outputs fw={f}", lambda f=f: self.run_outputs(f), with_state + intra, 2 * rows + state)
                for f in (True, False)
            ],
            "score_gradients": [("score_gradients", self.run_scores, intra, 2 * rows)],
            "key_gradients": [
                (f"key_gradients q={q}", lambda q=q: self.run_keys(q), with_state, rows + state)
                for q in (True, False)
            ],
            "steps": [
                (
                    "step_gradients",
                    lambda: ssd_triton.step_gradients(s, self.i["dt"], self.i["A"], d, *sums),
                    0,
                    tokens * HEADS * 32,
                )
            ],
            "others": [
                (
                    "running_decays",
                    lambda: ssd_triton.running_decays(s, self.i["dt"], self.i["A"]),
                    0,
                    tokens * HEADS * 12,
                ),
                (
                    "chunk_scores",
                    lambda: ssd_triton.chunk_scores(s, self.i["B"], self.i["C"]),
                    1.0 * tokens * chunk * state_size,
                    0,
                ),
            ],
        }

    def passes(self):
        s, d, with_state, rows, state = self.shape, self.decays, *self.sizes()
        back = (self.gradients, self.states, d, None, None)
        return {
            "states": [
                (f"states fw={f}", lambda f=f: self.run_states(f), with_state, rows + state)
                for f in (True, False)
            ],
            "pass": [
                ("pass_states", lambda: ssd_triton.pass_states(s, self.states, d, None, False), 0, 2 * state),
                ("pass_gradients", lambda: ssd_triton.pass_gradients(s, *back), 0, 3 * state),
            ],
        }

    def marches(self):
        with_state, rows, state = self.sizes()
        return {
            "march": [
                ("march", self.run_march, with_state, rows + state),
                ("march_back", self.run_march_back, with_state, rows + 2 * state),
            ]
        }

    def sizes(self):
        """FLOPs of a product with the state; bytes of x, and of the states."""
        tokens = self.shape.length * HEADS * HEAD_DIM
        return 2.0 * tokens * self.shape.state_size, 2 * tokens, 2 * self.states.numel()

    def sums(self):
        i, s, d = self.i, self.shape, self.decays
        _, row_sums, column_sums, _ = self.run_scores()
        read, added = (
            ssd_triton.key_gradients(
                s, i["x"], i["B"], i["C"], self.states, self.scores, d, self.keys, queries=queries
            )
            for queries in (True, False)
        )
        _, parts, _ = ssd_triton.state_gradients(s, self.dy, i["C"], self.states, d, None, None)
        return (row_sums, column_sums, read, added), parts


def time_pieces(state_size, chunk, tokens=TOKENS):
    """Times every kernel, and counts those that fail; few tokens only fill the compiler's cache."""
    failures = 0
    for rows in Pieces(state_size, chunk, tokens).table().values():
        for label, function, flops, moved in rows:
            try:
                ms = milliseconds(function, repeats=5 if tokens == TOKENS else 1)
            except Exception as error:
                print(f"FAIL {label} N={state_size} Q={chunk}: {str(error)[:200]}", flush=True)
                failures += 1
                continue
            if tokens == TOKENS:
                rate = f"{flops / ms / 1e9:6.0f} TFLOP/s {moved / ms / 1e6:6.0f} GB/s"
                print(f"{label:22s} N={state_size} Q={chunk} {ms:7.3f} ms {rate}", flush=True)
    return failures


def time_conv(backend, channels, tokens=TOKENS, config=None):
    if config is not None:
        conv_triton.FORWARD.update(config)
        conv_triton.BACKWARD.update(config)
    x = torch.randn(1, tokens, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = causal_conv1d(x, weight, bias, activation="silu", backend=backend)[0]
    dy = torch.randn_like(y)
    forward = milliseconds(lambda: causal_conv1d(x, weight, bias, activation="silu", backend=backend))
    backward = milliseconds(lambda: torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True))
    moved = 2 * x.numel() / 1e6
    print(
        f"conv {backend:10s} D={channels} forward {forward:.3f} ms ({2 * moved / forward:.0f} GB/s), "
        f"backward {backward:.3f} ms ({3 * moved / backward:.0f} GB/s) {config or ''}",
        flush=True,
    )

"""What models of transformers may be asked: found out by a trial, as each keeps its state in its own way.

Some read padding as if it were text (RWKV, RecurrentGemma), some lose their place between pieces or cannot
hand out the state after a context (MiniMax, LFM2), and none of them says so: the answers are merely wrong.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.loading import out_of_memory

from .items import LOGLIKELIHOOD, LOSSES, Item, as_tokens

if TYPE_CHECKING:
    from .model import EvalModel

LENGTH = 272  # beyond one chunk of the usual 256 tokens
PIECE = 96  # the shorter prompt is padded by more than that
STEPS = 4  # new tokens
OPTIONS = (5, 2)  # tokens of two continuations of one context
HALF = (torch.bfloat16, torch.float16)
# root mean square over positions of how far logits are off, in units of their spread over the vocabulary; in
# fp32 rounding came to 1e-6 and the smallest mistake seen to 1e-3
FULL_TOLERANCE = 3e-4
HALF_TOLERANCE = 0.1  # large models differ by a tenth of that from rounding, more where experts are chosen


class Ways(NamedTuple):
    """How a model is asked.

    Attributes:
        pads: prompts of several lengths at once, padded on the left; else one prompt at a time.
        carries: prompts in pieces and new tokens one by one, through the model's cache; else whole prompts.
        shares: the options of a question after one reading of its context; else each with its context.
        generates: where nothing is carried, new tokens by the model's own `generate`; else by reading the
            whole text anew for each.
    """

    pads: bool = True
    carries: bool = True
    shares: bool = True
    generates: bool = True


# the best first; the last one is the plain pass that the others are compared with
CHOICES = (
    Ways(),
    Ways(shares=False),
    Ways(pads=False),
    Ways(pads=False, shares=False),
    Ways(carries=False, shares=False),
    Ways(carries=False, shares=False, generates=False),
    Ways(pads=False, carries=False, shares=False),
    Ways(pads=False, carries=False, shares=False, generates=False),
)
RESTRICTIONS = {
    "pads": "one prompt at a time",
    "carries": "whole prompts, not pieces",
    "shares": "each option with its context",
    "generates": "the whole text anew for every new token",
}


def try_out(model: "EvalModel", cached: bool) -> Ways:
    """The best way to ask a model in which it answers random prompts as in one plain pass over each.

    What that rules out is said on stderr. A model that does not even answer plainly is asked plainly, and
    its tasks fail with the reason.

    Args:
        cached: has it a cache that can be read into in pieces, as far as its signature tells?
    """
    choices = [ways for ways in CHOICES if cached or not ways.carries]
    kept = model.piece, model.ways
    model.piece = PIECE
    crashes: list[str] = []
    try:
        found = _first_right(model, choices, crashes)
        reason = "asked otherwise, it answers differently from one plain pass over one prompt"
        reason += "".join(f", or ends in {crash}" for crash in crashes[:1])
    except Exception as error:  # of whatever kind: the code is another library's
        found, reason = choices[-1], f"a trial failed ({' '.join(str(error).split())[:200]})"
    finally:
        model.piece, model.ways = kept
    lost = [RESTRICTIONS[name] for name, was, now in zip(Ways._fields, choices[0], found) if was and not now]
    if lost:
        name = type(model.model).__name__
        print(f"{name} is given {', '.join(lost)} (slower): {reason}", file=sys.stderr)
    return found


def _first_right(model: "EvalModel", choices: Sequence[Ways], crashes: list[str]) -> Ways:
    """In full precision, where rounding hides no mistake; as it is where that cannot be had."""
    try:
        with _full_precision(model.model, model.device):
            return _search(model, choices, FULL_TOLERANCE, crashes)
    except Exception:
        if model.model.dtype not in HALF:
            raise
    crashes.clear()
    return _search(model, choices, HALF_TOLERANCE, crashes)


@torch.inference_mode()
def _search(model: "EvalModel", choices: Sequence[Ways], tolerance: float, crashes: list[str]) -> Ways:
    trial = Trial(model, crashes)
    for model.ways in choices[:-1]:
        if trial.passed(tolerance):
            return model.ways
    return choices[-1]


@contextlib.contextmanager
def _full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Half-precision weights are fp32 ones for a while, and come back bit for bit.

    Raises:
        MemoryError: there is no room for them.
    """
    halves = [(t, t.dtype) for t in chain(model.parameters(), model.buffers()) if t.dtype in HALF]
    if 2 * sum(tensor.nbytes for tensor, _ in halves) > _free_memory(device):
        raise MemoryError
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        with torch.backends.cudnn.flags(allow_tf32=False):  # convolutions would be as rough as half precision
            yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
        if halves and device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # what the evaluation reports is its own


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class Trial:
    """Two random prompts, and how a model's logits for them differ from those of plain passes.

    Args:
        crashes: gets what ways of asking ended in.

    Raises:
        ValueError: the plain logits are no numbers.
    """

    def __init__(self, model: "EvalModel", crashes: list[str]) -> None:
        self.model = model
        self.crashes = crashes
        # none of the tokens that mark the place of an image or the like
        known = np.setdiff1d(np.arange(len(model.tokenizer)), list(model.tokenizer.added_tokens_decoder))
        longest = min(LENGTH, (model.longest() or LENGTH + STEPS) - STEPS)
        generator = np.random.default_rng(0)
        self.prompts = [as_tokens(generator.choice(known, n)) for n in (longest, longest * 3 // 8)]
        self._plain: dict[bytes, Tensor] = {}
        if not all(bool(self.plain(prompt).isfinite().all()) for prompt in self.prompts):
            raise ValueError("its logits are not numbers")

    def plain(self, tokens: np.ndarray) -> Tensor:
        """Logits [T, V] of one pass over one prompt, of the words that the tokenizer has."""
        key = tokens.tobytes()
        if key not in self._plain:
            ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)
            self._plain[key] = self.model.model(input_ids=ids[None]).logits[0, :, : len(self.model.tokenizer)]
        return self._plain[key]

    def passed(self, tolerance: float) -> bool:
        """Are the logits behind all four questions right, as the model's `ways` are now?"""
        alone = [[prompt] for prompt in self.prompts]
        batches = [self.prompts, alone[0]] if self.model.ways.pads else alone  # one without any mask too
        return all(
            self._difference(check(batch)) < tolerance
            for batch in batches
            for check in (self.reading, self.choosing, self.continuing)
        )

    def _difference(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Root mean square over all pairs of logits [n, V]; not a number where some are none."""
        squares = []
        try:
            for found, expected in pairs:
                found, expected = found[:, : expected.shape[1]].float(), expected.float()
                found = torch.where(found == -torch.inf, expected, found)  # `generate` rules out an early end
                spread = expected.std(-1, keepdim=True)
                squares.append(((found - expected) / spread).square().mean(-1))
        except Exception as error:  # what crashes is no way to ask, whatever the reason
            if out_of_memory(error):
                raise MemoryError("too little memory") from None  # which says nothing of the model
            self.crashes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
            return float("nan")
        return float(torch.cat(squares).mean().sqrt())

    def reading(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """All logits, as predictions and losses need them."""
        items = [_item(LOSSES, tokens) for tokens in prompts]
        for start, logits, ids in self.model._stream(items):
            for row, tokens in enumerate(prompts):
                padding = ids.shape[1] - len(tokens)
                first, end = max(start, padding), start + logits.shape[1]
                if first < end:
                    yield logits[row, first - start :], self.plain(tokens)[first - padding : end - padding]

    def choosing(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of options: the ends of the prompts, and shorter ones after the same contexts."""
        items = [
            _item(LOGLIKELIHOOD, tokens[: len(tokens) - OPTIONS[0] + option], option)
            for option in OPTIONS
            for tokens in prompts
        ]
        for batch in [items] if self.model.ways.pads else [[item] for item in items]:
            logits, targets = (torch.cat(part, 1) for part in zip(*self.model._option_logits(batch)))
            for row, item in enumerate(batch):
                expected = self.plain(item.tokens)[-1 - item.continuation : -1]
                yield logits[row, targets[row] >= 0], expected

    def continuing(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits from which new tokens are chosen."""
        ways = self.model.ways
        if not ways.carries and ways.generates:
            output = self.model._generate_whole(prompts, STEPS, min_new_tokens=STEPS, output_scores=True)
            logits, new = torch.stack(output.scores, 1), output.sequences[:, -STEPS:]
        else:
            steps = self.model._steps(prompts) if ways.carries else self.model._steps_anew(prompts)
            logits, new = (
                torch.cat(part, 1) for part in zip(*(step for step, _ in zip(steps, range(STEPS))))
            )
        for row, tokens in enumerate(prompts):
            whole = as_tokens([*tokens.tolist(), *new[row, :-1].tolist()])
            yield logits[row], self.plain(whole)[-STEPS:]


def _item(kind: str, tokens: np.ndarray, continuation: int = 0) -> Item:
    return Item("trial", kind, kind, tokens, continuation=continuation)

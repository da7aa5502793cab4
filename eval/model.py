"""A model behind four questions: generate, log likelihood, next tokens at positions, losses.

Prompts are read in pieces with the carried state, so that memory does not grow with their length (linear
RNNs), and in left-padded batches. Models of transformers answer the same questions through their own caches,
as far as a trial finds them right (`foreign.py`).
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoding import GraphedDecoder
from models.language_model import LanguageModel
from models.loading import out_of_memory
from models.report import state_report

from .foreign import Ways, try_out
from .items import GENERATE, LOGLIKELIHOOD, LOSSES, PREDICT, Item
from .scoring import cut_at, position_buckets

LOGIT_ELEMENTS = 2**27  # logits held at once where those of many positions are needed: 0.5 GB in fp32
LOOK_EVERY = 8  # decoding steps between looks at whether all rows are done: each look waits for the GPU
SMALLEST_PIECE = 256
PIECE = 8192
RECURRENT_PIECE = 32768  # on a GPU: with fewer tokens a layer of Mamba2 takes less time than its launches
ROWS = 32
OPTION_ROWS = 256
STATE_ELEMENTS = 2**32  # of a batch's recurrent states on a GPU: 16 GB in fp32
CPU_STATE_ELEMENTS = 2**28  # few rows fill a CPU, and memory that it lacks is no error but the end
OPTION_LOGITS = 2**28  # 1 GB: options are short, and reading them in pieces keeps a GPU waiting
UNSCORED = -100  # a target that does not count
NOT_NUMBERS = (
    "{item.task} {item.key}: the model's logits are not numbers (NaN); weights that diverged or are damaged, "
    "or a dtype too narrow for them"
)


class EvalModel:
    """A causal language model with its tokenizer.

    Args:
        piece: tokens of a prompt read at once; None: 32768 for this repository's models on a GPU, else 8192.
        batch_tokens: how many tokens a batch may hold, padding included.
        allow_long: accept prompts beyond what the tokenizer's folder names as its greatest length.

    Raises:
        ValueError: the tokenizer has tokens that the model does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        piece: int | None = None,
        batch_tokens: int = 4096,
        allow_long: bool = False,
    ) -> None:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the model knows {rows}: another model's?"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.allow_long = allow_long
        self.device = next(model.parameters()).device
        self.recurrent = isinstance(model, LanguageModel)
        self.piece = piece or (RECURRENT_PIECE if self.recurrent and self.device.type == "cuda" else PIECE)
        state = state_report(model).total_elements if self.recurrent else 1
        held = STATE_ELEMENTS if self.device.type == "cuda" else CPU_STATE_ELEMENTS
        self.option_rows = min(max(held // max(state, 1), ROWS), OPTION_ROWS)
        self.decoder = GraphedDecoder(model) if self.recurrent else None
        takes = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in takes
        self.keeps_logits = "logits_to_keep" in takes
        end = getattr(model.generation_config, "eos_token_id", None)
        end = tokenizer.eos_token_id if end is None else end
        self.end_ids = [] if end is None else [end] if isinstance(end, int) else list(end)
        self.ways = Ways()
        if not self.recurrent:
            # some models of transformers fill a cache that only their own `generate` can go on from
            cached = "past_key_values" in takes and not getattr(model, "_is_stateful", False)
            self.ways = try_out(self, cached)

    def rows(self, kind: str) -> int:
        """How many items a batch may have; options are short, and few of them would leave a GPU idle."""
        if not self.ways.pads:
            return 1
        return self.option_rows if kind == LOGLIKELIHOOD else ROWS

    def longest(self) -> int | None:
        """Tokens that the model or its tokenizer allows, None without a limit."""
        window = None if self.recurrent else getattr(self.model.config, "max_position_embeddings", None)
        return longest_prompt(window, self.tokenizer, self.allow_long)

    def check(self, item: Item) -> None:
        """Raises ValueError when the item is longer than the model or tokenizer allows."""
        item.check()
        longest = self.longest()
        if longest is not None and item.size > longest:
            hint = " (allow_long=true if the model can read more)" if self.recurrent else ""
            raise ValueError(
                f"{item.task} {item.key} needs {item.size} tokens, the tokenizer or model allows {longest}; "
                f"prompts are never cut: choose shorter lengths{hint}"
            )

    def answer(self, items: Sequence[Item]) -> list[Any]:
        """The answers to items of one kind; a batch that does not fit the memory is halved, then the piece.

        Raises:
            MemoryError: not even one item fits.
        """
        ask = {
            GENERATE: self._generate,
            LOGLIKELIHOOD: self._loglikelihood,
            PREDICT: self._predict,
            LOSSES: self._losses,
        }[items[0].kind]
        if len(items) > self.rows(items[0].kind) == 1:
            return [answer for item in items for answer in self.answer([item])]
        try:
            with torch.inference_mode():
                return ask(items)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # leave the block first: the exception holds on to the tensors that did not fit
        if self.decoder is not None:
            self.decoder.close()
        torch.cuda.empty_cache()
        if len(items) > 1:
            middle = len(items) // 2
            if items[0].kind == LOGLIKELIHOOD:
                # the next ones fit at once; but a few long ones say nothing of many short ones
                self.option_rows = min(self.option_rows, max(middle, ROWS))
            return self.answer(items[:middle]) + self.answer(items[middle:])
        if not self.ways.carries or self.piece <= SMALLEST_PIECE:
            raise MemoryError(
                f"{items[0].task}: {items[0].size} tokens do not fit the memory of {self.device}"
            )
        self.piece //= 2
        return self.answer(items)

    # ------------------------------------------------------------------------------------------------
    # reading

    def _pad(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, int]:
        """Left-padded tokens [B, T], their mask, and where padding ends."""
        length = max(map(len, prompts))
        ids = np.zeros((len(prompts), length), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, length - len(tokens) :] = tokens
            mask[row, length - len(tokens) :] = 1
        padded = length - min(map(len, prompts))
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), padded

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: Any, keep: int) -> tuple[Tensor, Any]:
        """Logits [B, keep, V] of the last positions of `ids` [B, n] (0: all), and the state after them.

        `mask` [B, seen + n] covers everything read so far; None when nothing is padding.
        """
        n = ids.shape[1]
        extra: dict[str, Any] = {"logits_to_keep": keep} if self.keeps_logits else {}
        if self.ways.carries:
            extra.update(past_key_values=cache, use_cache=True)
        if mask is not None:
            if self.positions and not self.recurrent:
                extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -n:]
            extra["attention_mask"] = mask[:, -n:] if self.recurrent else mask
        output = self.model(input_ids=ids, **extra)
        logits = output.logits[:, -keep:] if keep else output.logits
        return logits, output.past_key_values if self.ways.carries else None

    def _mask(self, mask: Tensor, padded: int, start: int, end: int) -> Tensor | None:
        """What `_forward` wants of the mask for the tokens [start, end); padding ends at `padded`."""
        if self.recurrent and start >= padded:
            return None  # nothing but tokens: the faster path
        return mask[:, :end] if padded else None

    def _read(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Any, Tensor, int]:
        """Logits [B, 1, V] after the prompts, the state, the mask, and where padding ends."""
        ids, mask, padded = self._pad(prompts)
        length = ids.shape[1]
        cache = None
        for start in range(0, length, self.piece):
            end = min(start + self.piece, length)
            logits, cache = self._forward(ids[:, start:end], self._mask(mask, padded, start, end), cache, 1)
        return logits, cache, mask, padded

    def _stream(self, items: Sequence[Item]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """All logits, piece by piece: (start, logits [B, n, V], tokens [B, T])."""
        ids, mask, padded = self._pad([item.tokens for item in items])
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        piece = max(min(self.piece, LOGIT_ELEMENTS // (len(items) * vocabulary)), 16)
        cache, step = None, piece if self.ways.carries else ids.shape[1]
        for start in range(0, ids.shape[1], step):
            end = min(start + step, ids.shape[1])
            logits, cache = self._forward(ids[:, start:end], self._mask(mask, padded, start, end), cache, 0)
            yield start, logits, ids
        _check_numbers(items, logits)

    # ------------------------------------------------------------------------------------------------
    # the four questions

    def _generate(self, items: Sequence[Item]) -> list[str]:
        prompts = [item.tokens for item in items]
        new_tokens = max(item.max_new_tokens for item in items)
        if not self.ways.carries and self.ways.generates:
            output = self._generate_whole(prompts, new_tokens, output_logits=True)
            _check_numbers(items, output.logits[0][:, None])
            new = output.sequences[:, max(map(len, prompts)) :]
            return [self._text(item, row)[0] for item, row in zip(items, new.tolist())]
        produced: list[Tensor] = []
        for logits, token in self._steps(prompts) if self.ways.carries else self._steps_anew(prompts):
            if not produced:
                _check_numbers(items, logits)
            produced.append(token)
            look = len(produced) % LOOK_EVERY == 0
            if len(produced) == new_tokens or (look and self._all_done(items, torch.cat(produced, 1))):
                break
        rows = torch.cat(produced, 1).tolist()
        return [self._text(item, row)[0] for item, row in zip(items, rows)]

    def _steps(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [B, 1, V] and the likeliest token [B, 1] after the prompts, after that token, and on."""
        logits, cache, mask, padded = self._read(prompts)
        token = logits[:, -1].argmax(-1, keepdim=True)
        yield logits, token
        if self.decoder is not None:
            cache = self.decoder.start(cache)
        while True:
            if padded and not self.recurrent:
                mask = F.pad(mask, (0, 1), value=1)
            step_mask = mask if padded and not self.recurrent else None
            logits, cache = self._forward(token, step_mask, cache, 1)
            token = logits[:, -1].argmax(-1, keepdim=True)
            yield logits, token

    def _steps_anew(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `_steps`, for models whose state cannot be relied on: all is read anew for every token."""
        ids, mask, padded = self._pad(prompts)
        while True:
            logits, _ = self._forward(ids, mask if padded else None, None, 1)
            token = logits[:, -1].argmax(-1, keepdim=True)
            yield logits, token
            ids, mask = torch.cat([ids, token], 1), F.pad(mask, (0, 1), value=1)

    def _generate_whole(self, prompts: Sequence[np.ndarray], new_tokens: int, **how: Any) -> Any:
        """What the model's own `generate` answers: `sequences` [B, T + n], and what `how` asks for."""
        ids, mask, _ = self._pad(prompts)
        return self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.end_ids[0] if self.end_ids else 0,
            return_dict_in_generate=True,
            **how,
        )

    def _all_done(self, items: Sequence[Item], produced: Tensor) -> bool:
        return all(self._text(item, row)[1] for item, row in zip(items, produced.tolist()))

    def _text(self, item: Item, row: list[int]) -> tuple[str, bool]:
        """The continuation up to its end, and whether it has ended."""
        row = row[: item.max_new_tokens]
        ends = [row.index(end) for end in self.end_ids if end in row]
        text = self.tokenizer.decode(
            row[: min(ends)] if ends else row, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        cut = cut_at(text, item.stop)
        return cut, bool(ends) or len(row) == item.max_new_tokens or len(cut) < len(text)

    def _loglikelihood(self, items: Sequence[Item]) -> list[tuple[float, bool]]:
        scores = (_score(logits, targets) for logits, targets in self._option_logits(items))
        likelihoods, greedy = zip(*scores)
        sums = torch.stack(likelihoods).sum(0).tolist()  # the first look at anything: one wait for the GPU
        for item, total in zip(items, sums):
            if math.isnan(total):
                raise ValueError(NOT_NUMBERS.format(item=item))
        return list(zip(sums, torch.stack(greedy).all(0).tolist()))

    def _option_logits(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [B, n, V] and the tokens [B, n] that they are to foretell, UNSCORED where there is none."""
        return self._options_after(items) if self.ways.shares else self._options_whole(items)

    def _options_after(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        """Contexts are read once each, however many options continue them, and their states handed out."""
        contexts: dict[bytes, int] = {}
        owners, prompts = [], []
        for item in items:
            prompt = item.tokens[: -item.continuation]
            owner = contexts.setdefault(prompt.tobytes(), len(prompts))
            if owner == len(prompts):
                prompts.append(prompt)
            owners.append(owner)
        logits, cache, mask, _ = self._read(prompts)
        if owners != list(range(len(items))):
            rows = torch.as_tensor(owners, device=self.device)
            logits, mask = logits[rows], mask[rows]
            cache.batch_select_indices(rows)
        targets, given = self._options(items)
        yield logits, targets[:, :1]
        vocabulary = logits.shape[-1]
        piece = max(min(self.piece, OPTION_LOGITS // (len(items) * vocabulary)), 16)
        for start in range(0, targets.shape[1] - 1, piece):
            end = min(start + piece, targets.shape[1] - 1)
            seen = torch.cat([mask, given[:, :end]], 1)  # padding lies on both sides of what is read
            logits, cache = self._forward(targets[:, start:end].clamp(min=0), seen, cache, 0)
            yield logits, targets[:, start + 1 : end + 1]

    def _options(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Right-padded continuations [B, n], UNSCORED behind their end, and their mask."""
        targets = np.full((len(items), max(item.continuation for item in items)), UNSCORED, dtype=np.int64)
        for row, item in enumerate(items):
            targets[row, : item.continuation] = item.tokens[-item.continuation :]
        moved = torch.from_numpy(targets).to(self.device)
        return moved, (moved != UNSCORED).long()

    def _options_whole(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        ids, mask, padded = self._pad([item.tokens for item in items])
        longest = max(item.continuation for item in items)
        logits, _ = self._forward(ids, mask if padded else None, None, longest + 1)
        scored = torch.as_tensor([item.continuation for item in items], device=self.device)
        place = torch.arange(longest, 0, -1, device=self.device)  # counted from the end
        yield logits[:, :-1], ids[:, -longest:].masked_fill(place > scored[:, None], UNSCORED)

    def _predict(self, items: Sequence[Item]) -> list[list[int]]:
        answers: list[dict[int, int]] = [{} for _ in items]
        for start, logits, ids in self._stream(items):
            likeliest = logits.argmax(-1).tolist()  # [B, n]
            for row, item in enumerate(items):
                shift = ids.shape[1] - len(item.tokens) - start
                for position in item.positions:
                    if 0 <= position + shift < len(likeliest[row]):
                        answers[row][position] = likeliest[row][position + shift]
        return [[found[position] for position in item.positions] for item, found in zip(items, answers)]

    def _losses(self, items: Sequence[Item]) -> list[list[list[float]]]:
        """Sum and count of the losses in each of `position_buckets`, per item."""
        losses: list[list[Tensor]] = [[] for _ in items]
        for start, logits, ids in self._stream(items):
            targets = ids[:, start + 1 : start + 1 + logits.shape[1]]
            for row in range(len(items)):
                scores = logits[row, : targets.shape[1]].float()
                losses[row].append(F.cross_entropy(scores, targets[row], reduction="none"))
        return [_bucketed(torch.cat(parts), len(item.tokens)) for parts, item in zip(losses, items)]


def longest_prompt(window: int | None, tokenizer: Any, allow_long: bool) -> int | None:
    """The smaller of a model's window and what the tokenizer's folder names; None without either."""
    named = getattr(tokenizer, "model_max_length", None)
    if named is None or named >= 10**9 or allow_long:  # transformers writes 10**30 for "not known"
        named = None
    return min((limit for limit in (window, named) if limit), default=None)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Per row [B] of logits [B, n, V]: log likelihood of the targets [B, n], and are all the likeliest?"""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    alike = (logits.argmax(-1) == targets) | (targets == UNSCORED)
    return -losses.view_as(targets).sum(1), alike.all(1)


def _check_numbers(items: Sequence[Item], logits: Tensor) -> None:
    """Raises ValueError for NaN at the last position, where all earlier ones end up.

    argmax over NaN names the first token or option, which would look like an answer and even score.
    """
    if bool(logits[:, -1].isnan().any()):
        raise ValueError(NOT_NUMBERS.format(item=items[0]))


def _bucketed(losses: Tensor, length: int) -> list[list[float]]:
    own = losses[len(losses) - (length - 1) :].double().cpu()  # the loss of token t at t - 1
    return [
        [float(own[low - 1 : high - 1].sum()), float(high - low)] for low, high in position_buckets(length)
    ]

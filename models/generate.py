"""`python -m models.generate model=FOLDER prompt=...`: continue a text with any model folder."""

import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .cache import RecurrentCache
from .command_line import run_command
from .decoding import GraphedDecoder
from .draw import checked_seed
from .families import is_ours
from .folder import has_tokenizer
from .language_model import LanguageModel
from .loading import load_pretrained, out_of_memory, read_json, usable_device

PROBLEMS_SHOWN = 5  # of weights that do not fit


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a text with a model, printing words as they come.

    python -m models.generate model=FOLDER prompt="Once upon a time" [key=value ...]

    model=FOLDER       any layout that load_pretrained reads, or any causal model of transformers
    prompt=TEXT        the text to continue; or prompt_file=PATH; or neither, to read standard input
    max_new_tokens=N   at most this many tokens more (128); fewer when the model ends the text
    temperature=T      0: always the likeliest token (0)
    top_p=P            sample from the likeliest tokens that together have probability P (1)
    seed=N             of the sampling (0)
    device=NAME        cuda where there is one, else cpu
    dtype=NAME         bfloat16, float32, ...; as stored when left out
    tokenizer=FOLDER   instead of the one in the model's folder
    piece=N            tokens of the prompt read at once (4096): memory does not grow with the prompt
    """

    model: str
    prompt: str | None = None
    prompt_file: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    tokenizer: str | None = None
    piece: int = 4096


def check(arguments: GenerateArguments) -> None:
    """Raises ValueError for values out of range, before anything is loaded."""
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise ValueError("give prompt or prompt_file, not both")
    for name in ("max_new_tokens", "piece"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"temperature={arguments.temperature} must be 0 (greedy) or above")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"top_p={arguments.top_p} must be above 0 and at most 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={arguments.device}: torch sees no CUDA device here; use device=cpu")
    if usable_device(arguments.device).type == "meta":
        raise ValueError("device=meta holds shapes alone; use device=cpu")
    checked_seed(arguments.seed)
    if not (Path(arguments.model) / "config.json").is_file():
        raise ValueError(f"model={arguments.model} is no model folder: it has no config.json")


def read_prompt(arguments: GenerateArguments) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt_file={arguments.prompt_file} is no UTF-8 text: {error}") from None
    return sys.stdin.read()


def load_model(folder: str, dtype: str | None, device: str) -> nn.Module:
    """A model of this repository where one of its families reads the folder, else one of transformers.

    Raises:
        ValueError: an unknown dtype or architecture; weights that cannot be read or do not fit config.json.
        MemoryError: a model of transformers that does not fit.
    """
    torch_dtype = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no type of torch; use bfloat16, float16, float32 or float64")
    if is_ours(read_json(Path(folder) / "config.json")):
        return load_pretrained(folder, dtype=torch_dtype, device=device).eval()
    return _load_foreign(folder, torch_dtype or "auto").to(device).eval()


def _load_foreign(folder: str, dtype: torch.dtype | str) -> nn.Module:
    """A model of transformers, all of whose weights are in the folder.

    transformers fills in random weights where some are missing, and says so among its other messages alone.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are listed with the missing ones, below
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        if out_of_memory(error):
            raise MemoryError(f"{folder} does not fit the memory ({' '.join(str(error).split())})") from error
        if isinstance(error, pickle.UnpicklingError):  # its message advises to run what the file holds
            reason = "a file holds something else than weights"
        else:
            reason = " ".join(str(error).split()) or "a file is empty"
        raise ValueError(
            f"the weights of {folder} cannot be read ({reason}); cut short? Fetch or save them again"
        ) from error
    misshapen = [
        f"misshapen {name}: {list(stored)}, expected {list(expected)}"
        for name, stored, expected in sorted(found["mismatched_keys"])
    ]
    problems = [f"missing {name}" for name in sorted(found["missing_keys"])] + misshapen
    if problems:
        shown, more = problems[:PROBLEMS_SHOWN], len(problems) - PROBLEMS_SHOWN
        listed = "\n  ".join(shown + [f"and {more} more"] * (more > 0))
        raise ValueError(
            f"{folder}: the weights do not fit config.json, and random ones would take their place; fetch or "
            f"save both again:\n  {listed}"
        )
    return model


def load_tokenizer(folder: str) -> Any:
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer; give tokenizer=FOLDER")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error


@torch.no_grad()
def read_in_pieces(model: LanguageModel, tokens: Tensor, piece: int) -> RecurrentCache:
    """The state after all tokens [1, T] but the last, which `generate` reads itself."""
    state = GraphedDecoder(model).start()
    for part in tokens[:, :-1].split(piece, dim=1) if tokens.shape[1] > 1 else ():
        model(input_ids=part, past_key_values=state, use_cache=True, logits_to_keep=1)
    return state


def generate(arguments: GenerateArguments) -> None:
    check(arguments)
    prompt = read_prompt(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(arguments.device)
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    words = model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= words:
        raise ValueError(
            f"the tokenizer answers with token {int(tokens.max())}, but the model knows {words} tokens: give "
            "tokenizer=FOLDER with the one that it was trained with"
        )

    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "top_k": 0,
        }
    if isinstance(model, LanguageModel):
        sampling["past_key_values"] = read_in_pieces(model, tokens, arguments.piece)
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    torch.manual_seed(arguments.seed)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(GenerateArguments, generate, argv)


if __name__ == "__main__":
    raise SystemExit(main())

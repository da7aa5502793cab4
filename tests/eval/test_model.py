"""Batches and pieces change nothing: the oracle is the same model read at once, one prompt at a time."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.foreign import Ways
from eval.items import LOGLIKELIHOOD, LOSSES, PREDICT, Item, as_tokens
from eval.model import RECURRENT_PIECE, EvalModel
from models import load_pretrained, state_report

from .conftest import text_item

END = 256  # the end-of-text token of the byte tokenizer
TEXTS = (
    "short",
    "a somewhat longer prompt of letters",
    "the third prompt, which is the longest of all of them by far",
)


@pytest.fixture(params=["gla", "mamba2", "llama"])
def model(request: pytest.FixtureRequest, tiny_folders: dict[str, Path], llama: Any) -> Any:
    if request.param == "llama":
        return llama
    return load_pretrained(tiny_folders[request.param])


def whole_logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.as_tensor(tokens, dtype=torch.int64)[None]).logits[0].float()


def greedy(model: Any, tokens: np.ndarray, count: int) -> list[int]:
    """Step by step from the whole text each time, without any cache, up to the end of the text."""
    new: list[int] = []
    for _ in range(count):
        likeliest = int(whole_logits(model, np.append(tokens, new).astype(np.int64))[-1].argmax())
        if likeliest == END:
            break
        new.append(likeliest)
    return new


def test_batched_left_padded_answers_equal_single_ones(model: Any, tokenizer: Any) -> None:
    evaluated = EvalModel(model, tokenizer, piece=16)
    items = [text_item(tokenizer, text, max_new_tokens=10) for text in TEXTS]
    together = evaluated.answer(items)
    alone = [evaluated.answer([item])[0] for item in items]
    assert together == alone
    assert together == [tokenizer.decode(greedy(model, item.tokens, 10)) for item in items]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_answers_through_cuda_graphs_are_those_without(
    tiny_folders: dict[str, Path], tokenizer: Any, monkeypatch: Any, family: str
) -> None:
    model = load_pretrained(tiny_folders[family], device="cuda")
    assert EvalModel(model, tokenizer).piece == RECURRENT_PIECE
    items = [text_item(tokenizer, text, max_new_tokens=20) for text in TEXTS]

    def answers() -> list[list[str]]:
        evaluated = EvalModel(model, tokenizer, piece=16)
        return [evaluated.answer(batch) for batch in (items, items[:1], items[1:], items)]

    through_graphs = answers()
    monkeypatch.setenv("STATEX_CUDA_GRAPHS", "0")
    assert answers() == through_graphs


def test_likelihoods_equal_those_of_one_unpadded_pass(model: Any, tokenizer: Any) -> None:
    items = [
        text_item(tokenizer, text, kind=LOGLIKELIHOOD, continuation=n) for text, n in zip(TEXTS, (2, 7, 5))
    ]
    answers = EvalModel(model, tokenizer, piece=16).answer(items)
    for item, (found, _) in zip(items, answers):
        logs = F.log_softmax(whole_logits(model, item.tokens), -1)
        first = len(item.tokens) - item.continuation
        expected = sum(float(logs[t - 1, item.tokens[t]]) for t in range(first, len(item.tokens)))
        # fp32 sums in another order
        assert found == pytest.approx(expected, abs=2e-4)


def test_options_share_the_reading_of_their_context(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    options = (" a", " another, longer one", " the third option of all", " b")
    items = [
        text_item(tokenizer, context + option, kind=LOGLIKELIHOOD, continuation=len(option))
        for context in TEXTS
        for option in options
    ]
    evaluated = EvalModel(model, tokenizer, piece=16)
    monkeypatch.setattr("eval.model.OPTION_LOGITS", 1)  # pieces of 16 tokens
    read: list[int] = []
    forward = evaluated._forward

    def counted(ids: torch.Tensor, *rest: Any) -> Any:
        read.append(len(ids))
        return forward(ids, *rest)

    monkeypatch.setattr(evaluated, "_forward", counted)
    mixed = [items[i] for i in (5, 0, 11, 3, 1, 9, 2, 8, 4, 10, 7, 6)]
    found = dict(zip((item.key for item in mixed), evaluated.answer(mixed)))
    assert read == [3] * 4 + [12] * 2  # 60 tokens of context, 23 of options
    for item in items:
        logs = F.log_softmax(whole_logits(model, item.tokens), -1)
        first = len(item.tokens) - item.continuation
        expected = sum(float(logs[t - 1, item.tokens[t]]) for t in range(first, len(item.tokens)))
        assert found[item.key][0] == pytest.approx(expected, abs=2e-4)  # fp32 sums in another order


def test_predictions_and_losses_across_pieces(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("eval.model.LOGIT_ELEMENTS", 3 * 257 * 16)  # pieces of 16 tokens
    evaluated = EvalModel(model, tokenizer)
    logits = [whole_logits(model, text_item(tokenizer, text).tokens) for text in TEXTS]
    places = ((0, 3), (1, 20, 30), (0, 17, 50))
    probes = [text_item(tokenizer, t, kind=PREDICT, positions=p) for t, p in zip(TEXTS, places)]
    assert evaluated.answer(probes) == [
        [int(scores[p].argmax()) for p in item.positions] for item, scores in zip(probes, logits)
    ]
    windows = [text_item(tokenizer, text, kind=LOSSES) for text in TEXTS]
    for item, scores, buckets in zip(windows, logits, evaluated.answer(windows)):
        targets = torch.as_tensor(item.tokens[1:], dtype=torch.int64)
        assert sum(b[0] for b in buckets) == pytest.approx(
            float(F.cross_entropy(scores[:-1], targets, reduction="sum")), rel=1e-5
        )
        assert sum(b[1] for b in buckets) == len(targets)


def test_a_stop_text_and_a_limit_of_its_own_end_each_row(tiny_folders: Any, tokenizer: Any) -> None:
    model = EvalModel(load_pretrained(tiny_folders["gla"]), tokenizer)
    (text,) = model.answer([text_item(tokenizer, TEXTS[1], max_new_tokens=12)])
    stop = text[4:6]
    items = [
        text_item(tokenizer, TEXTS[1], max_new_tokens=12, stop=(stop,)),
        text_item(tokenizer, TEXTS[1], max_new_tokens=3),
        text_item(tokenizer, TEXTS[1], max_new_tokens=12),
    ]
    answers = model.answer(items)
    assert answers == [text[: text.index(stop)], answers[1], text]
    assert text.startswith(answers[1][:1])
    assert len(answers[1]) < len(text)


def test_models_without_a_cache_of_their_own_are_read_whole(tokenizer: Any) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "num_hidden_layers": 1}
    ids = {"pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 256}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=257, n_groups=1, chunk_size=16, **sizes, **ids))
    evaluated = EvalModel(model, tokenizer)
    assert not evaluated.ways.carries
    item = text_item(tokenizer, TEXTS[1], max_new_tokens=5)
    assert evaluated.answer([item]) == [tokenizer.decode(greedy(model.eval(), item.tokens, 5))]


SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
# models of transformers that get padding, pieces or shared contexts wrong, and how they may be asked
FOREIGN: dict[str, tuple[dict[str, Any], Ways]] = {
    "Rwkv": (
        {"num_hidden_layers": 2, "attention_hidden_size": 32},
        Ways(pads=False, carries=False, shares=False),
    ),
    "RecurrentGemma": (
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64, "num_key_value_heads": 1},
        Ways(pads=False, carries=False, shares=False),
    ),
    "Lfm2": (
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        Ways(shares=False),
    ),
    "MiniMax": (
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
        Ways(carries=False, shares=False, generates=False),
    ),
}


def foreign(name: str) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **FOREIGN[name][0]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # as sharp as a trained model: what comes before a token decides
    return model.eval()


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_transformers_that_are_wrong_in_batches_or_pieces_answer_as_in_one_plain_pass(
    name: str, tokenizer: Any, capsys: Any
) -> None:
    model = foreign(name)
    evaluated = EvalModel(model, tokenizer, piece=16)
    assert "one plain pass" in capsys.readouterr().err
    assert (evaluated.rows("generate") == 1) != evaluated.ways.pads
    logits = {text: whole_logits(model, text_item(tokenizer, text).tokens) for text in TEXTS}

    prompts = [text_item(tokenizer, text, max_new_tokens=6) for text in TEXTS]
    assert evaluated.answer(prompts) == [
        tokenizer.decode(greedy(model, item.tokens, 6), clean_up_tokenization_spaces=False)
        for item in prompts
    ]
    probes = [text_item(tokenizer, text, kind=PREDICT, positions=(1, len(text) - 1)) for text in TEXTS]
    assert evaluated.answer(probes) == [
        [int(logits[text][p].argmax()) for p in (1, len(text) - 1)] for text in TEXTS
    ]
    losses = evaluated.answer([text_item(tokenizer, text, kind=LOSSES) for text in TEXTS])
    for text, buckets in zip(TEXTS, losses):
        targets = torch.as_tensor(text_item(tokenizer, text).tokens[1:], dtype=torch.int64)
        expected = float(F.cross_entropy(logits[text][:-1], targets, reduction="sum"))
        assert sum(total for total, _ in buckets) == pytest.approx(expected, rel=1e-5)
    options = [
        text_item(tokenizer, context + option, kind=LOGLIKELIHOOD, continuation=len(option))
        for context in TEXTS
        for option in (" a", " another")
    ]
    for item, (found, _) in zip(options, evaluated.answer(options)):
        logs = F.log_softmax(whole_logits(model, item.tokens), -1)
        first = len(item.tokens) - item.continuation
        expected = sum(float(logs[t - 1, item.tokens[t]]) for t in range(first, len(item.tokens)))
        # fp32 sums in another order
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_trial_finds_the_best_way_and_leaves_the_weights_as_they_were(
    name: str, dtype: torch.dtype, tokenizer: Any
) -> None:
    model = foreign(name).to(dtype)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # RWKV rescales its weights at its first use
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert EvalModel(model, tokenizer).ways == FOREIGN[name][1]
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_llama_of_any_precision_stays_batched_and_in_pieces(
    llama: Any,
    tokenizer: Any,
    monkeypatch: Any,
    capsys: Any,
    dtype: torch.dtype,
    room: int | None,
    device: str,
) -> None:
    if room is not None:
        monkeypatch.setattr("eval.foreign._free_memory", lambda device: room)  # none for weights in fp32
    evaluated = EvalModel(copy.deepcopy(llama).to(device, dtype), tokenizer)
    assert evaluated.ways == Ways()
    assert all(parameter.dtype == dtype for parameter in evaluated.model.parameters())
    assert evaluated.rows("generate") > 1
    assert capsys.readouterr().err == ""


def test_padding_read_as_text_is_found_in_half_precision_too(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("eval.foreign._free_memory", lambda device: 0)
    model = foreign("Rwkv")
    with torch.no_grad():
        model.head.weight.mul_(2)
        for block in model.rwkv.blocks:  # it forgets nothing: trained ones remember for long as well
            block.attention.time_decay.fill_(-8.0)
    assert not EvalModel(model.bfloat16(), tokenizer).ways.pads


def test_no_answer_is_made_of_what_is_no_number(tokenizer: Any) -> None:
    model = foreign("Rwkv")
    evaluated = EvalModel(model, tokenizer)
    assert evaluated.ways.generates
    assert not evaluated.ways.carries
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)  # as an overflow that only some prompts cause
    with pytest.raises(ValueError, match="not numbers"):
        evaluated.answer([text_item(tokenizer, TEXTS[0], max_new_tokens=2)])


def test_a_trial_says_what_a_way_of_asking_ends_in(
    llama: Any, tokenizer: Any, monkeypatch: Any, capsys: Any
) -> None:
    def broken(self: Any, rows: Any) -> None:
        raise TypeError("no rows here")

    monkeypatch.setattr("transformers.cache_utils.DynamicCache.batch_select_indices", broken)
    assert EvalModel(copy.deepcopy(llama), tokenizer).ways == Ways(shares=False)
    assert "or ends in TypeError: no rows here" in capsys.readouterr().err


def test_too_little_memory_for_a_trial_is_no_mistake_of_the_model(
    llama: Any, tokenizer: Any, monkeypatch: Any, capsys: Any
) -> None:
    def full(*_: Any) -> Any:
        yield from ()
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("eval.foreign.Trial.reading", full)
    EvalModel(copy.deepcopy(llama), tokenizer)
    assert "a trial failed (too little memory)" in capsys.readouterr().err


def test_a_model_that_fails_its_trial_is_asked_plainly(llama: Any, tokenizer: Any, capsys: Any) -> None:
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    evaluated = EvalModel(broken, tokenizer)
    assert not any(evaluated.ways)
    assert "a trial failed (its logits are not numbers)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not numbers"):
        evaluated.answer([text_item(tokenizer, TEXTS[0], max_new_tokens=2)])


@pytest.mark.parametrize("piece", [256, None])
def test_a_long_prompt_is_never_in_memory_at_once(
    tiny_folders: Any, tokenizer: Any, monkeypatch: Any, piece: int | None
) -> None:
    monkeypatch.setattr("eval.model.PIECE", 512)  # where none is asked for
    model = load_pretrained(tiny_folders["mamba2"])
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    long = Item("t", "k", "generate", as_tokens([65 + i % 7 for i in range(3001)]), max_new_tokens=2)
    EvalModel(model, tokenizer, piece=piece).answer([long])
    assert sum(seen) == 3001 + 1  # and the first new token, which makes the second
    assert max(seen) == (piece or 512)


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["cuda", "cpu"],
)
def test_a_batch_beyond_the_memory_is_halved_then_read_in_smaller_pieces(
    tiny_folders: Any, tokenizer: Any, monkeypatch: Any, full: RuntimeError
) -> None:
    model = EvalModel(load_pretrained(tiny_folders["gla"]), tokenizer, piece=1024)
    items = [text_item(tokenizer, text, max_new_tokens=4) for text in TEXTS]
    expected = model.answer(items)
    real, tried = model._generate, []

    def small_memory(batch: list[Item]) -> list[str]:
        tried.append((len(batch), model.piece))
        if len(batch) > 1 or model.piece > 512:
            raise full
        return real(batch)

    monkeypatch.setattr(model, "_generate", small_memory)
    assert model.answer(items) == expected
    assert (3, 1024) in tried
    assert (1, 512) in tried
    model.piece = 256
    monkeypatch.setattr(model, "_generate", lambda batch: (_ for _ in ()).throw(full))
    with pytest.raises(MemoryError, match="do not fit the memory"):
        model.answer(items)


def test_an_error_that_is_not_of_the_memory_is_passed_on(
    llama: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    model = EvalModel(llama, tokenizer)
    monkeypatch.setattr(
        model, "_generate", lambda batch: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    )
    with pytest.raises(RuntimeError, match="shapes differ"):
        model.answer([text_item(tokenizer, text, max_new_tokens=2) for text in TEXTS])


def test_batches_of_options_that_did_not_fit_stay_small(llama: Any, tokenizer: Any, monkeypatch: Any) -> None:
    model = EvalModel(llama, tokenizer)
    items = [text_item(tokenizer, f"option {i}", kind=LOGLIKELIHOOD, continuation=2) for i in range(8)]
    expected, real = model.answer(items), model._loglikelihood

    def small_memory(batch: list[Item]) -> list[Any]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("full")
        return real(batch)

    monkeypatch.setattr(model, "_loglikelihood", small_memory)
    for fewest, rows in ((32, 32), (2, 2)):
        monkeypatch.setattr("eval.model.ROWS", fewest)
        assert [found for found, _ in model.answer(items)] == pytest.approx([found for found, _ in expected])
        assert model.rows(LOGLIKELIHOOD) == rows


def test_a_batch_of_options_holds_few_states_where_memory_runs_out_without_a_word(
    tiny_folders: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    model = load_pretrained(tiny_folders["gla"])
    state = state_report(model).total_elements
    monkeypatch.setattr("eval.model.CPU_STATE_ELEMENTS", 50 * state)
    assert EvalModel(model, tokenizer).rows(LOGLIKELIHOOD) == 50
    monkeypatch.setattr("eval.model.CPU_STATE_ELEMENTS", 5 * state)
    assert EvalModel(model, tokenizer).rows(LOGLIKELIHOOD) == 32  # as many as of any other kind


def test_a_prompt_longer_than_allowed_is_an_error(llama: Any, tiny_folders: Any, tokenizer: Any) -> None:
    long = Item("t", "k", "generate", as_tokens([1] * 1020), max_new_tokens=5)
    with pytest.raises(ValueError, match=r"needs 1025 tokens.*allows 1024.*never cut"):
        EvalModel(llama, tokenizer).check(long)
    model = load_pretrained(tiny_folders["gla"])
    EvalModel(model, tokenizer).check(long)  # a linear RNN has no window
    tokenizer.model_max_length, kept = 512, tokenizer.model_max_length
    try:
        with pytest.raises(ValueError, match="allow_long=true"):
            EvalModel(model, tokenizer).check(long)
        EvalModel(model, tokenizer, allow_long=True).check(long)
    finally:
        tokenizer.model_max_length = kept
    with pytest.raises(ValueError, match="exceed its 100"):
        Item("t", "k", "generate", as_tokens([1] * 99), max_new_tokens=2, budget=100).check()

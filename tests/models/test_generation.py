"""The carried state: decoding, reading in pieces, padding, packed documents, generate, training with it."""

import copy

import pytest
import torch

from models.cache import RecurrentCache
from models.expansion import expand_state
from tests.models.tiny_models import tiny, tokens

FAMILIES = ("gla", "mamba2")
LENGTH = 40
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def model(family):
    """A model with one layer as published, one extended, one with mapped keys."""
    model = tiny(family)
    expand_state(model, layers=[1], drop_mode="extend", expand_factor=2)
    expand_state(model, layers=[2], drop_mode="lora_4")
    return model.eval()


@pytest.fixture
def ids():
    return tokens(2, LENGTH)


def read(model, ids, cuts, mask=None):
    """Logits of ids read in pieces, and the cache that went through them."""
    cache, logits = RecurrentCache(), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        piece_mask = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=piece_mask, past_key_values=cache)
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
def test_step_by_step_decoding_equals_the_full_forward(model, ids):
    close(read(model, ids, range(1, LENGTH))[0], model(ids).logits)


@torch.no_grad()
def test_a_prompt_may_be_read_in_pieces(model, ids):
    close(read(model, ids, (7, 8, 33))[0], model(ids).logits)


@torch.no_grad()
def test_the_cache_does_not_grow_with_length_and_holds_what_the_mixers_say(model, ids):
    short, long = read(model, ids[:, :3], ())[1], read(model, ids, (20,))[1]
    mixers = [block.token_mixer for block in model.blocks]
    elements = sum(mixer.state_elements() + mixer.conv_elements() for mixer in mixers)
    assert short.num_bytes() == long.num_bytes() == 2 * 4 * elements  # two rows in fp32
    assert (short.get_seq_length(), long.get_seq_length()) == (3, LENGTH)


@torch.no_grad()
def test_padding_on_either_side_changes_no_answer(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, -5:] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    close(logits[0, 13:], model(ids[:1, 13:]).logits[0])
    close(logits[1, :-5], model(ids[1:, :-5]).logits[0])


@torch.no_grad()
def test_a_padded_batch_may_be_read_in_pieces_even_if_a_row_has_no_token_yet(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    logits, _ = read(model, ids, (7, 8, 33), mask)
    close(logits[0, 13:], model(ids[:1, 13:]).logits[0])
    close(logits[1], model(ids[1:]).logits[0])


@torch.no_grad()
def test_a_piece_may_be_padding_alone(model, ids):
    mask = torch.ones_like(ids)
    mask[:, :13] = 0
    logits, cache = read(model, ids, (7, 20), mask)  # the first 7 are nobody's token
    close(logits[:, 13:], model(ids[:, 13:]).logits)
    close(logits[:, :7], torch.zeros(2, 7, logits.shape[-1]))
    before = [dict(layer) for layer in cache.layers]
    padding = torch.cat([mask, torch.zeros_like(ids[:, :3])], dim=1)
    output = model(ids[:, :3], attention_mask=padding, past_key_values=cache, output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [(2, 3, model.config.hidden_size)] * 5
    assert cache.layers == before
    assert cache.get_seq_length() == LENGTH + 3


@torch.no_grad()
def test_state_and_convolution_begin_anew_at_documents(model, ids):
    offsets = torch.tensor(
        [0, 10, 40, 55, 80], dtype=torch.int32
    )  # rows of 40: documents of 10, 30 and 15, 25
    logits = model(ids, cu_seqlens=offsets).logits
    for row, start, end in ((0, 0, 10), (0, 10, 40), (1, 0, 15), (1, 15, 40)):
        close(logits[row, start:end], model(ids[row : row + 1, start:end]).logits[0])


@torch.no_grad()
def test_documents_at_the_ends_of_a_row_go_on_from_the_carried_state_and_leave_it(model, ids):
    cache = RecurrentCache()
    model(ids[:, :20], past_key_values=cache)
    offsets = torch.tensor([0, 5, 20, 40], dtype=torch.int32)  # row 0: 5 go on, 15 are new; row 1: all go on
    logits = model(ids[:, 20:], past_key_values=cache, cu_seqlens=offsets).logits
    close(logits[0, :5], model(ids[:1, :25]).logits[0, 20:])
    close(logits[1], model(ids[1:]).logits[0, 20:])
    after = model(ids[:, :1], past_key_values=cache).logits
    close(after[0], model(torch.cat([ids[:1, 25:], ids[:1, :1]], dim=1)).logits[0, -1:])


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prefill_chunk_size": 9}])
def test_greedy_generation_equals_the_argmax_of_full_forwards(model, ids, how):
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, **how)
    assert torch.equal(generated, greedy(model, ids, 6))


@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(model, ids):
    prompts = [ids[:1, :11], ids[1:, :20]]
    batch = torch.zeros(2, 20, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(generated[row, 20:], greedy(model, prompt, 6)[0, -6:])


@torch.no_grad()
def test_a_batch_padded_further_than_a_piece_is_long_generates_the_same(model, ids):
    padding = torch.zeros(2, 12, dtype=torch.long)
    batch, mask = torch.cat([padding, ids], dim=1), torch.cat([padding, torch.ones_like(ids)], dim=1)
    generated = model.generate(
        batch, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=8
    )
    assert torch.equal(generated[:, 12:], greedy(model, ids, 6))


@torch.no_grad()
def test_generation_goes_on_from_a_given_cache(model, ids):
    cache = RecurrentCache()
    model(ids[:, :20], past_key_values=cache)
    generated = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, greedy(model, ids, 6))


@torch.no_grad()
def test_sampling_is_reproducible_and_returns_several_sequences(model, ids):
    def sample():
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=2)

    first = sample()
    assert first.shape == (4, LENGTH + 6)
    assert torch.equal(first, sample())
    assert not torch.equal(first[0], first[1])


@torch.no_grad()
def test_beam_search_reorders_the_state(model, ids):
    cached = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(
        cached, model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    )


@torch.no_grad()
def test_a_copied_cache_continues_on_its_own(model, ids):
    cache = RecurrentCache()
    model(ids[:, :20], past_key_values=cache)
    fork = cache.copy()
    model(ids[:, 30:], past_key_values=cache)
    close(model(ids[:, 20:], past_key_values=fork).logits, model(ids).logits[:, 20:])


def gradients(model, *pieces, labels=None):
    """Gradients of the summed loss over pieces read one after the other, the state carried with its graph."""
    model.zero_grad()
    cache, loss = RecurrentCache(), 0.0
    for piece in pieces:
        loss = (
            loss
            + model(
                piece, labels=piece, past_key_values=cache, use_cache=len(pieces) > 1, loss_reduction="sum"
            ).loss
        )
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_recomputation_changes_no_gradient(family, ids, pieces, autocast):
    model = tiny(family)
    chunks = ids.chunk(pieces, dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = gradients(model, *chunks)
        for level in model.recompute_levels:
            model.set_recompute(level)
            for name, gradient in gradients(model, *chunks).items():
                assert torch.equal(gradient, kept[name]), f"{level}: {name}"


def test_gradients_flow_back_through_a_carried_state(family, ids):
    model = tiny(family, dtype=torch.float64)
    whole, carried, cut = RecurrentCache(), RecurrentCache(), RecurrentCache()
    model(ids, past_key_values=whole).logits[:, 20:].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids[:, :20], past_key_values=carried)
    model(ids[:, 20:], past_key_values=carried).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], atol=1e-9 * expected[name].abs().max().item() + 1e-12)
    model(ids[:, :20], past_key_values=cut)
    assert all(not t.requires_grad for layer in cut.detach().layers for t in layer.values())


def test_recompute_levels_are_checked_and_may_differ_by_layer(family):
    model = tiny(family)
    model.set_recompute(["full", "none", "full", "none"])
    assert [block.recompute for block in model.blocks] == ["full", "none", "full", "none"]
    with pytest.raises(ValueError, match=r"'some'.*none.*full"):
        model.set_recompute("some")
    with pytest.raises(ValueError, match="3 recompute levels for 4 layers"):
        model.set_recompute(["none"] * 3)
    with pytest.raises(ValueError, match="'group' is for all layers"):
        model.set_recompute(["group", "group", "full", "full"])
    model.gradient_checkpointing_enable()
    assert all(block.recompute == "full" for block in model.blocks)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_bf16_model_computes_what_an_fp32_one_does_under_autocast(model, ids):
    half = copy.deepcopy(model).bfloat16()
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in n or n.rsplit(".")[-1] in ("A_log", "dt_bias", "D") for n in kept)
    assert len(kept) == sum(
        "norm" in n or n.rsplit(".")[-1] in ("A_log", "dt_bias", "D") for n, _ in model.named_parameters()
    )
    rounded = copy.deepcopy(half).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = rounded(ids, labels=ids)
    output = half(ids, labels=ids)
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


@torch.no_grad()
def test_loss_is_that_of_the_shifted_logits(model, ids):
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    each = model(ids, labels=labels, loss_reduction="none").loss
    close(each[:, :-1].flatten(), expected)
    assert (each[:, -1] == 0).all()
    close(model(ids, labels=labels, loss_reduction="sum").loss, expected.sum())
    close(model(ids, labels=labels).loss, expected.sum() / (labels[:, 1:] != -100).sum())


@torch.no_grad()
def test_logits_to_keep_and_hidden_states(model, ids):
    full = model(ids, output_hidden_states=True)
    close(model(ids, logits_to_keep=3).logits, full.logits[:, -3:], atol=1e-6)
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]], atol=1e-6)
    assert len(full.hidden_states) == len(model.blocks) + 1
    close(model.lm_head(full.hidden_states[-1]), full.logits, atol=1e-6)


@torch.no_grad()
def test_long_sequences_with_labels_form_no_logits(model, ids, monkeypatch):
    monkeypatch.setattr("models.language_model.SMALL_LOGITS", 100)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, logits_to_keep=1).logits.shape[1] == 1


def test_inputs_that_do_not_fit_together_are_refused(model, ids):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens"):
        model(ids, attention_mask=torch.ones_like(ids), cu_seqlens=torch.tensor([0, 40, 80]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(ids, cu_seqlens=torch.tensor([0, 50, 80]))
    for offsets in ([0, 30, 20, 40, 80], [0, -5, 40, 80], [0.0, 40.0, 80.0], [[0, 40, 80]]):
        with pytest.raises(ValueError, match="cu_seqlens must be whole numbers that rise"):
            model(ids, cu_seqlens=torch.tensor(offsets))
    for wrong in (ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with at least one token"):
            model(wrong)
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[B, T, D\]"):
        model(inputs_embeds=torch.zeros(2, 3))
    for keep in (-1, None, [0, 1], 2.0):
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(ids, logits_to_keep=keep)
    with pytest.raises(ValueError, match="no token"):
        model(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 3))
    _, cache = read(model, ids, ())
    with pytest.raises(ValueError, match=r"\[2\] rows and the batch 1"):
        model(ids[:1], past_key_values=cache)


def test_autocast_leaves_float64_alone(model, ids):
    exact = copy.deepcopy(model).double()
    expected = exact(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = exact(ids, labels=ids)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)

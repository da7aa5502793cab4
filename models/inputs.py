"""What a model is given: checked, and without its padding."""

from torch import Tensor

from .cache import Packing


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, logits_to_keep: int | Tensor
) -> None:
    """Raises ValueError for what a forward pass cannot read: no input or two, or a wrong shape."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    name, given, wanted = "input_ids", input_ids, "[B, T]"
    if given is None:
        name, given, wanted = "inputs_embeds", inputs_embeds, "[B, T, D]"
    if given.dim() != wanted.count(",") + 1 or given.shape[1] == 0:
        raise ValueError(f"{name} must be {wanted} with at least one token; got {list(given.shape)}")
    if not isinstance(logits_to_keep, Tensor) and not (
        isinstance(logits_to_keep, int) and logits_to_keep >= 0
    ):
        raise ValueError(
            f"logits_to_keep={logits_to_keep!r} must be 0 (all positions), a number of last positions, or a "
            "tensor of positions"
        )


def packed(x: Tensor, packing: Packing | None) -> Tensor:
    return x if packing is None else packing.pack(x)


def unpacked(x: Tensor, packing: Packing | None, length: int) -> Tensor:
    return x if packing is None else packing.unpack(x, length)


def packing_of(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor, goes_on: bool
) -> Packing | None:
    """None where every row of x [B, T, D] is one sequence without padding.

    Args:
        attention_mask: [B, T] or longer, 0 for padding.
        cu_seqlens: offsets of documents that fill the batch, instead.
        goes_on: x is a piece of what is read, which may be padding alone.

    Raises:
        ValueError: both are given, or what is given does not fit x.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("give either attention_mask or cu_seqlens")
        return Packing.of_documents(cu_seqlens.to(x.device), batch, length)
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < length:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask {shape} does not fit a batch of {batch} x {length} tokens")
    mask = attention_mask[:, -length:].to(x.device)
    if bool(mask.all()):
        return None
    packing = Packing.of_mask(mask)
    if not goes_on and not len(packing.rows):
        raise ValueError("attention_mask holds no token: at least one position must be 1")
    return packing

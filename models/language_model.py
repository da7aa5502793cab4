"""What all families share: embeddings -> blocks -> norm -> head; carried state; recomputation; saving.

A family brings a config, a block and the names of its parameters (gla.py is the smallest one). Nothing here
depends on what its token mixer computes.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks import HALF, at_least_fp32
from .cache import RecurrentCache
from .config import LanguageModelConfig
from .draw import Draw
from .inputs import check_inputs, packed, packing_of, unpacked
from .ops.cross_entropy import linear_cross_entropy
from .ops.dtypes import product_dtype
from .saving import auto_map, bundle_code, complete_folder
from .trunk import GROUP, Block, Trunk

SMALL_LOGITS = 2**22  # with labels, logits of at most this many elements are returned besides the loss
IGNORED = -100


class LanguageModel(PreTrainedModel, GenerationMixin):
    """A causal language model over a stack of blocks. A family sets the class attributes below."""

    block_class: ClassVar[type[Block]]
    norm_name: ClassVar[str]  # parameter name of the last norm
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["norm"]

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        trunk = Trunk(config, self.block_class, self.norm_name)
        self.add_module(self.base_model_prefix, trunk)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # ------------------------------------------------------------------------------------------------
    # for the family to fill in

    def initialize_module(self, module: nn.Module, draw: Draw) -> None:
        """Sets the module's own parameters (`assign`) to their values at the start of training."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------
    # parts

    @property
    def trunk(self) -> Trunk:
        return getattr(self, self.base_model_prefix)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.trunk.layers

    def get_input_embeddings(self) -> nn.Embedding:
        return self.trunk.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.trunk.embeddings = value

    def flops_per_token(self) -> int:
        """Forward pass with the head, a multiply-add counted as two."""
        return sum(block.flops_per_token() for block in self.blocks) + 2 * self.lm_head.weight.numel()

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draws every parameter anew; a seed gives the same bits on any device."""
        draw = Draw(seed)
        for module in self.modules():
            self.initialize_module(module, draw)
        self.tie_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for each module it has no weights for; its draws follow torch's global seed
        self.initialize_module(module, Draw(int(torch.randint(2**31, (), device="cpu"))))

    # ------------------------------------------------------------------------------------------------
    # recomputation in the backward pass

    @property
    def recompute_levels(self) -> tuple[str, ...]:
        """What `set_recompute` takes, least recomputed first."""
        return *self.block_class.recompute_levels, GROUP

    def set_recompute(self, levels: str | list[str]) -> None:
        """What the backward pass computes again instead of keeping it, for all layers or one by one.

        Args:
            levels: `none`, `full` (the whole layer), or one of those between that the family's block has and
                describes (`recompute_levels`). A list: one level a layer. `group`, of all layers or none:
                groups of sqrt(layers) run again from the stream in front of them, and inside each layer
                is recomputed as with `full`; one more forward pass, for sequences too long for `full`.

        Raises:
            ValueError: a level that the layers do not have, or a list of another length.
        """
        levels = [levels] * len(self.blocks) if isinstance(levels, str) else list(levels)
        if len(levels) != len(self.blocks):
            raise ValueError(f"{len(levels)} recompute levels for {len(self.blocks)} layers")
        grouped = GROUP in levels
        if grouped and set(levels) != {GROUP}:
            raise ValueError(f"recompute={GROUP!r} is for all layers, not for some of them")
        levels = ["full"] * len(levels) if grouped else levels
        for block, level in zip(self.blocks, levels):
            if level not in block.recompute_levels:
                allowed = ", ".join(self.recompute_levels)
                raise ValueError(f"recompute={level!r}: layers of {self.config.model_type} offer {allowed}")
        self.trunk.grouped = grouped
        for block, level in zip(self.blocks, levels):
            block.recompute = level

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self.set_recompute("full")

    def gradient_checkpointing_disable(self) -> None:
        self.set_recompute("none")

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(block.recompute != "none" for block in self.blocks)

    # ------------------------------------------------------------------------------------------------
    # forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        loss_reduction: str = "mean",
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits or loss of a batch of token sequences.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, D] instead.
            attention_mask: [B, T] (or longer, then its last T columns count), 0 for padding, which may be
                anywhere: it touches neither state nor convolution. All of a piece read with past_key_values
                may be padding.
            labels: [B, T], shifted inside: position t predicts labels[t + 1]; -100 is skipped.
            past_key_values: carried state; an empty `RecurrentCache()` begins one. Updated with use_cache.
            use_cache: None is on with past_key_values, off in training and with labels, else as configured.
            output_hidden_states: also return the embeddings, every block's output, and the normed last one.
            logits_to_keep: return logits of this many last positions, or of these positions; 0 means of all,
                but with labels only where there are no more than `SMALL_LOGITS` elements (None otherwise).
            cu_seqlens: [N + 1] offsets of documents over all B * T tokens, row after row: the state and the
                convolution begin anew at each; the first document of a row goes on from the carried state.
            loss_reduction: `mean` over the counted positions, `sum`, or `none` ([B, T], 0 where none counts).

        Raises:
            ValueError: inputs that do not fit together.
        """
        check_inputs(input_ids, inputs_embeds, logits_to_keep)
        x = self.trunk.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        cache, update = self._cache(past_key_values, use_cache, batch, labels)
        packing = packing_of(attention_mask, cu_seqlens, x, goes_on=past_key_values is not None)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        streams = [] if keep else None
        plain = packing is None and labels is None and not keep and not isinstance(logits_to_keep, Tensor)
        plain = plain and update and input_ids is not None and not torch.is_grad_enabled()
        loss, logits = None, cache.step(self, input_ids) if plain and length == 1 else None
        if logits is None:
            with self._half_precision(x.device.type):
                x = packed(x.to(self._residual_dtype(x)), packing)
                x = self.trunk.last_norm(self.trunk.run(x, cache, packing, update, streams))
                x, *streams = (unpacked(t, packing, length) for t in (x, *(streams or ())))
                loss = None if labels is None else self._loss(x, labels, loss_reduction)
                logits = self._logits(x, logits_to_keep, with_loss=labels is not None)
        if update:
            cache.seen_tokens += length
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if update else None,
            hidden_states=(*streams, x) if keep else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _cache(
        self, given: RecurrentCache | None, use_cache: bool | None, batch: int, labels: Tensor | None
    ) -> tuple[RecurrentCache, bool]:
        """The state to start from, and whether it is to be updated."""
        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not self.training and labels is None)
        cache = RecurrentCache() if given is None else given
        if not isinstance(cache, RecurrentCache):
            raise ValueError(f"past_key_values must be a RecurrentCache, not {type(cache).__name__}")
        rows = {len(state) for layer in cache.layers for state in layer.values()}
        if rows and rows != {batch}:
            raise ValueError(f"the carried state has {sorted(rows)} rows and the batch {batch}")
        return cache, use_cache

    def _half_precision(self, device_type: str) -> AbstractContextManager:
        # a half-precision model runs just like an fp32 one under autocast: products are rounded, sums are not
        dtype = self.trunk.embeddings.weight.dtype
        if dtype not in HALF or torch.is_autocast_enabled(device_type):
            return nullcontext()
        return torch.autocast(device_type, dtype)

    def _residual_dtype(self, x: Tensor) -> torch.dtype:
        dtype = product_dtype(x)
        return torch.promote_types(dtype, torch.float32) if self.config.residual_in_fp32 else dtype

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # [B, T]; the last has nothing to predict
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)

    def _logits(self, hidden: Tensor, keep: int | Tensor, with_loss: bool) -> Tensor | None:
        asked = isinstance(keep, Tensor) or keep > 0
        if with_loss and not asked and hidden.shape[:2].numel() * self.config.vocab_size > SMALL_LOGITS:
            return None
        positions = keep if isinstance(keep, Tensor) else slice(-keep, None) if asked else slice(None)
        return at_least_fp32(self.lm_head(hidden[:, positions]))

    # ------------------------------------------------------------------------------------------------
    # generation

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has one cache, "
                "its recurrent state; leave cache_implementation out"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: RecurrentCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` feeds to forward: the tokens that the carried state has not seen."""
        inputs = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
            "output_hidden_states": kwargs.get("output_hidden_states"),
        }
        from_here = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        if inputs_embeds is not None and is_first_iteration:
            return inputs | {"inputs_embeds": inputs_embeds[:, from_here]}
        return inputs | {"input_ids": input_ids[:, from_here]}

    # ------------------------------------------------------------------------------------------------
    # saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`, whole or not at all, with the code that rebuilds the model.

        The folder loads with `AutoModelForCausalLM.from_pretrained`: as it is after `import models`, with
        `trust_remote_code=True` where this repository is not installed.
        """
        if not is_main_process:
            return
        self.config.auto_map = auto_map(type(self))
        with complete_folder(save_directory) as folder:
            bundle_code(type(self), folder)
            super().save_pretrained(folder, **kwargs)
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)))

"""How large a model's recurrent state is, and what it costs: a table for people, a dict for programs.

    print(state_report(model))

What is counted:

- state elements: the recurrent state of one sequence. State bytes: the same in fp32, as it is kept while
  decoding. The last inputs of short convolutions are counted apart.
- parameters: every parameter once, so a tied head counts with the embeddings.
- FLOPs a token: the forward pass, two for each multiply-add. Matrix products (projections, MLP, head) and the
  update and the reading of the state (each mixer's `flops_per_token`) count; norms, activations and the
  embedding lookup do not. A state element counts 4 (2 to write, 2 to read), as in step-by-step decoding;
  chunked kernels do more, for speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

STATE_BYTES = 4  # fp32
LONG = 12  # from this many layers on, equal neighbours share a line


@dataclass(frozen=True)
class LayerReport:
    """One layer: mixer, norms and MLP."""

    layer: int
    drop_mode: str | None
    state_elements: int
    state_bytes: int
    conv_elements: int
    parameters: int
    flops_per_token: int


@dataclass(frozen=True)
class StateReport:
    """A whole model. Totals of parameters and FLOPs include embeddings, final norm and head."""

    model_type: str
    layers: tuple[LayerReport, ...]
    other_parameters: int
    other_flops_per_token: int

    @property
    def total_elements(self) -> int:
        return sum(layer.state_elements for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def total_conv_elements(self) -> int:
        return sum(layer.conv_elements for layer in self.layers)

    @property
    def total_parameters(self) -> int:
        return self.other_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def flops_per_token(self) -> int:
        return self.other_flops_per_token + sum(layer.flops_per_token for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "state_elements": self.total_elements,
            "state_bytes": self.total_bytes,
            "conv_elements": self.total_conv_elements,
            "parameters": self.total_parameters,
            "flops_per_token": self.flops_per_token,
        }
        other = {"parameters": self.other_parameters, "flops_per_token": self.other_flops_per_token}
        layers = [asdict(layer) for layer in self.layers]
        return {"model_type": self.model_type, "layers": layers, "other": other, "total": totals}

    def __str__(self) -> str:
        header = ("layer", "mode", "state", "state bytes", "conv", "parameters", "FLOPs/token")
        rows = [_cells(group) for group in _groups(self.layers)]
        other = ("other", "", "", "", "", f"{self.other_parameters:,}", _short(self.other_flops_per_token))
        total = (
            "total",
            "",
            f"{self.total_elements:,}",
            _bytes(self.total_bytes),
            f"{self.total_conv_elements:,}",
            f"{self.total_parameters:,}",
            _short(self.flops_per_token),
        )
        each = (
            "\n(lines of several layers give the numbers of one of them)"
            if len(rows) < len(self.layers)
            else ""
        )
        return f"{self.model_type}, state of one sequence\n{table(header, [*rows, other, total])}{each}"


@dataclass(frozen=True)
class ExpansionReport:
    """What `expand_state` did."""

    plan: tuple[Any, ...]  # of LayerPlan
    before: StateReport
    after: StateReport

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": [asdict(step) for step in self.plan],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def __str__(self) -> str:
        header = ("layer", "mode", "state before", "after", "parameters before", "after")
        pairs = [(self.before.layers[step.layer], self.after.layers[step.layer]) for step in self.plan]
        rows = [(str(new.layer), str(new.drop_mode), *_before_after(old, new)) for old, new in pairs]
        untouched = len(self.after.layers) - len(rows)
        growth = self.after.total_elements / self.before.total_elements
        total = (
            "total",
            "",
            f"{self.before.total_elements:,}",
            f"{self.after.total_elements:,}",
            f"{self.before.total_parameters:,}",
            f"{self.after.total_parameters:,}",
        )
        return (
            f"{len(rows)} {'layer' if len(rows) == 1 else 'layers'} expanded, {untouched} as they were; "
            f"recurrent state x{growth:.2f}\n"
            f"{table(header, [*rows, total])}\n\n{self.after}"
        )


def state_report(model: nn.Module) -> StateReport:
    """Sizes and costs of a model of this repository, on any device, meta included.

    Raises:
        ValueError: it is another library's model, or a wrapper around one.
    """
    if not hasattr(model, "blocks"):
        kind = f"{type(getattr(model, 'config', model)).__name__} of another library"
        raise ValueError(
            f"a {kind} cannot be reported or expanded; use load_pretrained, and no wrapper around it"
        )
    layers = tuple(_layer_report(i, block, model.config) for i, block in enumerate(model.blocks))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StateReport(
        model_type=model.config.model_type,
        layers=layers,
        other_parameters=parameters - sum(layer.parameters for layer in layers),
        other_flops_per_token=2 * model.get_output_embeddings().weight.numel(),
    )


def _layer_report(index: int, block: nn.Module, config: Any) -> LayerReport:
    mixer = block.token_mixer
    return LayerReport(
        layer=index,
        drop_mode=config.layer_shape(index).drop_mode,
        state_elements=mixer.state_elements(),
        state_bytes=STATE_BYTES * mixer.state_elements(),
        conv_elements=mixer.conv_elements(),
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        flops_per_token=block.flops_per_token(),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first two to the left, numbers to the right; a rule sets the last row off."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    rule = "-" * len(aligned[0])
    return "\n".join([aligned[0], rule, *aligned[1:-1], rule, aligned[-1]])


def _groups(layers: Sequence[LayerReport]) -> Iterator[list[LayerReport]]:
    if len(layers) < LONG:
        return ([layer] for layer in layers)
    return (list(group) for _, group in groupby(layers, key=lambda layer: replace(layer, layer=0)))


def _cells(group: Sequence[LayerReport]) -> tuple[str, ...]:
    one = group[0]
    return (
        f"{one.layer}-{group[-1].layer}" if len(group) > 1 else str(one.layer),
        one.drop_mode or "-",
        f"{one.state_elements:,}",
        _bytes(one.state_bytes),
        f"{one.conv_elements:,}",
        f"{one.parameters:,}",
        _short(one.flops_per_token),
    )


def _before_after(old: LayerReport, new: LayerReport) -> tuple[str, ...]:
    numbers = (old.state_elements, new.state_elements, old.parameters, new.parameters)
    return tuple(f"{number:,}" for number in numbers)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.4g} {unit}"
        number /= 1024
    return f"{number:,.4g} GiB"


def _short(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f} T"

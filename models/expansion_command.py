"""`python -m models.expansion in=FOLDER out=FOLDER ...`: expand a model and save it, without training."""

from collections.abc import Sequence
from dataclasses import dataclass

from .command_line import run_command
from .expansion import expand_state, plan_expansion
from .folder import check_is_new, copy_tokenizer
from .loading import load_pretrained, read_config
from .saving import complete_folder


@dataclass(frozen=True)
class ExpansionArguments:
    """Expand a model and save it, with its tokenizer.

    python -m models.expansion in=FOLDER out=FOLDER drop_prop=6 [key=value ...]

    in=FOLDER            a model in any layout that load_pretrained reads
    out=FOLDER           a new folder
    drop_prop=N          expand layer i when i % N == 0
    layers=0,6,12        or: these layers
    drop_mode=NAME       the family's default when left out (gla, mamba4)
    expand_factor=2|4|8  with drop_mode=extend: growth of the key dimension (4)
    seed=N               of the fresh tensors (0)
    reinit=NAME          standard, or published for the published code's resets
    """

    in_: str
    out: str
    drop_prop: int | None = None
    layers: list[int] | None = None
    drop_mode: str | None = None
    expand_factor: int | None = None
    seed: int = 0
    reinit: str = "standard"


def expand_folder(arguments: ExpansionArguments) -> None:
    check_is_new(arguments.out)
    wishes = {
        "drop_prop": arguments.drop_prop,
        "drop_mode": arguments.drop_mode,
        "layers": arguments.layers,
        "expand_factor": arguments.expand_factor,
    }
    plan_expansion(
        read_config(arguments.in_), **wishes
    )  # what cannot be done fails before gigabytes are read
    model = load_pretrained(arguments.in_)
    report = expand_state(model, **wishes, seed=arguments.seed, reinit=arguments.reinit)
    with complete_folder(arguments.out) as folder:
        model.save_pretrained(folder)
        tokenizer = copy_tokenizer(arguments.in_, folder)
    print(
        f"{report}\n\nsaved to {arguments.out}, {'with' if tokenizer else 'as the source has no'} tokenizer"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(ExpansionArguments, expand_folder, argv)

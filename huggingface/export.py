"""`python -m huggingface.export in=FOLDER out=FOLDER`: an unexpanded model in its family's published layout.

GLA becomes a folder that flash-linear-attention loads, Mamba2 one that transformers loads; neither needs this
repository then. The other way round needs no command: load_pretrained reads published layouts as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models import load_pretrained
from models.command_line import run_command
from models.folder import check_is_new, copy_tokenizer
from models.saving import complete_folder, save_published


@dataclass(frozen=True)
class ExportArguments:
    """Write an unexpanded model in the published layout, with its tokenizer.

    python -m huggingface.export in=FOLDER out=FOLDER [dtype=bfloat16]

    in=FOLDER    a model in any layout that load_pretrained reads, a ckpt_N folder for one
    out=FOLDER   a new folder
    dtype=NAME   bfloat16, float16 or float32; as stored when left out. Norms and decays stay in float32
    """

    in_: str
    out: str
    dtype: str | None = None


def export(arguments: ExportArguments) -> None:
    check_is_new(arguments.out)
    dtypes = ("bfloat16", "float16", "float32")
    if arguments.dtype not in (None, *dtypes):
        raise ValueError(f"dtype={arguments.dtype!r} must be one of {', '.join(dtypes)}")
    model = load_pretrained(arguments.in_, dtype=arguments.dtype and getattr(torch, arguments.dtype))
    with complete_folder(arguments.out) as folder:
        save_published(model, folder)
        tokenizer = copy_tokenizer(arguments.in_, folder)
    print(f"exported to {arguments.out}, {'with' if tokenizer else 'as the source has no'} tokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(ExportArguments, export, argv)


if __name__ == "__main__":
    raise SystemExit(main())

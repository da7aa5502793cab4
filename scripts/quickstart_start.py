"""The untrained model that the quickstart's GLA starts from.

    python scripts/quickstart_start.py CONFIG.json OUT

Random weights as in any run from scratch, but both matrices of the first layer's forget gates are drawn four
times as wide. GLA divides a gate's logit by 16, so that a narrow gate hardly forgets; a model without a
short convolution needs one that does, to tell the token before from all others, and in the few thousand steps
that a laptop has it would not grow there.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import build_model

WIDER = 4.0


def main(config: str, out: Path) -> None:
    if (out / "model.safetensors").is_file():
        return
    model = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.blocks[0].token_mixer.named_parameters():
            if name.startswith("gk_proj") and name.endswith("weight"):
                parameter.mul_(WIDER)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""The untrained model that the quickstart starts from.

    python scripts/quickstart_start.py CONFIG.json OUT

Random weights as in any run from scratch, but for two things without which associative recall is not learned
in the minutes that a laptop has. Embeddings are drawn wide: beside them the first layer's output is small, so
that a token stays recognisable behind it. And both matrices of the forget gates of GLA's first layer are
drawn wide: GLA divides a gate's logit by 16, so that a narrow gate hardly forgets, and a model without a
short convolution needs one that does to tell the token before from all others.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import build_model

EMBEDDING_STD = 0.7
GATE_WIDTH = 16.0


def main(config: str, out: Path) -> None:
    if (out / "model.safetensors").is_file():
        return
    model = build_model(config, seed=0)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.mul_(EMBEDDING_STD / embeddings.std())
        for name, parameter in model.blocks[0].token_mixer.named_parameters():
            if name.startswith("gk_proj") and name.endswith("weight"):
                parameter.mul_(GATE_WIDTH)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

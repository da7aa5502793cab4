"""The model card of a model folder, written from its config alone."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from models import build_model, read_config, state_report
from models.families import family_of

PAPER = "StateX ([arXiv 2509.22630](https://arxiv.org/abs/2509.22630))"


def write_card(folder: str | Path, repo: str, data: ModelCardData) -> str:
    """Text of README.md: what the model is, its state's size, how to load it; `data` goes to its front."""
    config = read_config(folder)
    report = state_report(build_model(config, device="meta"))
    imports, trust = _how_to_load(folder)
    return f"""---
{data.to_yaml()}
---

# {repo.split("/")[-1]}

A {family_of(config).name} language model with {report.total_parameters:,} parameters and a recurrent state of
{report.total_elements:,} elements a sequence ({report.total_bytes / 2**20:.4g} MiB in fp32).
{_expansion(config)}

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})
```

```
{report}
```
"""


def _how_to_load(folder: str | Path) -> tuple[str, str]:
    """(imports before the others, arguments besides the name) of loading the folder with transformers."""
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") == family_of(raw).model_type:
        return "", ", trust_remote_code=True"
    return "import fla  # flash-linear-attention\n" if raw.get("model_type") == "gla" else "", ""


def _expansion(config: Any) -> str:
    modes: dict[str, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        if mode := config.layer_shape(layer).drop_mode:
            modes.setdefault(mode, []).append(layer)
    if not modes:
        return "No layer's state is expanded."
    said = "; ".join(f"`{mode}` in layers {', '.join(map(str, layers))}" for mode, layers in modes.items())
    return f"State expansion after {PAPER}: {said}."

"""Linear RNN language models whose recurrent state can be enlarged: GLA, Mamba2, and others added to them.

    model = build_model("configs/models/gla-1.3B.json", device="meta")
    model = load_pretrained("huggingface/gla-1.3B-100B")
    report = expand_state(model, drop_prop=6, drop_mode="extend", seed=0)
    model.save_pretrained(folder)

After `import models`, transformers' AutoConfig and AutoModelForCausalLM know these families too.
"""

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from .families import FAMILIES
from .loading import build_model, load_pretrained, read_config
from .saving import save_published

_LAZY = {"expand_state": "expansion", "state_report": "report"}

__all__ = ["build_model", "expand_state", "load_pretrained", "read_config", "save_published", "state_report"]


def __getattr__(name: str) -> Any:
    # these modules are commands too (python -m models.expansion), and must not be imported before they run
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_families() -> None:
    """Import every file that calls register_family, and tell transformers of the families."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if "\nregister_family(" in file.read_text(encoding="utf-8"):
            importlib.import_module(f".{file.stem}", __name__)
    for family in FAMILIES.values():
        AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.model_class, exist_ok=True)


_register_families()

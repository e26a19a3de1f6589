"""minimoe: train a small mixture-of-experts language model from scratch, fine-tune it, generate text.

`import minimoe` makes `transformers.AutoModelForCausalLM` know the architecture. The `minimoe` command alone skips
that import until it needs a model, so that `minimoe --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not (Path(sys.argv[0]).stem == "minimoe" or "minimoe.cli" in sys.orig_argv):
    from minimoe.model.config import MiniMoeConfig
    from minimoe.model.decoder import MiniMoeForCausalLM, MiniMoeModel

__version__ = "0.1.0"
__all__ = ["MiniMoeConfig", "MiniMoeForCausalLM", "MiniMoeModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("MiniMoeConfig", "MiniMoeForCausalLM", "MiniMoeModel"):
        return getattr(importlib.import_module("minimoe.model.decoder"), name)
    raise AttributeError(f"module 'minimoe' has no attribute {name!r}")

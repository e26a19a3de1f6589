"""minimoe: train a small mixture-of-experts language model from scratch, fine-tune it, generate text.

`import minimoe` makes `transformers`' Auto classes know the architecture, without the seconds that torch takes to
import: the config is registered when they are, and the model when there is a config of it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe.model.config import MiniMoeConfig
    from minimoe.model.language_model import MiniMoeForCausalLM, MiniMoeModel

__version__ = "0.1.0"
__all__ = ["MiniMoeConfig", "MiniMoeForCausalLM", "MiniMoeModel", "__version__"]

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("minimoe.model.language_model"), name)
    raise AttributeError(f"module 'minimoe' has no attribute {name!r}")


class _RegisterWhenImported(importlib.abc.MetaPathFinder):
    """Finds the module of `AutoConfig` as everybody does, and registers the architecture once it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path) if name == _AUTO_CONFIG else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    from minimoe.model.config import MiniMoeConfig

    auto.AutoConfig.register("minimoe", MiniMoeConfig, exist_ok=True)


if _AUTO_CONFIG in sys.modules:
    _register(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _RegisterWhenImported())

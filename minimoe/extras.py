"""Libraries that only some commands need, and the extra of pyproject.toml that installs each."""

from __future__ import annotations

import importlib
from typing import Any

from minimoe.errors import UserError


def extra(module: str, name: str) -> Any:
    """Import a module that `pip install 'minimoe[NAME]'` installs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed", fix=f"pip install 'minimoe[{name}]'") from None

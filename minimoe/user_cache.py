"""The folder of everything that minimoe keeps between runs to save time: tokenised data, compiled C++."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """`minimoe` in XDG_CACHE_HOME or ~/.cache; where that cannot be written, a private folder among temporary files.

    Raises:
        OSError: nor can that.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = home / "minimoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    owner = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"minimoe-{owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != owner:  # what lies there is run: nobody else may put it there
        raise PermissionError(f"{folder} belongs to another user")
    return folder

"""Where on this machine we keep what can be made again: tokenised data, the compiled C++."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/minimoe`, else `~/.cache/minimoe`; a folder for temporary files where neither can be written.

    The folder exists.
    """
    # A relative path is none, says the XDG base directory specification.
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "minimoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    return _temporary(folder, reason)


@cache
def _temporary(instead_of: Path, reason: str) -> Path:
    """A folder that is ours alone: from one that others can write to, their code would be loaded as our C++."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"minimoe-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022
    except OSError:
        ours = False
    if not ours and hasattr(os, "getuid"):
        folder = Path(tempfile.mkdtemp(prefix="minimoe-"))
    print(f"cache: {folder}, since {instead_of} cannot be had ({reason}); XDG_CACHE_HOME moves it", file=sys.stderr)
    return folder

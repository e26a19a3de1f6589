"""The `minimoe` command. Torch is imported only inside a command, so that `--help` answers at once."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import os
import re
import sys
from typing import NoReturn

from minimoe import openmp
from minimoe.cli.app import app
from minimoe.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, EXIT_USER, MinimoeError, Preempted

for commands in ("train", "inspect", "generate", "convert"):  # each adds its own, in the order that --help lists
    importlib.import_module(f"minimoe.cli.{commands}")

# The disk's and the system's limits, not ours; any other OSError that gets this far is a bug.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_IO_ERRORS = (*_DISK, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EMFILE)
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


def main() -> NoReturn:
    """Entry point: run a command, turn errors into messages and exit codes."""
    openmp.configure()
    try:
        app()
    except MinimoeError as error:
        if os.environ.get("MINIMOE_DEBUG"):
            raise
        print(error if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MINIMOE_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in _IO_ERRORS:
            place = str(error.filename or "a file being written")
            print(f"error: {error.strerror}\n  at: {place[:200]}", file=sys.stderr)
            sys.exit(EXIT_IO)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
            fix = "lower train.micro_batch_size, batch_size, data.sequence_length or the model's sizes"
            print(f"error: out of memory: {str(error).partition(chr(10))[0][:200]}\n  fix: {fix}", file=sys.stderr)
            sys.exit(EXIT_USER)
        print(f"error: a bug in minimoe ({type(error).__name__}: {error}); run again with --debug", file=sys.stderr)
        sys.exit(EXIT_BUG)
    sys.exit(0)


def program() -> NoReturn:
    """`main` in a process of its own, which ends without taking the interpreter down.

    To free torch's and transformers' objects one by one takes 2 s of CPU time, which beside other busy processes is a
    minute, and the last owner of a process group may wait for a thread that waits for the interpreter. The system
    frees all of it at once.
    """
    code = EXIT_BUG
    for stream in (sys.stdout, sys.stderr):  # what is shown may be in any script, whatever the terminal can print
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # what is not text is refused by line

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before anybody else's, so that it is called last
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
        raise

"""How every command ends: errors as one line on stderr, and exit codes.

0 done, 1 a bug, 2 wrong input, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from ..errors import MoeCacheError
from .terminal import make_streams_safe

OPEN_FILES = 4096  # to which mlx-lm sets the hard limit
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE: what a C program would leave, so scripts with pipefail know it


def run(body: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command's body and return its exit code; `debug` adds the traceback of an error."""
    _occupy_standard_streams()
    make_streams_safe()
    try:
        try:
            code = body()
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED, debug=False)
        except Exception as error:
            line, code = explain(error, debug=debug)
            return _fail(line, code, debug)
    except BrokenPipeError:
        return BROKEN_PIPE
    finally:
        _drop_unwritable()


def explain(error: Exception, *, debug: bool) -> tuple[str, int]:
    """The line that says what went wrong, and the exit code of a command that ends because of it."""
    if isinstance(error, MoeCacheError):
        line, code = f"error: {error}", 2
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        line, code = f"error: {where}{error.strerror or error}", 2
    elif _is_open_files_limit(error):
        line = f"error: mlx-lm needs a hard limit of at least {OPEN_FILES:,} open files; raise it (ulimit -Hn shows it)"
        code = 2
    elif _is_out_of_memory(error):
        line, code = f"error: out of memory{_detail(error)}; use fewer --slots or a smaller --memory", 2
    else:
        where = "" if debug else " (--debug shows where)"
        line, code = f"error: unexpected {type(error).__name__}{_detail(error)}{where}", 1
    return " ".join(line.splitlines()), code


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # stderr itself may be what cannot be written
        print(line, file=sys.stderr, flush=True)
    return code


def _is_open_files_limit(error: Exception) -> bool:
    # mlx-lm calls setrlimit when it is imported, without a look at what is allowed.
    return isinstance(error, ValueError) and str(error) == "not allowed to raise maximum limit"


def _is_out_of_memory(error: Exception) -> bool:
    # MLX raises RuntimeError("[malloc] Unable to allocate ...") and, on Metal, "Attempting to allocate ...".
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and " allocate " in str(error))


def _detail(error: Exception) -> str:
    return f": {error}" if str(error) else ""


def _occupy_standard_streams() -> None:
    """Where a standard stream is closed, put nothing in its place: MLX takes a file that gets number 0 for not open."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one


def _drop_unwritable() -> None:
    """Point a stream that cannot be written nowhere: else Python would try again at exit and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

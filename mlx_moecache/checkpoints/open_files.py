"""Models of hundreds of shards want more open files than systems allow at first: 256 on macOS, 1,024 on many others.

mlx-lm sets limits, too, when it is imported: 2,048, and 4,096 as the hard one, which lasts.
"""

import contextlib
import resource

OTHERS = 128  # files and sockets of everything else in the process


def allow_open_files(count: int) -> None:
    """Let this process have `count` files open, as far as its hard limit allows; a limit that is enough stays.

    Where the system refuses, opening the files says so.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

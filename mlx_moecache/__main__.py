"""`python -m mlx_moecache` is the console script `mlx_moecache`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

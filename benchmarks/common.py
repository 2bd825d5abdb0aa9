"""What the benchmarks share: intervals by paired bootstrap, the default model, and where figures come from."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import numpy.typing as npt

import mlx_moecache
from mlx_moecache.checkpoints.hub import resolve_model
from mlx_moecache.demo import DEMO_NAME, demo_model
from mlx_moecache.errors import MoeCacheError

Array = npt.NDArray[np.float64]
DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def format(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f} {self.high:.{digits}f}]"


def bootstrap(rows: npt.ArrayLike, statistic: Callable[[Array], float], *, seed: int = 0) -> Estimate:
    """`statistic` of `rows` [N, ...], and the range it has when N rows are drawn anew with replacement.

    A row holds everything that was measured together (one round, one window), so that comparisons stay paired.
    """
    data = np.asarray(rows, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = [statistic(data[rng.integers(len(data), size=len(data))]) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(statistic(data), float(low), float(high))


def median(values: Array) -> float:
    return float(np.median(values))


def environment() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    return {
        "platform": platform.platform(),
        "machine": processor(),
        "cpus": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],  # much above 0 at the start: the machine is not quiet
        "mlx_device": str(mx.default_device().type).rpartition(".")[2],
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "mlx_lm": mlx_lm.__version__,
        "mlx_moecache": mlx_moecache.__version__,
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model folder or Hugging Face repo id (default: the bundled demo model)")


def model_folder(argument: str | None) -> tuple[Path, str]:
    """Where the model is, and what the record calls it. Raises HubError if it cannot be found or fetched."""
    if argument is None:
        return demo_model(), DEMO_NAME
    folder = resolve_model(argument)
    return folder, folder.name if Path(argument).exists() else argument


def run(main: Callable[[], None]) -> int:
    """Call a benchmark's main; an error that the library explains becomes one line and exit code 2."""
    try:
        main()
    except MoeCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

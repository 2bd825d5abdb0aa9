"""How all figures look: colours, panels, legends, and how a picture gets onto disk. Needs matplotlib, but no display.

Colours are those of Okabe and Ito, which can be told apart with colour-blindness; markers say the same again in grey.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200  # twice the resolution of a plain screen
COLUMNS = 3  # panels side by side at most
BLACK, GREY = "#000000", "#767676"
# One style per strategy, the same in every figure: colour and marker.
STYLES = {
    "pruning": ("#767676", "X"),
    "max-rank": ("#56B4E9", "v"),
    "cumsum": ("#E69F00", "^"),
    "cache-prior": ("#0072B2", "o"),
    "mass-budget": ("#009E73", "s"),
    "bounded-regret": ("#CC79A7", "D"),
    "price": ("#D55E00", "P"),
}
POLICY_STYLES = {
    "lru": (BLACK, "o", "-"),
    "lfu": ("#E69F00", "s", "-"),
    "decay": ("#0072B2", "^", "-"),
    "lfru": ("#CC79A7", "D", "-"),
    "belady": (GREY, "", "--"),
    "belady-paper": (GREY, "", ":"),
}
SPARE_STYLES = (("#009E73", "p"), ("#D55E00", "h"), ("#56B4E9", "*"))
SPARE_MARKERS = ("<", ">", "p", "h", "d")  # of further lines of one strategy
DASHES = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (4, 1.5, 1, 1.5)))  # of eviction policies in the trade-off figure
GUIDE = 0.01  # the loss of perplexity that is called small
INSTALL = 'pip install "mlx-moecache[plot]"'


def require_matplotlib() -> None:
    """Raise UsageError, with the command that installs it, if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(f"plots need matplotlib, which is not installed; run {INSTALL}") from None


def grid(n: int, *, height: float, width: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of n panels. A Figure without pyplot draws into files only, so no display is asked for."""
    from matplotlib.figure import Figure

    across = columns(n)
    down = math.ceil(n / across)
    size = (max(5.2, width * across), height * down)  # inches; the legend adds to it
    figure = Figure(figsize=size, layout="constrained")
    made: list[Axes] = []
    for i in range(n):
        axes = figure.add_subplot(down, across, i + 1)
        axes.grid(True, color="#E4E4E4", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        made.append(axes)
    return figure, made


def columns(panels: int) -> int:
    """Panels side by side."""
    return 2 if panels == 4 else min(panels, COLUMNS)


def name_axes(all_axes: Sequence[Axes], x: str, y: str) -> None:
    """x under every panel, y at the first of a row."""
    for i, axes in enumerate(all_axes):
        axes.set_xlabel(x, fontsize=9)
        if i % columns(len(all_axes)) == 0:
            axes.set_ylabel(y, fontsize=9)


def legend(figure: Figure, all_axes: Sequence[Axes], evictions: Sequence[str] = ()) -> None:
    """One legend for all panels, below them, in as many columns as fit; with several `evictions`, how they are told."""
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(evictions) > 1:
        for i, name in enumerate(evictions):
            fill = GREY if i == 0 else "white"
            sample = Line2D([], [], color=GREY, ls=DASHES[i % len(DASHES)], lw=1.2, marker="o", ms=4.5, mfc=fill)
            entries[f"with {name}"] = sample
    widest = 0.55 + 0.065 * max(map(len, entries))  # inches: the sample and letters of 8 points
    across = max(1, min(5, len(entries), int(figure.get_figwidth() / widest)))
    make_room(figure, math.ceil(len(entries) / across))
    handles = list(entries.values())
    figure.legend(handles, list(entries), loc="outside lower center", ncols=across, fontsize=8, frameon=False)


def write(figure: Figure, path: Path) -> None:
    """Write a .png or .svg; an earlier file is replaced at once or not at all. Raises UsageError."""
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file, matplotlib.rc_context({"svg.hashsalt": "mlx_moecache"}):
            figure.savefig(file, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give another --out") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def make_room(figure: Figure, rows: int) -> None:
    """Add the height of a legend of `rows` lines of 8 points, which the layout would otherwise take from the panels."""
    figure.set_figheight(figure.get_figheight() + 0.15 + 0.18 * rows)

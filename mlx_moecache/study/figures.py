"""The figures: quality against misses, misses against slots, lifetimes, use of experts. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .figure_data import Line, Metric, Panel, miss_rates, panels
from .figure_labels import LabelledLine, place_labels
from .figure_style import (
    BLACK,
    DASHES,
    GREY,
    GUIDE,
    POLICY_STYLES,
    SPARE_MARKERS,
    SPARE_STYLES,
    STYLES,
    columns,
    grid,
    legend,
    make_room,
    name_axes,
)
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Styles = dict[str, tuple[str, str]]  # name of a line -> colour, marker


def tradeoff(results: Results, metric: Metric) -> Figure:
    """Quality against miss rate, one panel per number of slots, one line per strategy over its parameter."""
    shown = panels(results, metric)
    if not any(panel.lines for panel in shown):
        raise UsageError("there is only original routing to show; add a strategy that changes it, such as cache-prior")
    figure, all_axes = grid(len(shown), height=3.5 if len(shown) > 1 else 4.4)
    evictions, styles = _evictions(shown), _styles(shown)
    for axes, panel in zip(all_axes, shown, strict=True):
        _draw_panel(axes, panel, metric, evictions, styles)
        axes.set_title(f"{panel.slots} of {results.model.experts} experts in memory", fontsize=9)
    name_axes(all_axes, "miss rate (% of selections)", metric.title)
    legend(figure, all_axes, evictions)
    figure.draw_without_rendering()  # labels are placed in pixels, so the layout must be known
    for axes, panel in zip(all_axes, shown, strict=True):
        _label_points(axes, panel, metric, styles)
    return figure


def slots(results: Results) -> Figure:
    """Miss rate of original routing against the number of slots, one line per eviction policy and Belady's bound."""
    return miss_rate_figure(miss_rates(results), results.model.experts)


def miss_rate_figure(series: dict[str, list[tuple[int, float]]], experts: int) -> Figure:
    """series: eviction policy -> (slots, miss rate as a share). Raises UsageError if no policy has two points."""
    if not any(len(points) > 1 for points in series.values()):
        raise UsageError("miss rate against slots needs original routing with at least two numbers of slots")
    figure, (axes,) = grid(1, height=3.4, width=5.2)
    spare = iter(SPARE_STYLES * len(series))
    for name, points in sorted(series.items(), key=lambda x: (x[0].startswith("belady"), -sum(m for _, m in x[1]))):
        kind = name.partition(":")[0]
        colour, marker, dash = POLICY_STYLES.get(kind) or (*next(spare), "-")
        if sum(other.partition(":")[0] == kind for other in series) > 1 and kind != name:
            colour, marker = next(spare)
        x, y = zip(*points, strict=True)
        label = "Belady (the bound)" if name == "belady" else name
        axes.plot(x, 100 * np.array(y), dash, color=colour, marker=marker, markersize=4.5, lw=1.3, label=label)
    ticks = sorted({s for points in series.values() for s, _ in points})
    if len(ticks) <= 12:
        axes.set_xticks(ticks)
    axes.set_ylim(bottom=0)
    name_axes([axes], f"slots per layer (of {experts} experts)", "miss rate (% of selections)")
    axes.set_title("original routing", fontsize=9)
    legend(figure, [axes])
    return figure


def lifetime(results: Results, metric: Metric) -> Figure:
    """Tokens that an expert stays in memory: a row per strategy, a mark per parameter value, a panel per slot count."""
    shown = panels(results, metric)
    evictions, styles = _evictions(shown), _styles(shown)

    def row_name(line: Line) -> str:
        return f"{_name(line)} + {line.eviction}" if len(evictions) > 1 else _name(line)

    lines = [line for panel in shown for line in (*panel.exact, *panel.lines) if any(p.lifetime for p in line.points)]
    names = list(dict.fromkeys(row_name(line) for line in lines))
    if not names:
        raise UsageError("no run has expert lifetimes: nothing was evicted; use fewer slots or longer texts")
    figure, all_axes = grid(len(shown), height=0.9 + 0.27 * len(names))
    rows = {name: -i for i, name in enumerate(names)}
    for axes, panel in zip(all_axes, shown, strict=True):
        for line in (*panel.exact, *panel.lines):
            if any(p.lifetime for p in line.points):
                _draw_lives(axes, line, rows[row_name(line)], styles.get(_name(line), (BLACK, "*")), metric)
        for line in panel.exact[:1]:
            if line.points[0].lifetime:
                axes.axvline(line.points[0].lifetime, color=BLACK, lw=0.8, ls=":", zorder=0)
        axes.set_title(f"{panel.slots} of {results.model.experts} experts in memory", fontsize=9)
        axes.set_yticks(
            list(rows.values()), list(rows) if axes in all_axes[:: columns(len(shown))] else [""] * len(rows)
        )
        axes.set_ylim(min(rows.values()) - 0.6, 0.6)
        axes.set_xlim(left=0, right=1.12 * axes.get_xlim()[1])
    name_axes(all_axes, "lifetime in memory (tokens)", "")
    if metric.name == "perplexity":
        from matplotlib.lines import Line2D

        full = Line2D([], [], ls="", marker="o", color=GREY, label="perplexity at most 1 % above exact")
        hollow = Line2D([], [], ls="", marker="o", color=GREY, mfc="white", label="more than 1 %")
        make_room(figure, 1)
        figure.legend(handles=[full, hollow], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def heatmap(uses: Sequence[npt.NDArray[np.int64]]) -> Figure:
    """How often each expert is selected, as a multiple of an even share. uses: selections [E] of each MoE layer."""
    share = np.full((len(uses), max(map(len, uses))), np.nan)  # layers may have fewer experts than others
    for row, counts in zip(share, uses, strict=True):
        row[: len(counts)] = counts * len(counts) / counts.sum()
    figure, (axes,) = grid(1, height=1.3 + min(6.0, 0.16 * len(uses) + 0.6), width=6.8)
    # The few busiest experts must not make all others look the same.
    top = max(2.0, float(np.nanquantile(share, 0.99)))
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    name_axes([axes], "expert", "MoE layer")
    axes.set_yticks(range(0, len(uses), math.ceil(len(uses) / 16)))
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, extend="max" if np.nanmax(share) > top else "neither", pad=0.02)
    bar.set_label("selections, relative to an even share", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


# ---- parts ----


def _draw_panel(axes: Axes, panel: Panel, metric: Metric, evictions: Sequence[str], styles: Styles) -> None:
    for line in panel.lines:
        colour, marker = styles[_name(line)]
        rank = evictions.index(line.eviction)
        label = _name(line, parameter=True)
        x, y, errors = _coordinates(line)
        drawn = axes.errorbar(
            x, y, yerr=errors, color=colour, marker=marker, ls=DASHES[rank % len(DASHES)], lw=1.2, ms=4.5,
            elinewidth=0.7, mfc=colour if rank == 0 else "white", mew=0.8, label=label, zorder=3,
        )  # fmt: skip
        for bars in drawn[2]:
            bars.set_alpha(0.45)  # where intervals are wide, the lines must still be seen
    for line in panel.exact:
        x, y, errors = _coordinates(line)
        on_edge = metric.name == "kl"  # 0, which a logarithmic axis does not have
        rank = evictions.index(line.eviction)
        label = "exact" if len(evictions) > 1 else f"exact + {line.eviction}"
        axes.errorbar(
            x, [0.0] if on_edge else y, yerr=None if on_edge else errors, color=BLACK, marker="*", ms=10, ls="",
            zorder=4, mfc=BLACK if rank == 0 else "white", elinewidth=0.7, clip_on=False, label=label,
            transform=axes.get_xaxis_transform() if on_edge else axes.transData,
        )  # fmt: skip
    if panel.belady is not None:
        label = "Belady, original routes"
        axes.axvline(100 * panel.belady, color=GREY, lw=1.1, ls=(0, (6, 2, 1, 2)), label=label, zorder=1)
    if metric.name == "perplexity":
        axes.axhline(1 + GUIDE, color=GREY, lw=0.8, ls=":", label="1 % above exact", zorder=1)
    _set_limits(axes, panel, metric)


def _set_limits(axes: Axes, panel: Panel, metric: Metric) -> None:
    """Show the region where a user would choose; a note counts the points of lines that leave it."""
    points = [p for line in panel.lines for p in line.points]
    every = points + [p for line in panel.exact for p in line.points]
    axes.set_xlim(0, 106 * max(p.miss_rate for p in every) or 1.0)
    quality = np.array([p.quality for p in every])
    if metric.name == "kl":
        positive = quality[quality > 0]
        _use_log_scale(axes)
        if len(positive):
            axes.set_ylim(positive.min() / 1.6, positive.max() * 1.6)
        return
    if metric.name != "perplexity":
        return
    # Up to the 5 % that the paper's author calls useful, and further where hardly any point is below.
    top = min(float(quality.max()), max(1.05, 1 + 2 * (float(np.quantile(quality, 0.25)) - 1)))
    bottom = min(1.0, float(quality.min()))
    room = 0.06 * max(top - bottom, 2 * GUIDE)
    axes.set_ylim(bottom - room, max(top, 1 + 1.6 * GUIDE) + room)
    axes.yaxis.set_major_formatter(_ratio_text)
    above = int((quality > axes.get_ylim()[1]).sum())
    if above:
        note = f"{above} point{'s' if above > 1 else ''} above"
        axes.text(0.99, 0.985, f"↑ {note}", transform=axes.transAxes, ha="right", va="top", fontsize=6.5, color=GREY)


def _use_log_scale(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten, for figures often span less than one power."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_points(axes: Axes, panel: Panel, metric: Metric, styles: Styles) -> None:
    lines = []
    for line in panel.lines:
        x, y, _ = _coordinates(line)
        labels = tuple("" if p.value is None else f"{p.value:g}" for p in line.points)
        lines.append(LabelledLine(x, y, labels, styles[_name(line)][0]))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    clear_of = [np.array([[left, 1 + GUIDE], [right, 1 + GUIDE]])] if metric.name == "perplexity" else []
    if panel.belady is not None:
        clear_of.append(np.array([[100 * panel.belady, bottom], [100 * panel.belady, top]]))
    for line in panel.exact:  # the star is wider than a point
        x, y, _ = _coordinates(line)
        clear_of.append(np.column_stack([x + 0.015 * (right - left) * np.array([-1, 1]), [max(bottom, *y)] * 2]))
        if metric.name != "kl":
            clear_of.append(np.column_stack([[x[0]] * 2, y + 0.02 * (top - bottom) * np.array([-1, 1])]))
    place_labels(axes, lines, clear_of)


def _draw_lives(axes: Axes, line: Line, row: int, style: tuple[str, str], metric: Metric) -> None:
    colour, marker = style
    known = [(p.lifetime, p) for p in line.points if p.lifetime]
    lives = [x for x, _ in known]
    axes.plot([min(lives), max(lives)], [row, row], color=colour, lw=1.0, zorder=2)
    for life, p in known:
        small = metric.name != "perplexity" or p.quality <= 1 + GUIDE
        axes.plot([life], [row], marker=marker, color=colour, mfc=colour if small else "white", ms=5.5, zorder=3)
    longest = max(known, key=lambda x: x[0])[1]
    if longest.value is not None and longest.lifetime is not None:
        axes.annotate(
            f"{longest.value:g}", (longest.lifetime, row), (6, 0), textcoords="offset points", va="center",
            fontsize=6.5, color=colour,
        )  # fmt: skip


def _coordinates(line: Line) -> tuple[Any, Any, Any]:
    """x [n] in %, y [n], and the lengths of the error bars [2, n] or None."""
    x = np.array([100 * p.miss_rate for p in line.points])
    y = np.array([p.quality for p in line.points])
    if any(p.low is None or p.high is None for p in line.points):
        return x, y, None
    bounds = np.array([[p.low for p in line.points], [p.high for p in line.points]], dtype=np.float64)
    return x, y, np.maximum(0, np.abs(bounds - y))


def _styles(shown: Sequence[Panel]) -> Styles:
    """Colour and marker of each line by its name; variants of a strategy have its colour and a marker of their own."""
    styles: Styles = {}
    taken: dict[str, int] = {}  # strategy -> its lines so far
    for line in (line for panel in shown for line in panel.lines):
        if _name(line) in styles:
            continue
        variant = taken[line.strategy] = taken.get(line.strategy, -1) + 1
        unknown = [s for s in taken if s not in STYLES]
        known = line.strategy in STYLES
        style = STYLES[line.strategy] if known else SPARE_STYLES[unknown.index(line.strategy) % len(SPARE_STYLES)]
        marker = style[1] if variant == 0 else SPARE_MARKERS[(variant - 1) % len(SPARE_MARKERS)]
        styles[_name(line)] = style[0], marker
    return styles


def _evictions(shown: Sequence[Panel]) -> list[str]:
    """Policies in the order in which lines are told apart: LRU, the paper's, first."""
    found = {line.eviction for panel in shown for line in (*panel.exact, *panel.lines)}
    return sorted(found, key=lambda e: (e != "lru", e))


def _name(line: Line, *, parameter: bool = False) -> str:
    inside = [line.parameter] if parameter and line.parameter is not None and len(line.points) > 1 else []
    inside += [f"{key}={value:g}" for key, value in line.fixed]
    name = "exact" if line.strategy == "original" else line.strategy
    return f"{name} ({', '.join(inside)})" if inside else name


def _ratio_text(value: float, _position: float) -> str:
    return f"{value:.3f}".rstrip("0").ljust(4, "0")

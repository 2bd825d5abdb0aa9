"""Small labels beside the points of a plot, where they hide neither each other nor a line; else left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]
SIZE = 6.5  # of the letters, in points
GAP = 4.5  # between a point and its label, in points
STEP = 2.0  # between the samples of a line, in pixels
# Directions in which a label may lie from its point, best first.
DIRECTIONS = ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class LabelledLine:
    """A line to keep clear of. x, y: [points] in data units; labels: one text per point."""

    x: Array
    y: Array
    labels: tuple[str, ...]
    colour: str


def place_labels(axes: Axes, lines: Sequence[LabelledLine], clear_of: Sequence[Array] = (), *, most: int = 3) -> int:
    """Write at most `most` labels per line into `axes`, whose figure has been drawn once; returns how many fitted.

    clear_of: further polylines [n, 2] in data units that no label may hide.
    """
    pixel = axes.figure.dpi / 72  # per point
    frame = axes.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1])
    paths = [axes.transData.transform(np.column_stack([line.x, line.y])) for line in lines]
    drawn = [*paths, *(axes.transData.transform(line) for line in clear_of)]
    obstacles = np.concatenate([np.zeros((0, 2)), *(_samples(path) for path in drawn)])
    boxes: list[Array] = []
    for line, path, index in _by_importance(lines, paths, most):
        width, height = 0.62 * SIZE * pixel * len(line.labels[index]), SIZE * pixel
        for across, up in DIRECTIONS:
            centre = path[index] + np.array([across * (GAP * pixel + width / 2), up * (GAP * pixel + height / 2)])
            half = np.array([width / 2, height / 2])
            box = np.concatenate([centre - half, centre + half])
            if not _holds(inside, box) or _hits(box, obstacles, pixel) or any(_overlap(box, b, pixel) for b in boxes):
                continue
            boxes.append(box)
            axes.annotate(
                line.labels[index],
                tuple(axes.transData.inverted().transform(centre)),
                ha="center",
                va="center",
                fontsize=SIZE,
                color=line.colour,
                annotation_clip=True,
            ).set_in_layout(False)
            break
    return len(boxes)


def _by_importance(
    lines: Sequence[LabelledLine], paths: Sequence[Array], most: int
) -> list[tuple[LabelledLine, Array, int]]:
    """Ends of all lines first, then one point in between of each."""
    order: list[tuple[LabelledLine, Array, int]] = []
    for rank in range(most):
        for line, path in zip(lines, paths, strict=True):
            n = len(line.labels)
            index = (n - 1, 0, n // 2)[rank] if rank < 3 else None
            if index is not None and not any(line is x and index == i for x, _, i in order):
                order.append((line, path, index))
    return order


def _samples(path: Array) -> Array:
    """Points at most STEP pixels apart along a polyline [n, 2]."""
    pieces = [path]
    for start, end in pairwise(path):
        if np.isfinite([*start, *end]).all():
            n = int(min(2000, np.hypot(*(end - start)) / STEP)) + 1
            pieces.append(start + (end - start) * np.linspace(0, 1, n)[:, None])
    return np.concatenate(pieces)


def _hits(box: Array, points: Array, margin: float) -> bool:
    x, y = points[:, 0], points[:, 1]
    return bool(np.any((x > box[0] - margin) & (x < box[2] + margin) & (y > box[1] - margin) & (y < box[3] + margin)))


def _overlap(a: Array, b: Array, margin: float) -> bool:
    return bool(a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin)


def _holds(outer: Array, box: Array) -> bool:
    return bool(outer[0] < box[0] and outer[1] < box[1] and box[2] < outer[2] and box[3] < outer[3])

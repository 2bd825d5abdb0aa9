"""The file format of traces: header and frames. See trace.py for what they mean and who writes and reads them.

Little endian: "MOETRACE", version u32, header length u32, header as JSON; then frames, each with a checksum. A frame is
one call of one MoE layer, or the beginning of a sequence. Expert numbers are u16, best score first. Scores of all
experts are float32 up to 64 experts, which ranks bit-equally, and float16 above (512 bytes per token and layer of 256
experts). Router probabilities are there only where softmax of the scores does not give them.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

MAGIC, VERSION = b"MOETRACE", 1
MOST_ROWS = 2**20  # of a call; more is damage
NOBODY = 0xFFFF  # where fewer experts ran than in other rows
FLOAT32_EXPERTS = 64  # up to here scores are stored in float32

PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the header
FRAME = struct.Struct("<BBHIHI")  # kind, flags, layer, rows, experts used per row, checksum
CALL, SEQUENCE = 1, 2
DECODE, STEPS, SCORES, PROBABILITIES, COLD = 1, 2, 4, 8, 16

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TracedLayer:
    """One MoE layer of the traced model, and the slots that it had."""

    experts: int  # E
    k: int
    bytes_per_expert: int
    slots: int
    ranked: int  # experts among which the router selects: E, or more where those from E on compute nothing


@dataclass(frozen=True)
class TraceHeader:
    """Where a trace comes from. Equal headers may share one file."""

    model: str
    model_type: str
    config_sha256: str
    layers: tuple[TracedLayer, ...]
    routing: str  # spec of the run, such as "original"
    eviction: str

    @classmethod
    def of(cls, folder: Path, layers: Sequence[TracedLayer], *, model: str, routing: str, eviction: str) -> TraceHeader:
        """The header for the model in `folder`, whose config.json identifies it; `model` is the name to show."""
        config = (folder / "config.json").read_bytes()
        model_type = str(json.loads(config).get("model_type"))
        digest = hashlib.sha256(config).hexdigest()
        return cls(model, model_type, digest, tuple(layers), routing, eviction)


class Frame(NamedTuple):
    kind: int
    flags: int
    layer: int
    rows: int
    width: int  # experts used per row
    parts: tuple[memoryview, ...]  # own, used, z, p as far as they are there
    end: int  # where the next frame begins


def read_header(path: Path, data: memoryview) -> tuple[TraceHeader, int]:
    """The header and where the frames begin. Raises UsageError."""
    if len(data) < PREFIX.size or bytes(data[:8]) != MAGIC:
        raise UsageError(f"{path} is not a trace; give a file that was recorded with --trace")
    _, version, length = PREFIX.unpack_from(data)
    if version != VERSION:
        raise UsageError(f"{path} is a trace of version {version}, and only version {VERSION} is read; record it again")
    end = PREFIX.size + length
    try:
        fields = json.loads(bytes(data[PREFIX.size : end]))
        fields["layers"] = tuple(TracedLayer(**x) for x in fields["layers"])
        return TraceHeader(**fields), end
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path} is a trace with a damaged header; record it again") from None


def read_frame(header: TraceHeader, data: memoryview, at: int) -> Frame | None:
    """The frame at `at`; None if there is no whole one."""
    if at + FRAME.size > len(data):
        return None
    kind, flags, layer, rows, width, check = FRAME.unpack_from(data, at)
    sizes = _sizes(header, kind, flags, layer, rows, width)
    if sizes is None:
        return None
    start = at + FRAME.size
    end = start + sum(sizes)
    if end > len(data) or zlib.crc32(data[start:end], zlib.crc32(data[at : start - 4])) != check:
        return None
    parts = []
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return Frame(kind, flags, layer, rows, width, tuple(parts), end)


def is_cut_off(header: TraceHeader, data: memoryview, at: int) -> bool:
    """True if what `read_frame` does not take at `at` is the beginning of one frame, as an ended writer leaves it."""
    if at + FRAME.size > len(data):
        return True
    sizes = _sizes(header, *FRAME.unpack_from(data, at)[:-1])
    return sizes is not None and at + FRAME.size + sum(sizes) > len(data)


def _sizes(header: TraceHeader, kind: int, flags: int, layer: int, rows: int, width: int) -> list[int] | None:
    """Bytes of the parts of a frame; None if there is no such frame."""
    if kind == SEQUENCE:
        return []
    if kind != CALL or layer >= len(header.layers):
        return None
    shape = header.layers[layer]
    if not 0 < rows <= MOST_ROWS or not 0 < width <= shape.k:
        return None
    scores = rows * shape.ranked * np.dtype(score_type(shape.ranked)).itemsize
    return [2 * rows * shape.k, 2 * rows * width] + [scores] * (bool(flags & SCORES) + bool(flags & PROBABILITIES))


def softmax(z: Floats) -> Floats:
    """[.., E] float32, 0 for experts that were ruled out."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    result: Floats = e / e.sum(axis=-1, keepdims=True)
    return result


def score_type(experts: int) -> type[np.floating]:
    return np.float32 if experts <= FLOAT32_EXPERTS else np.float16

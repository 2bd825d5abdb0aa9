"""Traces: which experts the routers chose, token by token, in an append-only file, so that caches can be replayed.

Recorded are, per call of an MoE layer, the router's own selection, the experts that ran, and the scores of all experts,
with which a simulator can rank again. Replaying the selections needs no scores. A file whose writer was cut off is read
up to the last whole call.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..observer import RoutedCall
from .trace_format import (
    CALL,
    COLD,
    DECODE,
    FRAME,
    MAGIC,
    NOBODY,
    PREFIX,
    PROBABILITIES,
    SCORES,
    SEQUENCE,
    STEPS,
    VERSION,
    Floats,
    Frame,
    Ids,
    TracedLayer,
    TraceHeader,
    is_cut_off,
    read_frame,
    read_header,
    score_type,
    softmax,
)

if TYPE_CHECKING:
    from ..expert_cache import ExpertCache


class TraceWriter:
    """Appends calls to a trace file; created if it is new, continued if its header is the same.

    A call that was cut off at the end of the file is dropped. Raises UsageError, before anything is written, if the
    file is something else, a trace of another run, or damaged.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path, self._header = path, header
        if path.exists() and path.stat().st_size:
            end = _end_of_continuable(path, header)
            self._file: IO[bytes] = path.open("r+b")
            self._file.truncate(end)  # a frame that was cut off would hide all that follow
            self._file.seek(end)
        else:
            text = json.dumps(asdict(header)).encode()
            self._file = path.open("wb")
            self._file.write(PREFIX.pack(MAGIC, VERSION, len(text)) + text)
        with self._named():
            self._file.flush()

    def begin_sequence(self, *, cold: bool = True) -> None:
        """Another sequence follows. cold: its caches were empty at the start."""
        self._write(FRAME.pack(SEQUENCE, COLD if cold else 0, 0, 0, 0, 0)[:-4], b"")
        with self._named():
            self._file.flush()

    def record(
        self,
        layer: int,
        phase: str,
        z: Floats | None,
        own: Ids,
        used: Ids,
        *,
        p: Floats | None = None,
        steps: bool = False,
    ) -> None:
        """One call of MoE layer number `layer` (in the header's order) with T tokens.

        z [T, ranked]: the scores by which the router ranks, -inf for experts that it ruled out; None if unknown.
        own [T, k]: the router's own selection. used [T, k']: the experts that ran, k' at most k; -1: none.
        p [T, ranked]: router probabilities, if softmax(z) does not give them.
        steps: the T tokens were routed one after the other, the cache changing in between, as in decoding; else they
        went through the layer together.
        """
        shape = self._header.layers[layer]
        rows, k = own.shape
        if (
            k != shape.k
            or len(used) != rows
            or used.shape[1] > k
            or (z is not None and z.shape != (rows, shape.ranked))
        ):
            raise ValueError(f"layer {layer} ranks {shape.ranked} experts and has k={shape.k}; own is {own.shape}")
        flags = (DECODE if phase == "decode" else 0) | (STEPS if steps else 0)
        parts = [_ids(own, z), _ids(used, z)]
        if z is not None:
            kind = score_type(shape.ranked)
            flags |= SCORES
            # A constant per row means nothing to a router; without it, 16 bits tell the best experts best apart.
            z = z - np.maximum(z.max(axis=-1, keepdims=True), np.finfo(np.float32).min) if kind == np.float16 else z
            parts.append(np.minimum(z, np.finfo(kind).max).astype(kind).tobytes())
            if p is not None and not np.allclose(p, softmax(z), atol=1e-5):
                flags |= PROBABILITIES
                parts.append(p.astype(kind).tobytes())
        self._write(FRAME.pack(CALL, flags, layer, rows, used.shape[1], 0)[:-4], b"".join(parts))

    def observe(self, call: RoutedCall) -> None:
        """Record a call of a running model: a writer is an observer (see ExpertCache.observed_by)."""
        self.record(call.layer, call.phase, call.z, call.own, call.used, p=call.p, steps=call.steps)

    def close(self) -> None:
        with self._named():
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, head: bytes, payload: bytes) -> None:
        with self._named():
            self._file.write(head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk is that of this file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


@dataclass(frozen=True)
class LayerTrace:
    """The calls of one MoE layer, T rows in all, in the order in which they ran."""

    number: int  # of the layer, in the header's order
    shape: TracedLayer
    own: npt.NDArray[np.int64]  # [T, k], best first
    used: npt.NDArray[np.int64]  # [T, k], best first; -1 where fewer ran
    calls: npt.NDArray[np.int64]  # [C + 1] first row of each call, and T
    decode: npt.NDArray[np.bool_]  # [C] the phase of each call
    sequences: tuple[tuple[int, bool], ...]  # (first call, whether the caches were empty there)
    _scores: tuple[tuple[memoryview, memoryview | None], ...] | None  # z and p per frame; None: not recorded

    @property
    def tokens(self) -> int:
        return len(self.own)

    @property
    def is_original(self) -> bool:
        """True if every token ran the router's own selection."""
        return bool((np.sort(self.own) == np.sort(self.used)).all())

    def scores(self) -> tuple[Floats, Floats]:
        """z and p [T, ranked]. Raises UsageError if the run could not see them."""
        if self._scores is None:
            raise UsageError(
                f"MoE layer {self.number} of this trace has no router scores (its router could not be observed), so "
                "only original routing can be replayed"
            )
        kind, parts = score_type(self.shape.ranked), []
        for scores, probabilities in self._scores:
            z = np.frombuffer(scores, kind).reshape(-1, self.shape.ranked).astype(np.float32)
            p = softmax(z)
            if probabilities is not None:
                p = np.frombuffer(probabilities, kind).reshape(z.shape).astype(np.float32)
            parts.append((z, p))
        z, p = (np.concatenate(x) for x in zip(*parts, strict=True))
        # Rounding to float16 makes ties; the router's own selection says who had won.
        outside = z.copy()
        np.put_along_axis(outside, self.own, -np.inf, axis=-1)
        least = np.nextafter(outside.max(axis=-1, keepdims=True), np.float32(np.inf))
        chosen = np.take_along_axis(z, self.own, axis=-1)
        np.put_along_axis(z, self.own, np.maximum(chosen, least), axis=-1)
        return z, p


@dataclass(frozen=True)
class Trace:
    """A trace file, read; only layers that recorded something are in it. `note` says what was dropped, if anything."""

    path: Path
    header: TraceHeader
    layers: tuple[LayerTrace, ...]
    note: str | None

    @property
    def is_original(self) -> bool:
        """True if routing changed nothing, so that a cache of another size would have seen the same trace."""
        return all(x.is_original for x in self.layers)


def read_trace(path: Path) -> Trace:
    """Read a trace file. Raises UsageError if it is none, is of another version or holds no routing."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    header, at = read_header(path, data)
    builders = [_Builder(i, shape) for i, shape in enumerate(header.layers)]
    while (frame := read_frame(header, data, at)) is not None:
        if frame.kind == SEQUENCE:
            for b in builders:
                b.begin(bool(frame.flags & COLD))
        else:
            builders[frame.layer].add(frame)
        at = frame.end
    layers = tuple(b.build() for b in builders if b.rows)
    if not layers:
        raise UsageError(
            f"{path} holds no routing: the run that recorded it ended before its first token; run it again"
        )
    why = "they are not whole, as after an interruption"
    if not is_cut_off(header, data, at):
        why = f"the file is damaged at byte {at:,}"
    note = f"left out the last {size - at:,} bytes of {path}: {why}"
    return Trace(path, header, layers, note if at < size else None)


class _Builder:
    """Collects the frames of one layer."""

    def __init__(self, number: int, shape: TracedLayer) -> None:
        self.number, self.shape, self.rows = number, shape, 0
        self._own: list[memoryview] = []
        self._used: list[tuple[int, memoryview]] = []  # width, ids
        self._scores: list[tuple[memoryview, memoryview | None]] = []
        self._calls = [0]
        self._decode: list[bool] = []
        self._sequences = [(0, True)]

    def begin(self, cold: bool) -> None:
        here = len(self._decode)
        if self._sequences[-1][0] == here:  # the last one stayed empty
            cold |= self._sequences.pop()[1]
        self._sequences.append((here, cold))

    def add(self, frame: Frame) -> None:
        each = 1 if frame.flags & STEPS else frame.rows
        for _ in range(frame.rows // each):
            self.rows += each
            self._calls.append(self.rows)
            self._decode.append(bool(frame.flags & DECODE))
        own, used, *scores = frame.parts
        self._own.append(own)
        self._used.append((frame.width, used))
        if scores:
            self._scores.append((scores[0], scores[1] if len(scores) > 1 else None))

    def build(self) -> LayerTrace:
        k = self.shape.k
        used = np.full((self.rows, k), -1)
        if all(width == k for width, _ in self._used):
            used[:] = _unpack([ids for _, ids in self._used], k)
        else:
            row = 0
            for width, ids in self._used:
                part = _unpack([ids], width)
                used[row : row + len(part), :width] = part
                row += len(part)
        used[used == NOBODY] = -1
        return LayerTrace(
            self.number,
            self.shape,
            _unpack(self._own, k),
            used,
            np.array(self._calls),
            np.array(self._decode),
            tuple(s for s in self._sequences if s[0] < len(self._decode)),  # not one that ended before its first call
            tuple(self._scores) if len(self._scores) == len(self._own) else None,
        )


def describe_run(folder: Path, name: str, cache: ExpertCache) -> TraceHeader:
    """The header for a run of the model in `folder`, shown as `name`, with its cache as it is now."""
    layers = [
        TracedLayer(
            x.num_experts,
            x.k,
            x.bytes_per_expert,
            x.residents.capacity,
            x.num_experts if x.seam is None else x.seam.ranked,
        )
        for x in cache.layers
    ]
    eviction = cache.layers[0].residents.eviction
    return TraceHeader.of(folder, layers, model=name, routing=cache.strategy.spec, eviction=eviction)


def _end_of_continuable(path: Path, header: TraceHeader) -> int:
    """Where to go on writing in an existing trace. Raises UsageError if it is not one of the same run."""
    data = memoryview(path.read_bytes())
    there, at = read_header(path, data)
    for name, value in asdict(header).items():
        if asdict(there)[name] != value:
            raise UsageError(
                f"{path} is the trace of another run ({name.replace('_', ' ')} differs); choose a new file name"
            )
    while (frame := read_frame(there, data, at)) is not None:
        at = frame.end
    if not is_cut_off(there, data, at):
        raise UsageError(
            f"{path} is damaged at byte {at:,}; going on there would lose the {len(data) - at:,} bytes that follow, so "
            "choose a new file name"
        )
    return at


def _unpack(parts: Sequence[memoryview], width: int) -> npt.NDArray[np.int64]:
    return np.frombuffer(b"".join(parts), "<u2").reshape(-1, width).astype(np.int64)


def _ids(ids: Ids, z: Floats | None) -> bytes:
    """u16 [T, k], the highest score first (equal scores: lower number), the order in which a cache is touched."""
    if z is not None:
        scores = np.where(ids < 0, -np.inf, np.take_along_axis(z, ids.astype(np.int64), axis=-1))
        ids = np.take_along_axis(ids, np.lexsort((ids, -scores), axis=-1), axis=-1)
    return np.where(ids < 0, NOBODY, ids).astype("<u2").tobytes()

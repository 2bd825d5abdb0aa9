"""Deciding what an expert-major copy of a checkpoint consists of: its files, their tensors, where the bytes come from.

Works on the header index of the original; the format is that of expert_major.py, repacking.py writes it.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from ..errors import UsageError
from .checkpoint import DTYPES, CheckpointIndex, TensorRecord
from .expert_layout import ComponentSpec, LayerExtents
from .expert_major import ALIGNMENT, FORMAT, VERSION, FileRecord, Manifest, read_manifest

SHARD_BYTES = 4_000_000_000
SHARD_TENSORS = 100_000  # keeps headers far below the format's limit of 100 MB
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each of the original's files, for its fingerprint


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer of the original: module path of its switch, tensors of one expert, and where they lie."""

    path: str
    components: Sequence[ComponentSpec]
    extents: LayerExtents


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written: `nbytes` from `offset` in the original's shard; no shard: zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file to be written: its tensors in file order."""

    name: str
    metadata: dict[str, str]
    entries: Sequence[Entry]

    @cached_property
    def header(self) -> bytes:
        """Everything before the tensor data, which begin at a multiple of ALIGNMENT."""
        header: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        for e in self.entries:
            begin, end = end, end + e.nbytes
            header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
        return len(raw).to_bytes(8, "little") + raw

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(e.nbytes for e in self.entries)


@dataclass(frozen=True)
class RepackPlan:
    """All safetensors files of the copy, and what the manifest says before any is written."""

    index: CheckpointIndex
    resident: Sequence[FilePlan]
    experts: Sequence[FilePlan]
    manifest: Manifest

    @property
    def files(self) -> list[FilePlan]:
        return [*self.resident, *self.experts]


def plan_repack(
    index: CheckpointIndex, layers: Sequence[ExpertLayer], source: str, *, shard_bytes: int = SHARD_BYTES
) -> RepackPlan:
    """Decide what goes into which file. `source` is what the original is called in the manifest.

    A file gets at most `shard_bytes` of tensors, more only if one tensor or expert is larger. Raises UsageError if the
    model is such a copy already, OSError when a shard cannot be read.
    """
    if read_manifest(index.folder) is not None:
        raise UsageError(f"{index.folder}: is a repacked copy already; use it as it is, or give the original")
    records = sorted((r for r in index.tensors.values() if r.nbytes), key=lambda r: (r.shard, r.offset))
    starts = [(r.shard, r.offset) for r in records]

    def record_at(shard: int, offset: int) -> TensorRecord:
        return records[bisect.bisect_right(starts, (shard, offset)) - 1]

    covered: dict[str, int] = {}
    experts: list[list[Entry]] = []
    for layer in layers:
        x = layer.extents
        for e in range(len(x.offsets[0])):
            entries = []
            for i, c in enumerate(layer.components):
                shard, offset = x.shards[i][e], x.offsets[i][e]
                record = record_at(shard, offset)
                covered[record.name] = covered.get(record.name, 0) + c.nbytes
                dtype = _stored_dtype(record, c)
                entries.append(Entry(f"{layer.path}.{e}.{c.name}", dtype, c.shape, c.nbytes, shard, offset))
            experts.append(_aligned(entries))
    # A tensor that holds something else too, such as a shared expert behind the others, stays a resident one as well.
    moved = {name: r for name, nbytes in covered.items() if nbytes == (r := index.tensors[name]).nbytes}
    kept = sorted((r for r in index.tensors.values() if r.name not in moved), key=lambda r: (r.shard, r.offset))
    resident = [[Entry(r.name, r.dtype, r.shape, r.nbytes, r.shard, r.offset)] for r in kept]
    resident_files = _pack("model", resident, {"format": "mlx"}, shard_bytes)
    expert_files = _pack("experts", experts, {"format": FORMAT, "version": str(VERSION)}, shard_bytes)
    manifest = Manifest(
        source,
        _fingerprint(index),
        {name: (r.dtype, r.shape) for name, r in moved.items()},
        {f.name: FileRecord(f.nbytes) for f in (*resident_files, *expert_files)},
    )
    return RepackPlan(index, resident_files, expert_files, manifest)


def _stored_dtype(record: TensorRecord, component: ComponentSpec) -> str:
    """The safetensors dtype of a component: the original's, unless the model sees the same bytes as another."""
    if DTYPES[record.dtype][1] == component.dtype:
        return record.dtype
    return next(name for name, (_, mlx_name) in DTYPES.items() if mlx_name == component.dtype)


def _aligned(entries: Sequence[Entry]) -> list[Entry]:
    """The same tensors with wide elements first: laid out without gaps, each is then aligned to its elements."""
    return sorted(entries, key=lambda entry: -DTYPES[entry.dtype][0])


def _pack(
    kind: str, groups: Iterable[Sequence[Entry]], metadata: dict[str, str], shard_bytes: int
) -> Sequence[FilePlan]:
    """Put groups of tensors (an expert, or one resident tensor) into files, experts padded to whole blocks."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(e.nbytes for e in group)
        padding = -nbytes % ALIGNMENT if kind == "experts" else 0
        full = size + nbytes + padding > shard_bytes or len(parts[-1]) + len(group) + 1 > SHARD_TENSORS
        if parts[-1] and full:
            parts.append([])
            size = 0
        parts[-1] += group
        if padding:
            parts[-1].append(Entry(f"padding.{len(parts)}.{len(parts[-1])}", "U8", (padding,), padding))
        size += nbytes + padding
    if kind == "model":
        parts = [_aligned(part) for part in parts]
        if len(parts) == 1:
            return [FilePlan("model.safetensors", metadata, parts[0])]
    return [
        FilePlan(f"{kind}-{i:05d}-of-{len(parts):05d}.safetensors", metadata, part) for i, part in enumerate(parts, 1)
    ]


def _fingerprint(index: CheckpointIndex) -> str:
    """SHA-256 over config, names, sizes, headers and samples of the content: tells models apart without reading all."""
    digest = hashlib.sha256()
    with suppress(FileNotFoundError):
        digest.update((index.folder / "config.json").read_bytes())
    for path in index.shards:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            for i in range(SAMPLES):
                file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

"""The tensors of a safetensors checkpoint and where their bytes lie: the headers of its files, checked.

mlx-lm never reads the shard index, so it is looked at only to explain what is missing. Knows nothing about experts,
arrays, memory or policies. Offsets are absolute byte offsets in a shard, sizes are bytes.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlx_moecache.checkpoints.expert_major import expert_shard_names
from mlx_moecache.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SHARD_PATTERN = "model*.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LFS_PREFIX = b"version https://git-lfs"
_LENGTH_BYTES = 8

# safetensors dtype -> (bits of one element, dtype of the array that mlx makes of it, None if mlx refuses it)
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "uint8"),
    "F8_E8M0": (8, "uint8"),
    "F64": (64, None),
    "F8_E5M2": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor: `nbytes` bytes from `offset` in shard number `shard`; `dtype` is the safetensors name."""

    name: str
    shard: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder by name; `shards` are the files that `TensorRecord.shard` counts."""

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, TensorRecord]


def read_index(folder: Path) -> CheckpointIndex:
    """Read the headers of every shard that mlx-lm would load from `folder`, and check them.

    The expert shards of a repacked folder (expert_major.py) come after them.

    Raises CheckpointError when there is no shard, or one is unreadable, truncated, or contradicts its header.
    """
    try:
        entries = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot list this folder ({error.strerror}); give the folder that holds the model"
        ) from error
    expert_names = expert_shard_names(folder, entries)
    # mlx-lm loads every file of this pattern whatever the index says, so all of them count here too.
    names = sorted(fnmatch.filter(entries, SHARD_PATTERN))
    if not names:
        none = CheckpointError(
            f"{folder}: no {SHARD_PATTERN} here, and only such files are loaded; download the model again or "
            "give the folder that holds its safetensors files"
        )
        raise explain_missing(CheckpointIndex(folder, (), {}), none)

    names += expert_names
    shards = tuple(folder / name for name in names)
    tensors: dict[str, TensorRecord] = {}
    for number, path in enumerate(shards):
        for record in _read_shard(path, number):
            earlier = tensors.setdefault(record.name, record)
            if earlier is not record:
                raise CheckpointError(
                    f"{path}: tensor {record.name!r} is also in {shards[earlier.shard].name}, and both files "
                    "would be loaded; remove the one that is left over from another download or conversion"
                )
    if not tensors:
        raise CheckpointError(f"{folder}: its safetensors files hold no tensors; download the model again")
    return CheckpointIndex(folder, shards, tensors)


def explain_missing(index: CheckpointIndex, error: CheckpointError) -> CheckpointError:
    """`error`, which says that a model cannot be built, with what the index file knows of tensors that are in no file.

    An index may be older than its shards, or name files that mlx-lm does not load, so it counts only after an error.
    Nothing that it names is opened.
    """
    path = index.folder / INDEX_NAME
    if not os.path.lexists(path):
        return error
    try:
        weight_map = _read_weight_map(path)
    except CheckpointError as wrong:
        return CheckpointError(f"{error}; {wrong}")
    lost = [(name, shard) for name, shard in weight_map.items() if name not in index.tensors]
    if not lost:
        return error
    present = {shard.name for shard in index.shards}
    for name, shard in lost:
        if _is_shard_name(shard) and shard not in present:  # a download that did not end: the likeliest reason
            return CheckpointError(f"{_whereabouts(path, name, shard, present)} ({error})")
    return CheckpointError(f"{error}; {_whereabouts(Path(INDEX_NAME), *lost[0], present)}")


def _read_weight_map(path: Path) -> dict[str, str]:
    """The tensor -> shard map of the index file; the names are whatever it says."""
    index = _parse_object(_read_range(path, 0, _file_size(path)), f"{path}: the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' with tensors; download the model again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} has {reprlib.repr(shard)} as its shard, not a file name; "
                "download the model again"
            )
    return weight_map


def _is_shard_name(name: str) -> bool:
    """True if mlx-lm would load a file of this name beside the index."""
    return "/" not in name and fnmatch.fnmatchcase(name, SHARD_PATTERN)


def _whereabouts(path: Path, tensor: str, shard: str, present: Container[str]) -> str:
    """What the index file `path` says of `tensor`, which is in no file, and what is wrong with the `shard` it names."""
    if shard in present:
        return f"{path}: tensor {tensor!r} should be in {shard} but is in no file; download the model again"
    where = f"{path}: tensor {tensor!r} is said to be in {shard!r}"
    pure = PurePosixPath(shard)
    if pure.is_absolute() or ".." in pure.parts:
        return (
            f"{where}, which leaves the model's folder; shards must be {SHARD_PATTERN} beside the index, "
            "so download the model again from a source you trust"
        )
    if not _is_shard_name(shard):
        return (
            f"{where}, which mlx-lm would not find: it loads only {SHARD_PATTERN} beside the index; "
            "choose a copy of the model whose shards are called like that"
        )
    return f"{where}, but that file is missing; download the model again"


def _read_shard(path: Path, shard: int) -> list[TensorRecord]:
    """All tensors of one safetensors file, checked against each other and against the size of the file."""
    size = _file_size(path)
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{path}: is only {size} bytes long; download this file again")
    length = int.from_bytes(_read_range(path, 0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: claims a header of {length} bytes (at most {MAX_HEADER_BYTES} are allowed), so this is "
            "no safetensors file; download this file again"
        )
    start = _LENGTH_BYTES + length
    if start > size:
        raise CheckpointError(
            f"{path}: truncated, at least {start - size} bytes are missing (it ends inside its header); "
            "download this file again"
        )
    header = _parse_object(_read_range(path, _LENGTH_BYTES, length), f"{path}: the header")
    header.pop("__metadata__", None)
    records = [_tensor_record(path, shard, start, name, entry) for name, entry in header.items()]

    by_offset = sorted((r for r in records if r.nbytes > 0), key=lambda r: r.offset)
    for before, after in itertools.pairwise(by_offset):
        if after.offset < before.offset + before.nbytes:
            raise CheckpointError(
                f"{path}: tensors {before.name!r} and {after.name!r} overlap; download this file again"
            )
    last = max(records, key=lambda r: r.offset + r.nbytes, default=None)
    if last is not None and last.offset + last.nbytes > size:
        missing = last.offset + last.nbytes - size
        raise CheckpointError(
            f"{path}: truncated, {missing} bytes are missing (tensor {last.name!r} ends at byte "
            f"{last.offset + last.nbytes}, the file at {size}); download this file again"
        )
    return records


def _tensor_record(path: Path, shard: int, start: int, name: str, entry: object) -> TensorRecord:
    """One header entry as a record; `start` is where the tensor data of the file begins."""

    def wrong(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} has {problem}; download this file again")

    if not isinstance(entry, dict):
        raise wrong(f"the entry {reprlib.repr(entry)}, not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"the unknown dtype {reprlib.repr(dtype)} (known: {', '.join(DTYPES)})")
    # type() and not isinstance(): JSON's true is an int to Python.
    if not isinstance(shape, list) or any(type(axis) is not int or axis < 0 for axis in shape):
        raise wrong(f"the shape {reprlib.repr(shape)}, not a list of non-negative integers")
    if not isinstance(span, list) or len(span) != 2 or any(type(offset) is not int for offset in span):
        raise wrong(f"the data_offsets {reprlib.repr(span)}, not two integers")
    begin, end = span
    if not 0 <= begin <= end < 2**63:
        raise wrong(f"the data_offsets {reprlib.repr(span)}, which must rise from 0 or more")
    if math.prod(shape) * DTYPES[dtype][0] != 8 * (end - begin):
        raise wrong(f"{end - begin} bytes, which is not the size of {dtype} {reprlib.repr(shape)}")
    return TensorRecord(name, shard, start + begin, end - begin, dtype, tuple(shape))


def _parse_object(raw: bytes, what: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        built = dict(pairs)
        if len(built) != len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} appears twice")
        return built

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object; download this file again")
    return value


def _file_size(path: Path) -> int:
    """Size in bytes of a regular file that is not a git-lfs pointer."""
    try:
        info = os.stat(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: links to a file that is gone; download the model again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; download the model again")
    if _read_range(path, 0, min(info.st_size, len(_LFS_PREFIX))) == _LFS_PREFIX:
        raise CheckpointError(
            f"{path}: is a git-lfs pointer, not the file itself; run 'git lfs pull' in the model's folder, "
            "or download the model again"
        )
    return info.st_size


def _read_range(path: Path, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) != length:
        raise CheckpointError(f"{path}: became shorter while it was read; wait until its download has ended")
    return data


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk")

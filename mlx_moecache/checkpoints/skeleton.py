"""Checkpoints without weights: real config files, and shards that are a header and a hole.

mlx-lm builds a model from headers alone as long as nothing is evaluated, so a skeleton answers every question about
sizes and places. A hole takes no space on disk (APFS, ext4, XFS, Btrfs, tmpfs) and reads as zeros.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import DTYPES, SHARD_PATTERN
from .hub import EXPERT_SHARDS

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)

_ALIGNMENT = 8  # bytes: tensor data begin at such a multiple, as the format wants


def write_sparse(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file of `tensors`, one behind the other in the order given, whose data are a hole.

    Raises CheckpointError for a dtype that safetensors does not have, OSError if the file system refuses the size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _bytes_of(path, name, dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


@contextmanager
def skeleton(files: Iterable[Path], shards: Mapping[str, Tensors]) -> Iterator[Path]:
    """A temporary model folder: copies of `files`, and for each of `shards` (by file name) a sparse file.

    The folder is gone when the block ends; models that were opened lazily from it keep their files open.
    Raises CheckpointError for a name that no shard may have.
    """
    with tempfile.TemporaryDirectory(prefix="mlx_moecache-") as name:
        folder = Path(name)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        for shard, tensors in shards.items():
            if "/" in shard or not any(fnmatch.fnmatchcase(shard, p) for p in (SHARD_PATTERN, EXPERT_SHARDS)):
                raise CheckpointError(f"{shard!r} is no name of a shard ({SHARD_PATTERN}); choose another model")
            write_sparse(folder / shard, tensors)
        yield folder


def _bytes_of(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8:
        raise CheckpointError(f"{path}: tensor {name!r} ({dtype} {list(shape)}) does not fill whole bytes")
    return bits // 8

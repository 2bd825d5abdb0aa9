"""Which byte range of which shard holds each tensor of each expert: stacked and per-expert layouts.

Works on the header index only; knows nothing about arrays, memory or policies.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_moecache.checkpoint import DTYPES, CheckpointIndex, TensorRecord
from mlx_moecache.errors import CheckpointError, UnsupportedModelError

_ITEM_BYTES = {mlx_name: bits // 8 for bits, mlx_name in DTYPES.values() if mlx_name is not None}

# Names under which per-expert checkpoints keep a projection of the switch, in the order tried.
_PER_EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    "gate_proj": ("gate_proj", "w1"),
    "down_proj": ("down_proj", "w2"),
    "up_proj": ("up_proj", "w3"),
}


@dataclass(frozen=True)
class ComponentSpec:
    """One tensor of a switch ("gate_proj.weight", ...): mlx dtype name, and the shape of ONE expert."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's part. Raises UnsupportedModelError for a dtype that no shard can hold."""
        if self.dtype not in _ITEM_BYTES:
            raise UnsupportedModelError(
                f"{self.name} has dtype {self.dtype}, but experts can only be read as "
                f"{', '.join(_ITEM_BYTES)}; convert the model to one of these"
            )
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerExtents:
    """Byte ranges of one layer's experts: `nbytes[component]`, `shards` and `offsets`[component][expert]."""

    nbytes: tuple[int, ...]
    shards: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of all components of one expert."""
        return sum(self.nbytes)


def locate_experts(
    index: CheckpointIndex, switch_path: str, components: Sequence[ComponentSpec], num_experts: int
) -> LayerExtents:
    """Find every expert of the switch at module path `switch_path`, per component.

    Stacked tensors `{switch_path}.{component}` (E, *shape) come first; then one tensor per expert,
    `{block}.experts.{e}.{gate,up,down}_proj.*` or `w1`, `w3`, `w2`, where block is the switch's parent.

    Raises CheckpointError when some experts are absent; UnsupportedModelError when dtypes or shapes differ
    from `components`, or the layout does not keep each expert's bytes together.
    """
    shards: list[tuple[int, ...]] = []
    offsets: list[tuple[int, ...]] = []
    for component in components:
        stacked = index.tensors.get(f"{switch_path}.{component.name}")
        if stacked is not None:
            _check_tensor(index, stacked, component.dtype, (num_experts, *component.shape))
            step = component.nbytes
            shards.append((stacked.shard,) * num_experts)
            offsets.append(tuple(stacked.offset + expert * step for expert in range(num_experts)))
            continue
        records = _find_per_expert(index, switch_path, component, num_experts)
        for record in records:
            _check_tensor(index, record, component.dtype, component.shape)
        shards.append(tuple(record.shard for record in records))
        offsets.append(tuple(record.offset for record in records))
    return LayerExtents(tuple(component.nbytes for component in components), tuple(shards), tuple(offsets))


def _find_per_expert(
    index: CheckpointIndex, switch_path: str, component: ComponentSpec, num_experts: int
) -> list[TensorRecord]:
    """The record of each expert, from the first per-expert naming of which any expert exists."""
    parent = switch_path.rpartition(".")[0]
    experts = f"{parent}.experts" if parent else "experts"
    projection, _, suffix = component.name.partition(".")
    for file_name in _PER_EXPERT_NAMES.get(projection, ()):
        names = [f"{experts}.{expert}.{file_name}.{suffix}" for expert in range(num_experts)]
        records = [index.tensors[name] for name in names if name in index.tensors]
        if len(records) == num_experts:
            return records
        if records:
            missing = next(name for name in names if name not in index.tensors)
            raise CheckpointError(
                f"{index.folder}: tensor {missing!r} is missing, but {len(records)} of {num_experts} experts "
                "are there; download the model again"
            )

    # Linear in the number of tensors, but only on the way to an error.
    block = f"{parent}." if parent else ""
    others = [name for name in index.tensors if name.startswith(block) and "expert" in name]
    found = f"it holds {min(others)!r} instead" if others else f"it holds no experts under {parent!r}"
    raise UnsupportedModelError(
        f"{index.folder}: no tensor '{switch_path}.{component.name}' and none per expert ({found}): the "
        "checkpoint's layout is not contiguous per expert, or not named so that it can be read in place; "
        f"{_convert_hint(index)}"
    )


def _check_tensor(index: CheckpointIndex, record: TensorRecord, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that mlx-lm changes while loading: its bytes on disk are not those of the module."""
    if record.shape != shape or DTYPES[record.dtype][1] != dtype:
        raise UnsupportedModelError(
            f"{index.shards[record.shard]}: tensor {record.name!r} is {record.dtype} {list(record.shape)}, "
            f"the model needs {dtype} {list(shape)}: it cannot be read in place; {_convert_hint(index)}"
        )


def _convert_hint(index: CheckpointIndex) -> str:
    folder = shlex.quote(str(index.folder))
    return f"convert it once with: mlx_lm.convert --hf-path {folder} --mlx-path mlx_model"

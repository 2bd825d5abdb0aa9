"""Which byte range of which shard holds each tensor of each expert: every layout that keeps an expert together.

Works on the header index only; knows nothing about arrays, memory or policies.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_moecache.checkpoints.checkpoint import DTYPES, CheckpointIndex, TensorRecord
from mlx_moecache.errors import CheckpointError, UnsupportedModelError

_ITEM_BYTES = {mlx_name: bits // 8 for bits, mlx_name in DTYPES.values() if mlx_name is not None}

# Where files of the same model begin the names of its layers; `sanitize` moves them to the module's path.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_OTHER_BLOCKS = {"mlp": ("block_sparse_moe", "moe", "ffn"), "mlp.experts": ("ffn",)}
_PER_EXPERT_NAMES = {
    "gate_proj": ("gate_proj", "w1"),
    "down_proj": ("down_proj", "w2"),
    "up_proj": ("up_proj", "w3"),
    "fc1": ("fc1", "up_proj"),
    "fc2": ("fc2", "down_proj"),
}
_FUSED_PARTS = {"gate_proj": 0, "up_proj": 1}


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


@dataclass(frozen=True)
class _Form:
    """One way to store a tensor of all experts: stacked under `name`, or one per expert if `name` has an {e}.

    An expert's part is number `part` of `parts` equal ones along the rows of its tensor. `extra`: stacked tensors may
    hold so many experts more (a shared one at the end).
    """

    name: str
    part: int = 0
    parts: int = 1
    extra: int = 0


def locate_experts(
    index: CheckpointIndex,
    switch_path: str,
    components: Sequence[ComponentSpec],
    num_experts: int,
    *,
    fused_halves: bool = False,
) -> LayerExtents:
    """Find every expert of the switch at module path `switch_path`, per component.

    Stacked tensors `{switch_path}.{component}` (E, *shape) come first, as mlx-lm writes them; then the layouts of
    Hugging Face checkpoints that keep each expert's rows together: one tensor per expert (gate_proj, up_proj,
    down_proj, or w1, w3, w2, or fc1, fc2), and, if `fused_halves`, gate and up rows one after the other in one tensor
    [E, 2I, ..]. Other models transpose or interleave under the same names, and with square matrices the shapes would
    not tell.

    Raises CheckpointError when some experts are absent; UnsupportedModelError when dtypes or shapes differ
    from `components`, or the layout does not keep each expert's bytes together.
    """
    shards: list[tuple[int, ...]] = []
    offsets: list[tuple[int, ...]] = []
    for component in components:
        for form in _forms(switch_path, component, fused_halves):
            found = _find(index, form, component, num_experts)
            if found is not None:
                shards.append(tuple(shard for shard, _ in found))
                offsets.append(tuple(offset for _, offset in found))
                break
        else:
            raise _not_found(index, switch_path, component)
    return LayerExtents(tuple(component.nbytes for component in components), tuple(shards), tuple(offsets))


def _forms(switch_path: str, component: ComponentSpec, fused_halves: bool) -> Iterator[_Form]:
    """All forms of a component, the module's own names first."""
    projection, _, suffix = component.name.partition(".")
    for parent, name in _places(switch_path):
        # Repacked ones first: a stacked tensor that also holds a shared expert may stand beside them.
        yield _Form(f"{parent}{name}.{{e}}.{component.name}")
        yield _Form(f"{parent}{name}.{component.name}", extra=int(fused_halves))
        for file_name in _PER_EXPERT_NAMES.get(projection, ()):
            yield _Form(f"{parent}experts.{{e}}.{file_name}.{suffix}")
        if projection in ("fc1", "fc2"):
            yield _Form(f"{parent}mlp.{{e}}.{component.name}")
        if parent.endswith("moe."):  # Step's files have no level for the switch
            yield _Form(f"{parent}{component.name}")
        if projection in _FUSED_PARTS:
            part = _FUSED_PARTS[projection]
            # Tencent's files have the up half first, and no other model uses this name.
            yield _Form(f"{parent}experts.{{e}}.gate_and_up_proj.{suffix}", 1 - part, 2)
            if fused_halves:
                yield _Form(f"{parent}{name}.gate_up_proj.{suffix}", part, 2, extra=1)
                if suffix == "weight":
                    yield _Form(f"{parent}experts.gate_up_proj", part, 2)
                    yield _Form(f"{parent}input_linear.weight", part, 2)
        elif projection == "down_proj" and fused_halves and suffix == "weight":
            yield _Form(f"{parent}experts.down_proj")
            yield _Form(f"{parent}output_linear.weight")


def _places(switch_path: str) -> Iterator[tuple[str, str]]:
    """(path of the block with a dot, name of the switch) as the module has them, then as files may have them."""
    parent, _, name = switch_path.rpartition(".")
    prefix, layers, rest = parent.partition("layers.")
    number, _, block = rest.partition(".")
    # The block may itself be called experts (gemma4), and then holds the fused tensors directly.
    blocks = [block, *_OTHER_BLOCKS.get(block, ())]
    if block == "experts":
        blocks.append("")
    prefixes = [prefix, *(p for p in _PREFIXES if p != prefix)] if prefix in _PREFIXES else [prefix]
    if not layers:
        yield (f"{parent}." if parent else ""), name
        return
    for p in prefixes:
        for b in blocks:
            yield f"{p}layers.{number}.{b}{'.' if b else ''}", name


def _find(
    index: CheckpointIndex, form: _Form, component: ComponentSpec, num_experts: int
) -> list[tuple[int, int]] | None:
    """(shard, offset) of each expert's part if the checkpoint has this form."""
    shape = (component.shape[0] * form.parts, *component.shape[1:]) if form.parts > 1 else component.shape
    skip = form.part * component.nbytes
    if "{e}" not in form.name:
        stacked = index.tensors.get(form.name)
        if stacked is None:
            return None
        more = form.extra if stacked.shape[:1] == (num_experts + form.extra,) else 0
        _check_tensor(index, stacked, component.dtype, (num_experts + more, *shape))
        step = component.nbytes * form.parts
        return [(stacked.shard, stacked.offset + e * step + skip) for e in range(num_experts)]
    names = [form.name.format(e=e) for e in range(num_experts)]
    records = [index.tensors[name] for name in names if name in index.tensors]
    if not records:
        return None
    if len(records) < num_experts:
        missing = next(name for name in names if name not in index.tensors)
        raise CheckpointError(
            f"{index.folder}: tensor {missing!r} is missing, but {len(records)} of {num_experts} experts "
            "are there; download the model again"
        )
    for record in records:
        _check_tensor(index, record, component.dtype, shape)
    return [(record.shard, record.offset + skip) for record in records]


def _not_found(index: CheckpointIndex, switch_path: str, component: ComponentSpec) -> UnsupportedModelError:
    # Linear in the number of tensors, but only on the way to an error.
    parent = switch_path.rpartition(".")[0]
    block = f"{parent}." if parent else ""
    others = [name for name in index.tensors if name.startswith(block) and "expert" in name]
    if not others:
        number = parent.partition("layers.")[2].partition(".")[0]
        others = [name for name in index.tensors if f"layers.{number}." in name and "expert" in name]
    found = f"it holds {min(others)!r} instead" if others else f"it holds no experts under {parent!r}"
    return UnsupportedModelError(
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

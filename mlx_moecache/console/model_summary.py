"""What a checkpoint is made of, from its config and headers alone: layers, experts, router, formats, bytes.

Works on an OpenedModel, of which nothing has been evaluated; knows nothing about output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..architectures import FAMILIES, find
from ..loading import OpenedModel

OTHER = "other"
PARTS = ("router", "shared experts", "attention", "dense MLP", "embeddings", "output head", OTHER)

_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
# By the words of a module's path, tried in this order for everything outside of the experts and the router.
_NAMES = (
    ("attention", re.compile(r"attn|attention|mixer|mamba|ssm|conv|delta")),
    ("dense MLP", re.compile(r"mlp|feed_forward|ffn|block_sparse")),
    ("output head", re.compile(r"head|output")),
    ("embeddings", re.compile(r"embed|wte|tok")),
)
_SHARED = re.compile(r"shared?_expert|shared_mlp")
_ROUTER = re.compile(r"gate|.*router.*|.*classifier.*|wg")


@dataclass(frozen=True)
class Format:
    """How weights are stored: an mlx quantisation mode with bits and group size, or (mode None) a plain dtype."""

    mode: str | None
    bits: int | None
    group_size: int | None
    dtype: str | None

    def __str__(self) -> str:
        if self.mode is None:
            return str(self.dtype)
        name = f"{self.bits}-bit affine" if self.mode == "affine" else self.mode
        return f"{name}, groups of {self.group_size}"


@dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    path: str
    experts: int  # E
    k: int  # experts per token
    bytes_per_expert: int

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.experts * self.bytes_per_expert


@dataclass(frozen=True)
class Router:
    """What cache-conditional routing can do. The seam is tested once more at load, when there are weights."""

    family: str | None  # None: not in the table of architectures
    title: str | None
    groups: bool  # whole groups of experts may be ruled out first
    bias: bool
    note: str


@dataclass(frozen=True)
class ModelSummary:
    """Everything that `info` knows of a model but its memory plans. Sizes in bytes."""

    model_type: str
    num_layers: int
    layers: tuple[Layer, ...]  # with experts
    shared_experts: int
    shared_expert_bytes: int  # of all layers; part of `resident`
    router: Router
    expert_formats: dict[str, Counter[Format]]  # projection -> number of layers per format
    formats: dict[str, Counter[Format]]  # one of PARTS -> number of weights per format
    resident: int  # everything but the experts

    @property
    def experts(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def total(self) -> int:
        return self.resident + self.experts

    def bytes_per_token(self, hit_rate: float) -> float:
        """Expected bytes read for one token at decode, if this share (0 to 1) of its selections is in memory."""
        return (1 - hit_rate) * sum(layer.k * layer.bytes_per_expert for layer in self.layers)


def summarise(opened: OpenedModel) -> ModelSummary:
    """Collect the facts; nothing is evaluated."""
    layers = tuple(Layer(s.path, s.num_experts, s.k, s.bytes_per_expert) for s in opened.layer_shapes)
    modules = dict(opened.model.named_modules())
    expert_formats: dict[str, Counter[Format]] = {}
    formats: dict[str, Counter[Format]] = {part: Counter() for part in PARTS}
    shared: dict[int, int] = {}
    for path, module in modules.items():
        if _in_switch(path, layers):
            if _has_weight(module, 3):
                expert_formats.setdefault(path.rpartition(".")[2], Counter())[_format(module)] += 1
            continue
        if _SHARED.search(path):
            shared |= {id(v): v.nbytes for v in module.values() if isinstance(v, mx.array)}
        if _has_weight(module, 2):
            formats[_part(path, module, layers)][_format(module)] += 1
    return ModelSummary(
        model_type=str(opened.config.get("model_type")),
        num_layers=len(opened.model.layers),
        layers=layers,
        shared_experts=_shared_count(opened.config) if shared else 0,
        shared_expert_bytes=sum(shared.values()),
        router=_router(opened),
        expert_formats=expert_formats,
        formats={part: counts for part, counts in formats.items() if counts},
        resident=opened.resident,
    )


def _router(opened: OpenedModel) -> Router:
    reachable = all(b.seam is not None for b in opened.blocks)
    classes = opened.config.get("architectures")
    known = find(
        str(opened.config.get("model_type")),
        [str(name) for name in classes] if isinstance(classes, list) else (),
    )
    if known is None:
        return Router(None, None, False, reachable, "")
    return Router(known.family, FAMILIES[known.family].title, known.groups, known.bias and reachable, known.note)


def _shared_count(config: Mapping[str, Any]) -> int:
    """Shared experts per layer by the config; models that have them without a number have one."""
    for scope in (config, config.get("text_config") or {}):
        for name in _SHARED_COUNTS:
            count = scope.get(name)
            if type(count) is int and count > 0:  # JSON's true is an int to Python
                return count
    return 1


def _in_switch(path: str, layers: Sequence[Layer]) -> bool:
    return any(path == layer.path or path.startswith(layer.path + ".") for layer in layers)


def _has_weight(module: nn.Module, least_axes: int) -> bool:
    """Whether `module` itself has a matrix (or a stack of them); vectors such as those of norms do not count."""
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim >= least_axes


def _format(module: nn.Module) -> Format:
    bits, group_size = getattr(module, "bits", None), getattr(module, "group_size", None)
    if isinstance(bits, int) and isinstance(group_size, int) and "scales" in module:
        return Format(str(getattr(module, "mode", "affine")), bits, group_size, None)
    return Format(None, None, None, str(module["weight"].dtype).rpartition(".")[2])


def _part(path: str, module: nn.Module, layers: Sequence[Layer]) -> str:
    """Which of PARTS the module at `path` belongs to."""
    if _SHARED.search(path):
        return "shared experts"
    words = path.split(".")
    part = next((part for part, pattern in _NAMES if any(pattern.search(word) for word in words)), OTHER)
    for layer in layers:
        parents = layer.path.split(".")[:-1]
        depth = max((i + 1 for i, word in enumerate(parents) if word.isdigit()), default=len(parents))
        if words[:depth] != parents[:depth]:
            continue
        is_beside = len(parents) > depth and words[: len(parents)] == parents  # in the block around the experts
        # Some routers have more outputs than there are experts with weights.
        is_wide = module["weight"].shape[0] >= layer.experts
        if is_wide and (is_beside or part != "attention") and any(_ROUTER.fullmatch(w) for w in words[depth:]):
            return "router"
        if is_beside:
            return OTHER
    return part

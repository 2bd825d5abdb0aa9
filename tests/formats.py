"""Every weight format that mlx-lm writes, as keyword arguments of `tiny_models.write_checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import quantize_model
from tiny_models import Config, build_model, write_weights

Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]
MODES = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}  # group sizes that fit tiny matrices
FORMATS = (
    "float32",
    "affine-3",
    "affine-4",
    "affine-6",
    "affine-8",
    "mxfp4-4",
    "mxfp8-8",
    "nvfp4-4",
    "mixed-layers",
    "mixed-projections",
    "some-unquantised",
    "bfloat16-affine-4",
)


def write_format(folder: Path, config: Config, name: str) -> Path:
    """A checkpoint of `config` in one of FORMATS, in two shards without tokenizer."""
    model = build_model(config)
    if name.startswith("bfloat16"):
        model.update(tree_map(lambda w: w.astype(mx.bfloat16), model.parameters()))
        name = name.removeprefix("bfloat16-")
    if name != "float32":
        mode, _, bits = name.partition("-")
        predicate: Predicate | None = None
        if not bits.isdigit():
            predicate, mode, bits = _MIXED[name], "affine", "4"
        fits = _where_it_fits(predicate or getattr(model, "quant_predicate", None), MODES[mode])
        model, config = quantize_model(model, config, MODES[mode], int(bits), mode, quant_predicate=fits)
    return write_weights(folder, config, dict(tree_flatten(model.parameters())))


def _where_it_fits(predicate: Predicate | None, group: int) -> Predicate:
    """`predicate` (None: all), but modules whose rows are no multiple of a group stay as they are."""

    def fits(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if module.weight.shape[-1] % group:
            return False
        choice = True if predicate is None else predicate(path, module)
        if isinstance(choice, dict) and module.weight.shape[-1] % choice["group_size"]:
            return True  # mlx-lm's 8 bits for routers come in groups that tiny rows do not fill
        return choice

    return fits


def _by_layer(path: str, module: nn.Module) -> bool | dict[str, Any]:
    match = re.search(r"\.(?:layers|h)\.(\d+)\.", path)
    layer = int(match[1]) if match else 0
    return [
        {"group_size": 32, "bits": 4, "mode": "affine"},
        {"group_size": _group(module), "bits": 8, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ][layer % 3]


def _by_projection(path: str, module: nn.Module) -> bool | dict[str, Any]:
    for end, bits in (("gate_proj", 3), ("up_proj", 4), ("fc1", 3), ("down_proj", 8), ("fc2", 6)):
        if path.endswith(end):
            return {"group_size": 32, "bits": bits, "mode": "affine"}
    return {"group_size": _group(module), "bits": 6, "mode": "affine"}


def _group(module: nn.Module) -> int:
    return 64 if module.weight.shape[-1] % 64 == 0 else 32


def _not_down(path: str, module: nn.Module) -> bool | dict[str, Any]:
    return not path.endswith(("down_proj", "fc2", "gate", "router"))


_MIXED: dict[str, Predicate] = {
    "mixed-layers": _by_layer,
    "mixed-projections": _by_projection,
    "some-unquantised": _not_down,
}

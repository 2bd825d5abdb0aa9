"""The custom MoE block: mlx-lm's own block and switch, with a selection seam on the router and slots in the switch.

The storage half stands here: the switch module keeps its class, code and projections, but its tensors become slot pools
[S, ...]. It is a probe until the model is planned and tested, and then a CachedSwitch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from .cached_switch import CachedSwitch, Switch
from .calls import replace_call
from .checkpoints.expert_layout import ComponentSpec
from .errors import UnsupportedModelError
from .expert_cache import ExpertCache
from .layer_experts import LayerExperts
from .routing import RunningRange
from .seam import SelectionSeam, find_owner

NO_SEAM = "its router does not select with argpartition"
PROBE_ROWS = 8  # tokens of the load-time self-test, which also computes shared experts: minutes on a CPU for 32


class MoeBlock:
    """One MoE layer of the model. Until `attach`, its switch is a probe that reads no expert (for planning)."""

    def __init__(self, path: str, switch: nn.Module, parents: Sequence[nn.Module]) -> None:
        """parents: the modules around `switch`, the nearest first."""
        self.path, self.switch = path, switch
        self.components = _components(self.path, self.switch)
        projection = next(iter(_projections(self.switch).values()))
        self.num_experts: int = projection.num_experts
        last = self.switch.down_proj if isinstance(self.switch, SwitchGLU) else self.switch.fc2
        self.output_dims: int = last.output_dims
        self.inner_dims: int = last.input_dims
        self.k = 0  # experts per token, seen by the probe
        self.bit_exact = False  # the cloned router gave bit-equal results, so it may also observe exact runs
        self.bytes_per_expert = sum(c.nbytes for c in self.components)
        owner, around = _find_router(switch, parents)
        self.seam = SelectionSeam(owner, self.num_experts) if owner is not None else None
        # The block is what turns x into the output of the experts. Where the layer itself routes and combines, only
        # its router can be run alone.
        takes_x = _takes_only_x(around)
        self.block = around if takes_x else parents[0]
        self.routed = around if takes_x else owner  # what of it can be run alone
        self._run: Switch = self._probe
        self._strip()
        self._install()

    @property
    def running_range(self) -> RunningRange:
        """D of this layer; the seam updates it, the cache resets it."""
        return self.seam.range if self.seam is not None else RunningRange()

    # ---- before loading ----

    def self_test(self, dtype: mx.Dtype, hidden_dims: int) -> str | None:
        """Run the block on random rows with the original and with the cloned router; None if the seam works.

        Requires equal outputs (bit-equal, or within rounding where compiled and uncompiled code may differ) and
        exactly one selection. Otherwise returns the reason, and the layer must stay unbiased. The weights of the
        block are evaluated.
        """
        if self.seam is None or self.routed is None:
            return NO_SEAM
        key = mx.random.key(len(self.path))  # its own key: the user's seed is not consumed
        x = mx.random.normal((1, PROBE_ROWS, hidden_dims), key=key).astype(dtype)
        expected = _outputs(self.routed(x))
        mx.eval(expected)
        self.seam.enabled, self.seam.selections = True, 0
        try:
            seen = _outputs(self.routed(x))
            mx.eval(seen)
        finally:
            self.seam.enabled = False
        observed = self.seam.take()  # taken in any case: the first forward pass must not find it
        self.seam.range.reset()  # nor must D know these rows
        if self.seam.selections != 1 or observed is None:
            return f"the selection was seen {self.seam.selections} times instead of once"
        pairs = list(zip(expected, seen, strict=True))
        self.bit_exact = all(mx.array_equal(a, b, equal_nan=True) for a, b in pairs)
        if not self.bit_exact and not all(mx.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in pairs):
            return "the observed router gives other results than the original"
        return None

    # ---- running ----

    @property
    def can_guess(self) -> bool:
        """True if the router can be asked about inputs that never reach the experts."""
        return self.seam is not None and self.routed is not None

    def guess(self, x: mx.array) -> tuple[mx.array, mx.array] | None:
        """x [1, 1, D] -> experts [1, k] that the router would select now, and their scores; lazy, and no trace stays.

        What the block makes of outputs of experts is built, but never evaluated.
        """
        if self.seam is None or self.routed is None:
            return None
        run, self._run = self._run, self._no_experts
        try:
            return self.seam.guess(self.routed, x)
        finally:
            self._run = run

    def _no_experts(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.zeros((*indices.shape, self.output_dims), dtype=x.dtype)

    def attach(self, cache: ExpertCache, layer: LayerExperts, number: int) -> None:
        """Replace the probe by the cache: from here on the block computes. number: of this layer among MoE layers."""
        self.layer = layer
        self.cached = CachedSwitch(
            self.switch,
            self._upstream,
            self.seam,
            cache=cache,
            layer=layer,
            number=number,
            output_dims=self.output_dims,
            bit_exact=self.bit_exact,
        )
        self._run = self.cached

    # ---- installation ----

    def _probe(self, x: mx.array, indices: mx.array) -> mx.array:
        """Outputs that depend on expert, position in the top-k and channel, so that the self-test sees any change."""
        self.k = indices.shape[-1]
        channel = mx.arange(1, self.output_dims + 1, dtype=mx.float32) / self.output_dims
        return (indices[..., None].astype(mx.float32) / self.num_experts * channel).astype(x.dtype)

    def _strip(self) -> None:
        """Drop the lazy expert tensors, so that nothing can ever evaluate them."""
        for projection in _projections(self.switch).values():
            for name, value in list(projection.items()):
                if isinstance(value, mx.array):
                    projection[name] = mx.zeros((0, *value.shape[1:]), dtype=value.dtype)

    def _install(self) -> None:
        upstream, moe = type(self.switch).__call__, self
        self._upstream: Switch = lambda x, indices: upstream(self.switch, x, indices)

        def call(module: nn.Module, x: mx.array, indices: mx.array) -> Any:
            return moe._run(x, indices)

        replace_call(self.switch, call)


def find_blocks(model: nn.Module) -> list[MoeBlock]:
    """Wrap every MoE layer of a lazily loaded `model`. Raises UnsupportedModelError if it has none, or adapters."""
    modules = dict(model.named_modules())
    blocks = []
    for path, module in sorted(modules.items(), key=lambda item: _natural(item[0])):
        if isinstance(module, SwitchGLU | SwitchMLP):
            parts = path.split(".")
            around = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
            blocks.append(MoeBlock(path, module, [modules[p] for p in around if p in modules]))
    if not blocks and any(isinstance(m.get("experts"), list) for m in modules.values()):
        raise UnsupportedModelError(
            "the experts of this model are separate modules that mlx-lm runs one by one, not a switch layer, so they "
            "cannot be streamed; run it with mlx_lm.generate instead"
        )
    if not blocks:
        raise UnsupportedModelError(
            "this model has no routed experts (it is dense, or its experts are not mlx-lm switch layers); "
            "run it with mlx_lm.generate instead"
        )
    return blocks


def _find_router(switch: nn.Module, parents: Sequence[nn.Module]) -> tuple[nn.Module | None, nn.Module]:
    """The module that selects for `switch`, and the nearest module that holds both (without one: the parent)."""
    for depth, parent in enumerate(parents[:3]):
        # Further out only routers count: a layer's attention may select tokens with the same calls.
        names = None if depth == 0 else ("gate", "router")
        owner = find_owner(parent, switch, names)
        if owner is not None:
            return owner, parent
    return None, parents[0]


def _takes_only_x(module: nn.Module) -> bool:
    """False for a whole layer, which also takes mask and cache."""
    return len(inspect.signature(type(module).__call__).parameters) == 2  # self and x


def _outputs(result: Any) -> list[mx.array]:
    """What a block (one array) or a router (expert numbers and weights) returned."""
    return [result] if isinstance(result, mx.array) else list(result)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def _projections(switch: nn.Module) -> dict[str, Any]:
    return {
        n: m
        for n, m in switch.items()
        if isinstance(m, nn.Module) and n in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    }


def _components(path: str, switch: nn.Module) -> tuple[ComponentSpec, ...]:
    components = []
    for name, projection in sorted(_projections(switch).items()):
        if type(projection) not in (SwitchLinear, QuantizedSwitchLinear):
            raise UnsupportedModelError(
                f"{path}.{name} is a {type(projection).__name__}: adapters on expert layers cannot be streamed; "
                "fuse them into the model with mlx_lm.fuse first"
            )
        for tensor, value in projection.items():
            if isinstance(value, mx.array):
                dtype = str(value.dtype).rpartition(".")[2]
                components.append(ComponentSpec(f"{name}.{tensor}", dtype, tuple(value.shape[1:])))
    return tuple(components)

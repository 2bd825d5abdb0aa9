"""The selection seam: the model's own router code, run with a stand-in for the call that selects the experts.

mlx-lm has some twenty block forwards that spell out their router. They are not written again here: the function that
selects is cloned with other globals, in which `mx` is a stand-in that forwards everything except the calls we want to
see. Softmax, gathering of the original scores, normalisation, scaling and casts remain the model's bytecode, so mixing
weights are exact by construction. Knows router scores; does not know files, slots or bytes.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .routing import CachePrior, Original, RunningRange, Strategy

CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "router_bias")


@dataclass
class Observation:
    """What one call of the router showed. All arrays are lazy; the switch evaluates them with its one host read."""

    scores: mx.array  # z [T, E] float32, the ranking quantity; larger is better
    mean_range: mx.array | None  # running D, updated by this call
    swapped: mx.array | None  # scalar: selections that are not in the router's own top-k; None if unbiased


class SelectionSeam:
    """The seam of one MoE layer, installed on `owner`: the router module, or the block that routes inline.

    The ranking quantity z is: the input of softmax for softmax routers, the logits themselves for routers that select
    on logits, and the corrected score for routers with a correction bias. Experts of groups that the model ruled out
    (score 0 or -inf) keep their value and never get a bonus.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.enabled = False  # off: the owner's original, possibly compiled, code runs
        self.strategy: Strategy = Original()
        self.range = RunningRange()
        self.bias_mask: Callable[[int], mx.array | None] = lambda rows: (
            None
        )  # rows -> residents [E], None: no bias
        self.selections = 0  # final selections seen since the last reset, for the self-test
        self._observation: Observation | None = None
        self._logits: mx.array | None = None
        self._corrected = any(getattr(owner, b, None) is not None for b in CORRECTION_BIASES)
        self._install()

    def take(self) -> Observation | None:
        """The observation of the last router call, once."""
        observation, self._observation, self._logits = self._observation, None, None  # a chunk's scores are not small
        return observation

    # ---- the calls that the stand-in redirects ----

    def softmax(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._logits = x
        return mx.softmax(x, *args, **kwargs)

    def argpartition(self, a: mx.array, kth: int = 0, axis: int | None = -1, **kwargs: Any) -> mx.array:
        """The final selection: a [.., E] -> expert numbers, of which the model's code takes the first or last k."""
        if axis is None or axis % a.ndim != a.ndim - 1:
            return mx.argpartition(a, kth, axis=axis, **kwargs)  # a choice of groups
        own = mx.argpartition(a, kth, axis=axis, **kwargs)
        k = kth + 1 if kth >= 0 else -kth
        sign = -1.0 if kth >= 0 else 1.0
        c = (sign * a).astype(mx.float32)
        logits = self._logits
        is_logit = logits is not None and logits.size == a.size and not self._corrected
        z = logits.astype(mx.float32).reshape(a.shape) if is_logit and logits is not None else c
        dropped = c == -mx.inf
        if is_logit or self._corrected:  # a plain logit may well be 0
            dropped = dropped | (c == 0)
        ranked = self._observe(z, dropped)
        if ranked is None:
            return own
        # Fill values differ by model; in the logit domain only -inf is below everything.
        ranked = mx.where(dropped, mx.array(-mx.inf) if is_logit else c, ranked)
        other = mx.argpartition(sign * ranked, kth, axis=axis)
        part = slice(0, k) if kth >= 0 else slice(-k, None)
        return self._choose(own, other, own[..., part], other[..., part])

    def sparsemixer(
        self,
        gates: mx.array,
        *,
        top_k: int,
        jitter_eps: float,
        upstream: Callable[..., tuple[mx.array, mx.array]],
    ) -> tuple[mx.array, mx.array]:
        """Phi-3.5-MoE: k rounds; the weight is a softmax over the experts within a band of the round's best.

        Biased, round j takes the j-th best of the ranking where upstream takes the maximum, and forms band, softmax and
        masking around it as upstream does, so that an expert outside the usual band still has a defined weight.
        """
        own, weights = upstream(gates, top_k=top_k, jitter_eps=jitter_eps)
        ranked = self._observe(gates.astype(mx.float32), None)
        if ranked is None:
            return own, weights
        order = mx.argsort(-ranked, axis=-1)[..., :top_k]
        masked, scores = gates, []
        for j in range(top_k):
            i = order[..., j : j + 1]
            best = mx.take_along_axis(gates, i, axis=-1)
            factor = mx.maximum(mx.abs(gates), best)
            band = mx.where((best - gates) / factor > 2 * jitter_eps, -mx.inf, masked)
            scores.append(mx.take_along_axis(mx.softmax(band, axis=-1, precise=True), i, axis=-1))
            masked = mx.put_along_axis(masked, i, mx.array(-mx.inf, masked.dtype), axis=-1)
        chosen = self._choose(own, order, own, order)
        assert self._observation is not None and self._observation.swapped is not None
        return chosen, mx.where(self._observation.swapped == 0, weights, mx.concatenate(scores, axis=-1))

    # ---- shared by both ----

    def _observe(self, z: mx.array, dropped: mx.array | None) -> mx.array | None:
        """Record z; return the biased ranking, or None where this call must not be biased."""
        self.selections += 1
        E = z.shape[-1]
        flat = z.reshape(-1, E)
        mean_range = None
        if isinstance(self.strategy, CachePrior):
            mean_range = self.range.observe(flat, None if dropped is None else dropped.reshape(-1, E))
        self._observation = Observation(flat, mean_range, None)
        mask = self.bias_mask(flat.shape[0])
        # Strength 0 hands the model's own result through: a zero bonus could still order ties differently.
        if (
            mask is None
            or mean_range is None
            or not isinstance(self.strategy, CachePrior)
            or not self.strategy.strength
        ):
            return None
        # Experts that were ruled out must not take one of the J protected places.
        return self.strategy.rank(z if dropped is None else mx.where(dropped, -mx.inf, z), mask, mean_range)

    def _choose(self, own: mx.array, other: mx.array, own_top: mx.array, other_top: mx.array) -> mx.array:
        """`other`, or upstream's own result where the selected set is the same, so that sums run in the same order."""
        kept = (own_top[..., :, None] == other_top[..., None, :]).sum()
        swapped = own_top.size - kept
        assert self._observation is not None
        self._observation.swapped = swapped
        return mx.where(swapped == 0, own, other)

    # ---- installation ----

    def _install(self) -> None:
        cls = type(self.owner)
        routed = _clone(cls.__call__, self, {})
        original = cls.__call__
        seam = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not seam.enabled:
                return original(module, *args, **kwargs)
            seam._logits = seam._observation = None
            return routed(module, *args, **kwargs)

        # An instance attribute __call__ would be ignored: Python looks it up on the class.
        self.owner.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class _Spy:
    """Stands in for the name `mx` in cloned functions: everything is forwarded but the redirected calls."""

    def __init__(self, seam: SelectionSeam) -> None:
        self.softmax, self.argpartition = seam.softmax, seam.argpartition

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def find_owner(block: nn.Module, switch_names: tuple[str, ...]) -> nn.Module | None:
    """The module whose call selects the experts: a child of `block` (gate, router), else the block itself."""
    children = [m for name, m in block.items() if isinstance(m, nn.Module) and name not in switch_names]
    for module in [*children, block]:
        if _selects(type(module).__call__):
            return module
    return None


def _selects(func: Any, seen: frozenset[int] = frozenset()) -> bool:
    f = _python_function(func)
    if f is None or id(f) in seen:
        return False
    names = _names(f.__code__)
    if "argpartition" in names or f.__name__ == "sparsemixer":
        return True
    seen = seen | {id(f)}
    return any(_selects(c, seen) for _, c in _callees(f))


def _clone(func: Any, seam: SelectionSeam, done: dict[int, Any]) -> Any:
    """`func` with other globals: `mx` is the spy, and functions of the same module that it calls are clones too."""
    f = _python_function(func)
    assert f is not None
    if id(f) in done:
        return done[id(f)]
    if f.__name__ == "sparsemixer":
        upstream = f

        def sparsemixer(gates: mx.array, *, top_k: int, jitter_eps: float) -> tuple[mx.array, mx.array]:
            return seam.sparsemixer(gates, top_k=top_k, jitter_eps=jitter_eps, upstream=upstream)

        return sparsemixer
    scope: dict[str, Any] = dict(f.__globals__)
    clone = types.FunctionType(f.__code__, scope, f.__name__, f.__defaults__, f.__closure__)
    clone.__kwdefaults__ = f.__kwdefaults__
    done[id(f)] = clone
    for name, value in list(scope.items()):
        if value is mx:
            scope[name] = _Spy(seam)
    for name, callee in _callees(f):
        if _selects(callee):
            scope[name] = _clone(callee, seam, done)
    return clone


def _callees(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Functions of f's module (also those wrapped by mx.compile) that f names."""
    for name in _names(f.__code__):
        value = f.__globals__.get(name)
        inner = (
            None if value is None or isinstance(value, type | types.ModuleType) else _python_function(value)
        )
        if inner is not None and inner.__module__ == f.__module__:
            yield name, value


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _names(const)
    return names


def _python_function(func: Any) -> types.FunctionType | None:
    """The Python function itself, or the one inside an mx.compile object (found among its referents)."""
    if isinstance(func, types.FunctionType):
        return func
    if callable(func) and not isinstance(func, type | types.BuiltinFunctionType | types.MethodType):
        for r in gc.get_referents(func):
            if isinstance(r, types.FunctionType):
                return r
    return None

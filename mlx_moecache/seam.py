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

from .calls import replace_call
from .routing import Original, RunningRange, Strategy, probabilities

# z, p [T, E] and the router's own selection [T, k] -> residents [T, E] before each token and D [T, 1]; None: unbiased.
Window = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array] | None]
CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "router_bias")


@dataclass
class Observation:
    """What one call of the router showed. All arrays are lazy; the switch evaluates them with its one host read."""

    scores: mx.array  # z [T, E] float32, the ranking quantity; larger is better, -inf if the model ruled it out
    mean_range: mx.array | None  # running D, updated by this call
    swapped: mx.array | None  # scalar: selections that are not in the router's own top-k; None if unbiased
    selected: mx.array | None = None  # [T, k], only if the router also selects experts that the switch does not have
    own: mx.array | None = None  # [T, k], what upstream's code selected, if somebody watches
    probabilities: mx.array | None = None  # p [T, E], if somebody watches


class SelectionSeam:
    """The seam of one MoE layer, installed on `owner`: the router module, or the block that routes inline.

    The ranking quantity z [.., E] is, in float32,

    - for softmax routers the logits, that is the input of mx.softmax (where the softmax is a module of its own: log p,
      which differs from them by a constant per token);
    - for routers that select on logits, sparsemixer and top-1 routers: these logits;
    - for routers with a correction bias b: act(logits) + b, act being sigmoid, softmax or sqrt(softplus), while mixing
      weights come from act(logits) without b; for sigmoid routers without one: the score.

    Group-limited routers: the same z within the allowed groups. Experts of other groups (filled with 0 or -inf) count
    neither in D nor among the J protected ones and are never selected for being resident. Strategies see p = softmax(z)
    where z is logits, else z less the mean of b as shares of the k best (see `probabilities`).
    """

    def __init__(self, owner: nn.Module, num_experts: int) -> None:
        self.owner = owner
        self.num_experts = num_experts  # of the switch; a router may know more that compute nothing (identity experts)
        self.ranked = num_experts  # experts that the router knows, seen at its first call
        self.enabled = False  # off: the owner's original, possibly compiled, code runs
        self.strategy: Strategy = Original()
        self.range = RunningRange()
        self.bias_mask: Callable[[int], mx.array | None] = lambda rows: None  # rows -> residents [E], None: no bias
        self.watched = False  # keep the router's own selection
        self.partly_resident = False  # the switch looks at each observation, and D may be needed
        self.window: Window | None = None  # a text is scored: every token has residents of its own
        self.selections = 0  # final selections seen since the last reset, for the self-test
        self._guesses = False  # the call is asked about an input that is not the token's
        self._observation: Observation | None = None
        self._logits: mx.array | None = None
        self._sigmoid = False  # the current call formed its scores with a sigmoid
        self._correction = next((b for b in CORRECTION_BIASES if isinstance(getattr(owner, b, None), mx.array)), None)
        children = [m for m in owner.values() if isinstance(m, nn.Module)]
        self._softmax_module = any(isinstance(m, nn.Softmax) for m in children)  # its mx is not ours to replace
        self._sigmoid_module = any(isinstance(m, nn.Sigmoid) for m in children)
        self._install()

    def take(self) -> Observation | None:
        """The observation of the last router call, once."""
        observation, self._observation, self._logits = self._observation, None, None  # a chunk's scores are not small
        return observation

    def guess(self, routed: nn.Module, x: mx.array) -> tuple[mx.array, mx.array] | None:
        """[T, k] experts that the router selects for x in `routed`, which calls it, and their z; D stays as it is."""
        enabled, self.enabled, self._guesses = self.enabled, True, True
        try:
            routed(x)
        finally:
            self.enabled, self._guesses = enabled, False
        seen = self.take()
        if seen is None:
            return None
        ids = seen.own if seen.selected is None else seen.selected
        return None if ids is None else (ids, mx.take_along_axis(seen.scores, ids, axis=-1))

    # ---- the calls that the stand-in redirects ----

    def softmax(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._logits = x
        return mx.softmax(x, *args, **kwargs)

    def sigmoid(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._sigmoid = True
        return mx.sigmoid(x, *args, **kwargs)

    def argpartition(self, a: mx.array, kth: int = 0, axis: int | None = -1, **kwargs: Any) -> mx.array:
        """The final selection: a [.., E] -> expert numbers, of which the model's code takes the first or last k.

        a is, up to its sign, p, the logits or act(logits) + b; z is formed from it as the class says.
        """
        if axis is None or axis % a.ndim != a.ndim - 1:
            return mx.argpartition(a, kth, axis=axis, **kwargs)  # a choice of groups
        own = mx.argpartition(a, kth, axis=axis, **kwargs)
        k = kth + 1 if kth >= 0 else -kth
        sign = -1.0 if kth >= 0 else 1.0
        c = (sign * a).astype(mx.float32)
        logits = self._logits
        is_logit = self._correction is None and (self._softmax_module or (logits is not None and logits.size == a.size))
        z = c
        if is_logit:
            z = mx.log(c) if logits is None else logits.astype(mx.float32).reshape(a.shape)
        dropped = c == -mx.inf
        if is_logit or self._correction is not None or self._sigmoid:  # a plain logit may well be 0
            dropped = dropped | (c == 0)
        z = mx.where(dropped, -mx.inf, z)  # such experts must not take one of the J protected places
        part = slice(0, k) if kth >= 0 else slice(-k, None)
        in_logits = is_logit or (self._correction is None and not self._sigmoid)
        ranked = self._observe(z, k, in_logits, own[..., part])
        kept = self.strategy.kept(k)
        if ranked is None:
            chosen = own
        elif kept < k:  # fewer columns: what the model's code takes, the first or the last k, is then all of them
            other = mx.argpartition(sign * ranked, kept - 1 if kth >= 0 else -kept, axis=axis)
            chosen = other[..., :kept] if kth >= 0 else other[..., -kept:]
        else:
            other = mx.argpartition(sign * ranked, kth, axis=axis)
            chosen = mx.where(self._same(own[..., part], other[..., part]), own, other)
        if self._observation is not None and (z.shape[-1] > self.num_experts or self._guesses):
            self._observation.selected = chosen[..., part].reshape(z.size // z.shape[-1], -1)
        return chosen

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
        masking around it as upstream does, so that an expert outside the usual band still has a defined weight. z are
        the gates, which are logits.
        """
        own, weights = upstream(gates, top_k=top_k, jitter_eps=jitter_eps)
        ranked = self._observe(gates.astype(mx.float32), top_k, True, own)
        kept = self.strategy.kept(top_k)
        if ranked is None:
            return own, weights
        if kept < top_k:  # rounds go from the best expert down
            return own[..., :kept], weights[..., :kept]
        order = mx.argsort(-ranked, axis=-1)[..., :top_k]
        masked, scores = gates, []
        for j in range(top_k):
            i = order[..., j : j + 1]
            best = mx.take_along_axis(gates, i, axis=-1)
            factor = mx.maximum(mx.abs(gates), best)
            band = mx.where((best - gates) / factor > 2 * jitter_eps, -mx.inf, masked)
            scores.append(mx.take_along_axis(mx.softmax(band, axis=-1, precise=True), i, axis=-1))
            masked = mx.put_along_axis(masked, i, mx.array(-mx.inf, masked.dtype), axis=-1)
        same = self._same(own, order)
        return mx.where(same, own, order), mx.where(same, weights, mx.concatenate(scores, axis=-1))

    # ---- shared by both ----

    def _observe(self, z: mx.array, k: int, in_logits: bool, own: mx.array) -> mx.array | None:
        """Record z, -inf where the model ruled an expert out; return the biased ranking, or None for an exact call."""
        self.selections += 1
        E = self.ranked = z.shape[-1]
        flat = z.reshape(-1, E)
        if self.window is not None:
            self._observation = Observation(flat, None, None)
            p = self._probabilities(z, k, in_logits)
            biased = self.window(flat, p.reshape(-1, E), own.reshape(-1, k))
            if biased is None:
                return None
            resident, means = biased
            return self.strategy.rank(z, p, resident.reshape(z.shape), means.reshape(*z.shape[:-1], 1), k)
        mean_range = None
        # A prompt counts whatever the strategy, which may change.
        if self.strategy.uses_residents or (self.partly_resident and flat.shape[0] > 1):
            mean_range = self.range.mean if self._guesses else self.range.observe(flat)
        self._observation = Observation(flat, mean_range, None)
        if self.watched or self._guesses:
            self._observation.own = own.reshape(-1, k)
        if self.watched:
            self._observation.probabilities = self._probabilities(flat, k, in_logits)
        mask = self.bias_mask(flat.shape[0])
        if mask is not None and self.num_experts < E:  # what computes nothing is always there
            mask = mx.concatenate([mask, mx.ones(E - self.num_experts)])
        # Strength 0 hands the model's own result through: a zero bonus could still order ties differently.
        if mask is None or self.strategy.is_exact:
            return None
        mass = self._probabilities(z, k, in_logits) if self.strategy.uses_mass else None
        return self.strategy.rank(z, mass, mask, mx.array(0.0) if mean_range is None else mean_range, k)

    def _probabilities(self, z: mx.array, k: int, in_logits: bool) -> mx.array:
        biases = None if self._correction is None else getattr(self.owner, self._correction)  # loaded after the seam
        return probabilities(
            z, k, logits=in_logits, offset=None if biases is None else biases.astype(mx.float32).mean()
        )

    def _same(self, own: mx.array, other: mx.array) -> mx.array:
        """[.., 1], true for tokens whose selected set is upstream's; its own result then keeps the order of sums."""
        kept = (own[..., :, None] == other[..., None, :]).sum(axis=(-2, -1))[..., None]
        assert self._observation is not None
        if self.window is None:  # which counts on its own
            self._observation.swapped = own.size - kept.sum()
        return kept == own.shape[-1]

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
            seam._sigmoid = seam._sigmoid_module
            return routed(module, *args, **kwargs)

        replace_call(self.owner, call)


class _Spy:
    """Stands in for the name `mx` in cloned functions: everything is forwarded but the redirected calls."""

    def __init__(self, seam: SelectionSeam) -> None:
        self.softmax, self.sigmoid, self.argpartition = seam.softmax, seam.sigmoid, seam.argpartition

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def find_owner(block: nn.Module, switch: nn.Module | None, names: tuple[str, ...] | None = None) -> nn.Module | None:
    """The module whose call selects the experts: a child of `block` (one of `names`, if given), else the block."""
    children = [
        m
        for name, m in block.items()
        if isinstance(m, nn.Module) and m is not switch and (names is None or name in names)
    ]
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
        inner = None if value is None or isinstance(value, type | types.ModuleType) else _python_function(value)
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

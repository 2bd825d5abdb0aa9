"""A dry run: counts of what a strategy would have done, and nothing else."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from made_traces import E, K, scored

from mlx_moecache.demo import demo_model
from mlx_moecache.errors import UsageError
from mlx_moecache.generation import StepOptions, generate_step
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.observer import Ids, RoutedCall, Scores
from mlx_moecache.residents import Residents
from mlx_moecache.routing import CachePrior, Original, Price
from mlx_moecache.strategies import Strategy
from mlx_moecache.study.dry_run import DryRun
from mlx_moecache.study.recurrence import Counts
from mlx_moecache.study.simulator import replay_strategy
from mlx_moecache.study.trace import Trace


def caches(*slots: int, eviction: str = "lru") -> list[tuple[int, Residents]]:
    """Empty layers."""
    return [(K, Residents(E, s, eviction)) for s in slots]


def tell(run: DryRun, layer: int, phase: str, z: Scores | None, own: Ids, *, steps: bool = False) -> None:
    run.observe(RoutedCall(layer, phase, z, None, own, own, steps))


def observe_all(run: DryRun, trace: Trace) -> None:
    """The calls of a trace, in the order of the forward passes."""
    z = [x.scores()[0] for x in trace.layers]
    for call in range(len(trace.layers[0].decode)):
        for layer, x in enumerate(trace.layers):
            rows = slice(x.calls[call], x.calls[call + 1])
            tell(run, layer, "decode" if x.decode[call] else "prefill", z[layer][rows], x.own[rows])


@pytest.mark.parametrize("strategy", [CachePrior(0.3, 1), Price(0.1, 1)])
@pytest.mark.parametrize("eviction", ["lru", "decay"])
def test_estimates_what_the_simulator_finds_on_the_same_scores(
    tmp_path: Path, strategy: Strategy, eviction: str
) -> None:
    trace = scored(tmp_path, [12, *[1] * 40, 7, *[1] * 10])
    run = DryRun(strategy, caches(5, 5, eviction=eviction))
    observe_all(run, trace)
    estimate = run.estimate()
    biased, exact = (
        [replay_strategy(x, x.scores(), 5, eviction, s, {}).decode for x in trace.layers]
        for s in (strategy, Original())
    )
    assert (estimate.routing, estimate.tokens, estimate.selections) == (strategy.spec, 50, 50 * 2 * K)
    assert estimate.swapped == sum(c.swapped for c in biased) > 0
    assert estimate.misses_biased == sum(c.misses for c in biased)
    assert estimate.misses_exact == sum(c.misses for c in exact)
    assert estimate.saved == estimate.misses_exact - estimate.misses_biased > 0
    assert estimate.mass_lost == pytest.approx(sum(c.mass_lost for c in biased), rel=1e-4) and estimate.mass_lost > 0


def test_a_prompt_warms_the_caches_and_is_not_counted(tmp_path: Path) -> None:
    prompt = scored(tmp_path, [30, 1])
    run = DryRun(CachePrior(0.3, 1), caches(9, 9))
    cold = DryRun(CachePrior(0.3, 1), caches(9, 9))
    observe_all(run, prompt)
    for layer, x in enumerate(prompt.layers):
        tell(cold, layer, "decode", x.scores()[0][30:], x.own[30:])
    assert run.estimate().tokens == cold.estimate().tokens == 1
    assert run.estimate().misses_exact < cold.estimate().misses_exact == 2 * K


def test_several_rows_at_decode_are_counted_but_never_biased(tmp_path: Path) -> None:
    (layer,) = scored(tmp_path, [40], layers=1).layers
    run = DryRun(CachePrior(1.0, 0), caches(4))
    tell(run, 0, "decode", layer.scores()[0], layer.own)
    estimate = run.estimate()
    assert (estimate.tokens, estimate.swapped) == (40, 0)
    assert estimate.misses_exact == estimate.misses_biased > 0
    tell(run, 0, "decode", layer.scores()[0], layer.own, steps=True)  # these were routed one after the other
    assert run.estimate().tokens == 80 and run.estimate().swapped > 0


def test_layers_whose_experts_all_fit_are_left_out(tmp_path: Path) -> None:
    trace = scored(tmp_path, [1] * 20)
    half, both = DryRun(CachePrior(0.3, 1), caches(E, 5)), DryRun(CachePrior(0.3, 1), caches(5, 5))
    observe_all(half, trace)
    observe_all(both, trace)
    assert half.estimate().selections == 20 * K == both.estimate().selections // 2
    all_fit = DryRun(CachePrior(), caches(E))
    tell(all_fit, 0, "decode", np.zeros((1, E), dtype=np.float32), np.array([[0, 1, 2]]))
    assert all_fit.estimate().selections == Counts().selections == 0


def test_slots_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="slots must be from 3"):
        DryRun(CachePrior(), caches(2))
    with pytest.raises(UsageError, match="unknown eviction policy 'fifo'"):
        DryRun(CachePrior(), caches(5, eviction="fifo"))


def test_experts_that_compute_nothing_are_always_there_and_unseen_routers_left_out() -> None:
    run = DryRun(CachePrior(0.5, 1), caches(5, 5))
    rng = np.random.default_rng(0)
    for _ in range(30):
        z = rng.standard_normal((1, E + 2)).astype(np.float32)
        tell(run, 0, "decode", z, np.argsort(-z)[:, :K])
        tell(run, 1, "decode", None, np.array([[0, 1, 2]]))
    estimate = run.estimate()
    assert estimate.tokens == 30 and 0 < estimate.misses_biased < estimate.misses_exact < estimate.selections < 30 * K


@pytest.mark.parametrize("eviction", ["lru", "lfu", "decay"])
@pytest.mark.parametrize("slots", [8, 30, 45])
def test_the_exact_shadow_has_the_misses_of_the_cache_itself_cold_and_warm(slots: int, eviction: str) -> None:
    """A prompt of 200 tokens in two chunks needs more experts than 8 slots at once, so that it is served in waves."""
    options = MemoryOptions(slots=slots, max_context=256, prefill_step_size=128)
    model = OpenedModel(demo_model()).load(options, CacheOptions(routing="original", eviction=eviction))
    cache, rng = model.expert_cache, np.random.default_rng(3)
    for _ in range(2):  # the second reply finds what the first one left
        run = DryRun(CachePrior(0.2, 1), [(x.k, x.residents) for x in cache.layers])
        before = cache.stats.decode.misses
        with cache.observed_by(run):
            for _ in generate_step(mx.array(rng.integers(1, 400, 200)), model, StepOptions(max_tokens=12)):
                pass
        estimate = run.estimate()
        assert estimate.misses_exact == cache.stats.decode.misses - before > 0
        assert estimate.misses_biased < estimate.misses_exact
    cache.close()

"""Every routing strategy: its pseudocode, MLX against NumPy, the properties that must hold, and in real blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import reference_routing as reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import Shelf, experts_per_token, tiny_config

from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import (
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    Strategy,
    probabilities,
)
from mlx_moecache.strategies import BUDGET_STRENGTHS
from mlx_moecache.study import strategies_numpy

E, K = 12, 4
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

masks = hnp.arrays(np.bool_, E)
top_js = st.integers(0, K)
shares = st.integers(1, 512).map(lambda i: i / 1024)  # of router mass; sums of such are exact in float32


@dataclass(frozen=True)
class Token:
    """Scores of one token, its residents, and the running mean range."""

    z: Array
    p: Array
    mask: Mask
    mean_range: float

    @property
    def residents(self) -> set[int]:
        return set(np.flatnonzero(self.mask).tolist())

    @property
    def allowed(self) -> list[int]:
        return np.flatnonzero(self.z > -np.inf).tolist()

    @property
    def own(self) -> list[int]:
        """The router's own selection, best first."""
        return reference.order(self.z)[:K]

    def mass(self, experts: Collection[int]) -> float:
        return float(self.p[list(experts)].astype(np.float64).sum())

    def misses(self, experts: Collection[int]) -> int:
        return len(set(experts) - self.residents)


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    """Scores on a grid, p in the same order on another, some experts ruled out; D is such that no bonus makes a tie."""
    z = np.array(draw(st.lists(st.integers(-640, 640), min_size=E, max_size=E, unique=True)), dtype=np.float32) / 64
    masses = sorted(draw(st.lists(st.integers(1, 256), min_size=E, max_size=E, unique=True)))
    p = np.empty(E, dtype=np.float32)
    p[np.argsort(z)] = np.array(masses) / 1024
    out = list(draw(st.sets(st.integers(0, E - 1), max_size=E - K)))
    z[out], p[out] = -np.inf, 0
    return Token(z, p, draw(masks), draw(st.integers(1, 60)) * 0.31415927)


biased: dict[str, st.SearchStrategy[Strategy]] = {
    "cache-prior": st.builds(CachePrior, st.sampled_from([0.01, 0.1, 0.3, 1.0, 7.0]), top_js),
    "price": st.builds(Price, shares, top_js),
    "mass-budget": st.builds(MassBudget, shares, top_js),
    "bounded-regret": st.builds(BoundedRegret, st.integers(1, 6), shares),
    "max-rank": st.builds(MaxRank, top_js, st.integers(K + 1, E + 2)),
    "cumsum": st.builds(CumulativeThreshold, top_js, shares),
}
any_biased = st.one_of(*biased.values())


def ranking(strategy: Strategy, t: Token) -> Array:
    arrays = [mx.array(a.astype(np.float32)) for a in (t.z, t.p, t.mask)]
    return np.array(strategy.rank(*arrays, mx.array(t.mean_range, dtype=mx.float32), K))


def select(strategy: Strategy, t: Token) -> list[int]:
    """What the MLX ranking selects, best first."""
    return np.argsort(-ranking(strategy, t), kind="stable")[: strategy.kept(K)].tolist()


def expected(s: Strategy, t: Token) -> list[int]:
    """What the pseudocode selects."""
    z, p, residents, allowed = t.z.astype(np.float64), t.p.astype(np.float64), t.residents, t.allowed
    match s:
        case CachePrior():
            return reference.cache_prior(z, K, residents, t.mean_range, s.strength, s.top_j, allowed)[0]
        case Price():
            return reference.price(z, p, K, residents, s.delta, s.top_j, allowed)
        case MassBudget():
            strengths = BUDGET_STRENGTHS
            return reference.mass_budget(z, p, K, residents, t.mean_range, strengths, s.delta, s.top_j, allowed)
        case BoundedRegret():
            return reference.bounded_regret(z, p, K, residents, s.swaps, s.epsilon, allowed)
        case MaxRank():
            return reference.max_rank(z, K, residents & set(allowed), s.top_j, s.max_rank)
        case CumulativeThreshold():
            return reference.cumulative_threshold(z, p, K, residents & set(allowed), s.top_j, s.threshold)
        case _:
            return t.own[: s.kept(K)]


@pytest.mark.parametrize("name", biased)
class TestAgainstThePseudocode:
    @given(st.data())
    def test_mlx_selects_the_same(self, name: str, data: st.DataObject) -> None:
        strategy, token = data.draw(biased[name]), data.draw(tokens())
        assert set(select(strategy, token)) == set(expected(strategy, token))

    @given(st.data())
    def test_numpy_ranks_bit_for_bit_as_mlx(self, name: str, data: st.DataObject) -> None:
        strategy, t = data.draw(biased[name]), data.draw(tokens())
        D = np.float32(t.mean_range)
        ranked = strategies_numpy.rank(strategy, t.z, t.p, t.mask.astype(np.float32), D, K)
        np.testing.assert_array_equal(ranked, ranking(strategy, t))
        chosen = strategies_numpy.select(strategy, t.z, t.p, t.mask.astype(np.float32), D, K)
        assert chosen.tolist() == select(strategy, t)

    def test_rows_are_ranked_apart_whatever_the_leading_axes(self, name: str) -> None:
        rng = np.random.default_rng(len(name))
        z = rng.standard_normal((2, 3, E)).astype(np.float32)
        z[0, 1, [2, 5]] = -np.inf
        p = np.array(probabilities(mx.array(z), K, logits=True))
        mask = rng.integers(0, 2, z.shape).astype(np.float32)
        mean = rng.uniform(1, 5, (2, 3, 1)).astype(np.float32)
        strategy = DEFAULTS[name]
        for resident, D in ((mask, mean), (mask[0, 0], mean), (mask, mean[0, 0, 0]), (mask[0, 0], mean[0, 0, 0])):
            ranked = np.array(strategy.rank(mx.array(z), mx.array(p), mx.array(resident), mx.array(D), K))
            assert ranked.shape == z.shape
            for i in np.ndindex(2, 3):
                m, d = np.broadcast_to(resident, z.shape)[i], np.broadcast_to(D, (2, 3, 1))[i][0]
                row = strategies_numpy.rank(strategy, z[i], p[i], m, d, K)
                np.testing.assert_array_equal(ranked[i], row)


DEFAULTS: dict[str, Strategy] = {
    "cache-prior": CachePrior(0.2, 2),
    "price": Price(0.05, 1),
    "mass-budget": MassBudget(0.1, 1),
    "bounded-regret": BoundedRegret(2, 0.1),
    "max-rank": MaxRank(1, 9),
    "cumsum": CumulativeThreshold(1, 0.8),
}


class TestWhatIsSelected:
    @given(any_biased, tokens())
    def test_k_distinct_experts_of_which_none_is_ruled_out(self, strategy: Strategy, t: Token) -> None:
        ranked = ranking(strategy, t)
        chosen = select(strategy, t)
        assert len(set(chosen)) == K and set(chosen) <= set(t.allowed)
        assert np.isneginf(ranked[np.isneginf(t.z)]).all()
        assert not np.isnan(ranked).any()

    @given(any_biased, tokens())
    def test_only_residents_come_in_and_only_missing_experts_go(self, strategy: Strategy, t: Token) -> None:
        chosen, own = set(select(strategy, t)), set(t.own)
        assert chosen - own <= t.residents
        assert not (own - chosen) & t.residents

    @given(st.one_of(*(v for k, v in biased.items() if k != "bounded-regret")), tokens())
    def test_the_top_j_stay(self, strategy: Strategy, t: Token) -> None:
        assert not isinstance(strategy, Original | Pruning | BoundedRegret)
        assert set(t.own[: strategy.top_j]) <= set(select(strategy, t))

    @pytest.mark.parametrize("resident", [True, False])
    @given(any_biased, tokens())
    def test_all_or_no_residents_change_nothing(self, resident: bool, strategy: Strategy, t: Token) -> None:
        t = replace(t, mask=np.full(E, resident))
        assert set(select(strategy, t)) == set(t.own)

    @pytest.mark.parametrize(
        "strategy",
        [CachePrior(0.0, 2), Price(0.0, 1), MassBudget(0.0, 2), BoundedRegret(0, 0.5), CumulativeThreshold(2, 0.0)],
        ids=lambda s: s.spec,
    )
    @given(tokens())
    def test_the_weakest_setting_changes_nothing(self, strategy: Strategy, t: Token) -> None:
        assert strategy.is_exact
        assert set(select(strategy, t)) == set(t.own)

    @given(tokens(), top_js, st.integers(0, K))
    def test_max_rank_up_to_k_changes_nothing(self, t: Token, top_j: int, most: int) -> None:
        assert set(select(MaxRank(top_j, most), t)) == set(t.own)

    @given(tokens())
    def test_bounded_regret_of_0_only_takes_an_equal_expert(self, t: Token) -> None:
        assert set(select(BoundedRegret(4, 0.0), t)) == set(t.own)  # p are distinct here

    @given(tokens(), st.integers(1, K + 2))
    def test_pruning_keeps_the_best(self, t: Token, experts: int) -> None:
        strategy = Pruning(experts)
        assert select(strategy, t) == t.own[: min(experts, K)]
        assert not strategy.uses_residents and not strategy.is_exact

    def test_the_routers_order_of_ties_may_stay(self) -> None:
        """Price rounds small p to equal values: the J best stay ahead of residents that round to the same."""
        z = np.array([20.0, -10.0, -12.0, -13.0], dtype=np.float32)
        p = probabilities(mx.array(z), K, logits=True)
        ranked = np.array(Price(0.5, 2).rank(mx.array(z), p, mx.array([0.0, 0, 1, 1]), mx.array(1.0), 2))
        assert set(np.argsort(-ranked)[:2].tolist()) == {0, 1} and (ranked[2:] < ranked[1]).all()


class TestNeverMoreThanTheBudget:
    @given(biased["mass-budget"], tokens())
    def test_mass_budget_loses_at_most_delta(self, strategy: MassBudget, t: Token) -> None:
        assert t.mass(t.own) - t.mass(select(strategy, t)) <= strategy.delta

    @given(st.floats(0, 0.3), hnp.arrays(np.float32, E, elements=st.floats(-8, 8, width=32)), masks)
    def test_mass_budget_keeps_to_delta_whatever_ties(self, delta: float, z: Array, mask: Mask) -> None:
        p = np.array(probabilities(mx.array(z), K, logits=True))
        t = Token(z, p, mask, 4.0)
        assert t.mass(np.argpartition(-z, K - 1)[:K]) - t.mass(select(MassBudget(delta, 1), t)) <= delta + 1e-6

    @given(biased["bounded-regret"], tokens())
    def test_bounded_regret_swaps_few_and_each_for_little(self, strategy: BoundedRegret, t: Token) -> None:
        chosen, own = set(select(strategy, t)), set(t.own)
        out = sorted(own - chosen, key=lambda e: t.p[e])
        into = sorted(chosen - own, key=lambda e: -t.p[e])
        assert len(out) <= strategy.swaps
        assert all(t.p[a] - t.p[b] <= strategy.epsilon for a, b in zip(out, into, strict=True))

    @given(biased["price"], tokens())
    def test_price_gives_up_no_expert_for_one_that_is_worse_by_more_than_delta(self, strategy: Price, t: Token) -> None:
        chosen, own = set(select(strategy, t)), set(t.own)
        assert all(t.p[a] - t.p[b] <= strategy.delta for a in own - chosen for b in chosen - own)

    @given(biased["max-rank"], tokens())
    def test_max_rank_takes_nothing_behind_rank_m(self, strategy: MaxRank, t: Token) -> None:
        assert set(select(strategy, t)) <= set(reference.order(t.z)[: max(K, strategy.max_rank)])


class TestSymmetries:
    @given(any_biased, tokens(), st.integers(-8, 8))
    def test_a_constant_added_to_all_logits_selects_the_same(self, strategy: Strategy, t: Token, shift: int) -> None:
        assert set(select(strategy, replace(t, z=t.z + np.float32(shift)))) == set(select(strategy, t))

    @given(any_biased, tokens(), st.integers(-4, 4))
    def test_scaling_logits_and_range_selects_the_same(self, strategy: Strategy, t: Token, power: int) -> None:
        a = 2.0**power
        scaled = replace(t, z=t.z * np.float32(a), mean_range=t.mean_range * a)
        assert set(select(strategy, scaled)) == set(select(strategy, t))

    @given(any_biased, tokens(), st.permutations(range(E)))
    def test_expert_numbers_do_not_matter(self, strategy: Strategy, t: Token, order: list[int]) -> None:
        permuted = replace(t, z=t.z[order], p=t.p[order], mask=t.mask[order])
        assert {order[e] for e in select(strategy, permuted)} == set(select(strategy, t))

    @given(tokens(), st.data())
    def test_a_stronger_bias_never_means_more_misses_now(self, t: Token, data: st.DataObject) -> None:
        j = data.draw(top_js)
        weak, strong = sorted(data.draw(st.tuples(shares, shares)))
        pairs: list[tuple[Strategy, Strategy]] = [
            (CachePrior(weak * 8, j), CachePrior(strong * 8, j)),
            (Price(weak, j), Price(strong, j)),
            (MassBudget(weak, j), MassBudget(strong, j)),
            (BoundedRegret(2, weak), BoundedRegret(2, strong)),
            (BoundedRegret(1, strong), BoundedRegret(3, strong)),
            (CumulativeThreshold(j, weak), CumulativeThreshold(j, strong)),
            (MaxRank(j, int(weak * 24)), MaxRank(j, int(strong * 24))),
        ]
        for weaker, stronger in pairs:
            misses = [t.misses(select(s, t)) for s in (Original(), weaker, stronger)]
            assert misses == sorted(misses, reverse=True), (weaker, stronger)


class TestProbabilities:
    @given(hnp.arrays(np.float32, E, elements=st.floats(-30, 30, width=32)), st.sets(st.integers(0, E - 1), max_size=8))
    def test_of_logits_are_their_softmax_over_the_experts_not_ruled_out(self, z: Array, out: set[int]) -> None:
        z[list(out)] = -np.inf
        p = np.array(probabilities(mx.array(z), K, logits=True))
        np.testing.assert_allclose(p, reference.softmax(z.astype(np.float64)), rtol=1e-4, atol=1e-30)

    def test_of_scores_are_their_shares_and_never_negative(self) -> None:
        p = probabilities(mx.array([[0.6, -0.1, 0.2, -mx.inf], [-1.0, -2.0, -mx.inf, -mx.inf]]), 2, logits=False)
        np.testing.assert_allclose(np.array(p), [[0.75, 0, 0.25, 0], [0, 0, 0, 0]], rtol=1e-6)

    def test_of_scores_are_shares_of_the_k_best_however_many_experts_there_are(self) -> None:
        few = [0.6, 0.4, 0.3]
        p = np.array(probabilities(mx.array([[*few, *[0.1] * 253]]), 2, logits=False))[0]
        np.testing.assert_allclose(p[:4], [0.6, 0.4, 0.3, 0.1], rtol=1e-6)
        np.testing.assert_array_equal(np.array(probabilities(mx.array([few]), 2, logits=False))[0], p[:3])

    def test_of_scores_do_not_know_a_constant_in_the_correction_biases(self) -> None:
        z = mx.array([[0.5, 0.25, 0.125, 0.0]])
        p = [np.array(probabilities(z + c, 2, logits=False, offset=mx.array(c))) for c in (0.0, 8.0)]
        np.testing.assert_array_equal(p[0], p[1])


LIVE: list[Strategy] = [
    *(CachePrior(1.0, 1), Price(0.2, 1), MassBudget(0.2, 1), BoundedRegret(2, 0.2)),
    *(MaxRank(1, 8), CumulativeThreshold(1, 0.9), Pruning(1)),
]


class TestInARealBlock:
    @pytest.mark.parametrize("strategy", LIVE, ids=lambda s: s.name)
    @pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "phimoe", "qwen3_moe"])
    def test_it_selects_what_the_reference_does_with_the_models_own_weights(
        self, shelf: Shelf, model_type: str, strategy: Strategy
    ) -> None:
        config = tiny_config(model_type)
        k = experts_per_token(config)
        opened = OpenedModel(shelf.checkpoint(model_type))
        model = opened.load(MemoryOptions(slots=max(k + 1, 3)), CacheOptions(routing=strategy))
        block = opened.blocks[-1]
        stock = dict(shelf.stock(shelf.checkpoint(model_type)).named_modules())[block.path.rpartition(".")[0]]
        calls: list[tuple[list[int], Array, set[int]]] = []
        inner = block._run

        def overhear(x: mx.array, indices: mx.array) -> mx.array:
            residents = set(block.layer.residents.experts)
            y = inner(x, indices)
            calls.append(
                (np.array(indices).reshape(-1).tolist(), np.array(y).reshape(indices.shape[-1], -1), residents)
            )
            return y

        block._run = overhear
        rng, ranges, swapped, decided = np.random.default_rng(7), [], 0, 0
        router = stock.gate
        for _ in range(25):
            x = rng.standard_normal((1, 1, 128)).astype(np.float32)
            out = block.block(mx.array(x))
            chosen, y, residents = calls[-1]
            z = x.reshape(-1).astype(np.float64) @ np.array(router.weight, dtype=np.float64).T
            assert len(chosen) == strategy.kept(k)
            ranges.append(np.ptp(z))
            z32, p = z.astype(np.float32), reference.softmax(z).astype(np.float32)
            resident = np.isin(np.arange(len(z)), list(residents)).astype(np.float32)
            ranked = strategies_numpy.rank(strategy, z32, p, resident, np.float32(np.mean(ranges)), k)
            lead = np.diff(np.sort(-ranked)[len(chosen) - 1 : len(chosen) + 1])[0]
            if lead > 1e-5:  # otherwise rounding decides
                decided += 1
                assert set(chosen) == set(np.argsort(-ranked)[: len(chosen)].tolist())
            swapped += len(set(chosen) - set(reference.order(z)[:k]))
            weights = reference.mixing_weights(model_type, z, chosen, config)
            by_hand = (y.astype(np.float64) * weights[:, None]).sum(axis=0)
            if "shared_expert" in stock:
                gate = mx.sigmoid(stock.shared_expert_gate(mx.array(x)))
                by_hand = by_hand + np.array(gate * stock.shared_expert(mx.array(x))).reshape(-1)
            np.testing.assert_allclose(np.array(out).reshape(-1), by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())
        assert decided >= 20
        assert model.expert_cache.stats.decode.swapped == swapped
        assert (swapped > 0) == strategy.uses_residents

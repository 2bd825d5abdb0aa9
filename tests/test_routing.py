"""Cache-Prior and the running mean against a plain NumPy reference, and how users name a strategy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import reference_routing as reference
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_moecache.errors import UsageError
from mlx_moecache.routing import (
    NAMES,
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    RunningRange,
    Strategy,
    default_strength,
    default_top_j,
    parse_routing,
)

Array = npt.NDArray[np.float32]
# Multiples of 1/64 keep sums exact in float32, so that only equal scores tie.
scores = hnp.arrays(np.float32, 12, elements=st.integers(-640, 640).map(lambda i: np.float32(i / 64)), unique=True)
masks = hnp.arrays(np.bool_, 12)
strengths = st.sampled_from([0.0, 0.0625, 0.25, 0.5, 1.0, 4.0])
means = st.integers(1, 64).map(lambda i: i / 4)
top_js = st.integers(0, 4)
K = 4


def rank(strategy: CachePrior, z: Array, mask: npt.NDArray[np.bool_], mean: float) -> Array:
    resident, mean_range = mx.array(mask.astype(np.float32)), mx.array(mean, dtype=mx.float32)
    return np.array(strategy.rank(mx.array(z), None, resident, mean_range, K))


def selected(z: Array, k: int = K) -> set[int]:
    return set(np.argsort(-z, kind="stable")[:k].tolist())


class TestRanking:
    @given(scores, masks, means, strengths, top_js)
    def test_selection_equals_the_reference(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int
    ) -> None:
        resident = set(np.flatnonzero(mask).tolist())
        expected, lead = reference.cache_prior(z.astype(np.float64), K, resident, mean, strength, top_j, range(len(z)))
        assume(lead > 0)
        assert selected(rank(CachePrior(strength, top_j), z, mask, mean)) == set(expected)

    @given(scores, masks, means, strengths, top_js)
    def test_the_bonus_is_strength_times_mean_range_for_residents_and_the_top_j(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int
    ) -> None:
        favoured = mask.copy()
        favoured[np.argsort(-z)[:top_j]] = True
        bonus = rank(CachePrior(strength, top_j), z, mask, mean) - z
        np.testing.assert_array_equal(bonus, np.where(favoured, np.float32(strength * mean), np.float32(0)))

    @given(scores, masks, means, st.floats(0, 1e3, width=32), st.integers(1, 4))
    def test_the_top_j_are_selected_however_strong_the_bias(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int
    ) -> None:
        ranked = rank(CachePrior(strength, top_j), z, mask, mean)
        assert (ranked > ranked[np.argsort(-z)[top_j - 1]]).sum() < top_j  # none of the others passed them

    @given(scores, masks, means, strengths, top_js)
    def test_order_within_residents_and_within_the_others_stays(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int
    ) -> None:
        ranked = rank(CachePrior(strength, top_j), z, mask, mean)
        for group in (mask, ~mask):
            assert (np.diff(ranked[group][np.argsort(z[group])]) > 0).all()

    @given(scores, masks, means, strengths, top_js, st.integers(-4, 4))
    def test_scaling_the_scores_and_their_range_scales_the_ranking(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int, power: int
    ) -> None:
        a, strategy = np.float32(2.0**power), CachePrior(strength, top_j)
        np.testing.assert_array_equal(rank(strategy, z * a, mask, mean * float(a)), rank(strategy, z, mask, mean) * a)

    @given(scores, masks, means, strengths, top_js, st.integers(-8, 8))
    def test_adding_a_constant_to_all_scores_selects_the_same(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int, shift: int
    ) -> None:
        strategy = CachePrior(strength, top_j)
        shifted = rank(strategy, z + np.float32(shift), mask, mean)
        np.testing.assert_array_equal(shifted - np.float32(shift), rank(strategy, z, mask, mean))

    @given(scores, masks, means, strengths, top_js, st.permutations(range(12)))
    def test_expert_numbers_do_not_matter(
        self, z: Array, mask: npt.NDArray[np.bool_], mean: float, strength: float, top_j: int, order: list[int]
    ) -> None:
        strategy = CachePrior(strength, top_j)
        np.testing.assert_array_equal(rank(strategy, z[order], mask[order], mean), rank(strategy, z, mask, mean)[order])

    @given(scores, st.booleans(), means, strengths, top_js)
    def test_a_constant_mask_changes_no_order(
        self, z: Array, resident: bool, mean: float, strength: float, top_j: int
    ) -> None:
        ranked = rank(CachePrior(strength, top_j), z, np.full(12, resident), mean)
        assert (np.argsort(ranked) == np.argsort(z)).all()

    @given(scores, masks, means, top_js)
    def test_strength_0_changes_no_bit(self, z: Array, mask: npt.NDArray[np.bool_], mean: float, top_j: int) -> None:
        assert rank(CachePrior(0.0, top_j), z, mask, mean).tobytes() == z.tobytes()

    def test_strength_1_is_not_cache_only(self) -> None:
        """A token whose range is above the mean still gets an absent expert."""
        z = np.array([10.0, 8.0, 7.0, -10.0], dtype=np.float32)
        mask = np.array([False, False, False, True])
        assert selected(rank(CachePrior(1.0, 1), z, mask, mean=5.0), k=2) == {0, 1}
        assert selected(rank(CachePrior(1.0, 1), z, mask, mean=30.0), k=2) == {0, 3}

    def test_rows_are_ranked_apart(self) -> None:
        z = np.array([[3, 1, 2, 0], [0, 2, 1, 3]], dtype=np.float32)
        mask, strategy = np.array([False, True, False, False]), CachePrior(0.5, 1)
        both = np.array(strategy.rank(mx.array(z), None, mx.array(mask.astype(np.float32)), mx.array(2.0), 2))
        np.testing.assert_array_equal(both, np.stack([rank(strategy, row, mask, 2.0) for row in z]))


class TestRunningRange:
    @given(hnp.arrays(np.float32, (9, 6), elements=st.floats(-50, 50, width=32)), st.data())
    def test_the_mean_includes_every_token_so_far_however_they_are_fed(self, z: Array, data: st.DataObject) -> None:
        running, seen = RunningRange(), 0
        while seen < len(z):
            n = data.draw(st.integers(1, len(z) - seen))
            mean = running.observe(mx.array(z[seen : seen + n]))
            seen += n
            expected = reference.inclusive_mean(
                [reference.token_range(row, range(6)) for row in z[:seen].astype(float)]
            )
            assert mean.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def test_experts_that_were_ruled_out_do_not_widen_the_range(self) -> None:
        z = mx.array([[5.0, -9.0, 1.0], [7.0, 6.0, 99.0]])
        dropped = mx.array([[False, True, False], [False, False, True]])
        assert RunningRange().observe(mx.where(dropped, -mx.inf, z)).item() == pytest.approx((4 + 1) / 2)

    def test_reset_forgets_all_tokens(self) -> None:
        running = RunningRange()
        running.observe(mx.array([[0.0, 100.0]]))
        running.reset()
        assert running.observe(mx.array([[0.0, 2.0]])).item() == 2.0


def parse(routing: str | Strategy, strength: float | None = None, top_j: int | None = None, k: int = 4) -> Strategy:
    return parse_routing(routing, strength=strength, top_j=top_j, k=k, slots=30, experts=60)


class TestNamingAStrategy:
    @pytest.mark.parametrize(
        ("routing", "strength", "top_j", "expected"),
        [
            ("original", None, None, Original()),
            ("original", 0.0, None, Original()),
            ("cache-prior", None, None, CachePrior(0.1, 2)),
            ("cache-prior", 0.05, 1, CachePrior(0.05, 1)),
            ("cache-prior:strength=0.3,j=4", None, None, CachePrior(0.3, 4)),
            ("cache-prior:j=0", 0.2, None, CachePrior(0.2, 0)),
            ("price", None, None, Price(0.02, 1)),
            ("price:delta=0.05,j=0", None, None, Price(0.05, 0)),
            ("price", None, 3, Price(0.02, 3)),
            ("mass-budget", None, None, MassBudget(0.02, 2)),
            ("mass-budget:delta=1e-3,j=1", None, None, MassBudget(0.001, 1)),
            ("bounded-regret", None, None, BoundedRegret(2, 0.02)),
            ("bounded-regret:epsilon=0.05", None, None, BoundedRegret(2, 0.05)),
            ("max-rank", None, None, MaxRank(2, 8)),
            ("max-rank:m=12", None, 1, MaxRank(1, 12)),
            ("cumsum", None, None, CumulativeThreshold(2, 0.5)),
            ("cumsum:j=1,p=0.75", None, None, CumulativeThreshold(1, 0.75)),
            ("pruning", None, None, Pruning(3)),
            ("pruning:k=4", None, None, Pruning(4)),
            (CachePrior(0.7, 3), None, None, CachePrior(0.7, 3)),
            (Original(), None, None, Original()),
        ],
    )
    def test_what_is_meant(
        self, routing: str | Strategy, strength: float | None, top_j: int | None, expected: Strategy
    ) -> None:
        assert parse(routing, strength, top_j) == expected

    @pytest.mark.parametrize(
        ("routing", "strength", "top_j", "said"),
        [
            ("belady", None, None, "unknown routing 'belady' (choose cache-prior, price, "),
            ("", None, None, "unknown routing ''"),
            ("cache-prior:lambda=1", None, None, "unknown parameter 'lambda'"),
            ("cache-prior:strength", None, None, "needs a number, not ''"),
            ("cache-prior:strength=much", None, None, "needs a number, not 'much'"),
            ("cache-prior:j=1.5", None, None, "j needs a whole number, not '1.5'"),
            ("cache-prior:strength=1,strength=2", None, None, "strength is given twice"),
            ("cache-prior:delta=1", None, None, "'delta' of routing 'cache-prior' (allowed: strength, j)"),
            ("cache-prior:strength=-1", None, None, "strength of cache-prior must be a finite number of at least 0"),
            ("cache-prior:strength=nan", None, None, "strength of cache-prior must be"),
            ("cache-prior", float("inf"), None, "strength of cache-prior must be"),
            ("price", 0.1, None, "price routing takes no strength; write for example price:delta=0.02,j=1"),
            ("price:delta=2", None, None, "delta of price must be a finite number from 0 to 1, not 2.0"),
            ("mass-budget:delta=-0.1", None, None, "delta of mass-budget must be"),
            ("mass-budget:j=5", None, None, "at most the model's 4 experts per token, not 5"),
            (
                "bounded-regret",
                None,
                1,
                "bounded-regret routing takes no top-j; write for example bounded-regret:swaps=",
            ),
            ("bounded-regret:swaps=-1", None, None, "swaps of bounded-regret must be a whole number of at least 0"),
            ("max-rank:m=x", None, None, "m needs a whole number, not 'x'"),
            ("cumsum:p=1.5", None, None, "p of cumsum must be a finite number from 0 to 1"),
            ("pruning:k=0", None, None, "k of pruning must be a whole number of at least 1"),
            ("pruning:k=5", None, None, "at most the model's 4 experts per token, not 5"),
            ("cache-prior", None, -1, "top-j must be"),
            ("cache-prior", None, 5, "at most the model's 4 experts per token, not 5"),
            ("cache-prior:strength=0.1", 0.2, None, "strength is given twice"),
            ("cache-prior:j=1", None, 1, "j is given twice"),
            ("original", 0.1, None, "takes no strength"),
            ("original", None, 2, "takes no strength and no top-j"),
            ("original:j=1", None, None, "'j' of routing 'original' (it takes none)"),
            (CachePrior(), 0.1, None, "part of a routing object"),
            (CachePrior(top_j=5), None, None, "at most the model's 4"),
        ],
    )
    def test_what_is_refused_and_why(
        self, routing: str | Strategy, strength: float | None, top_j: int | None, said: str
    ) -> None:
        with pytest.raises(UsageError) as error:
            parse(routing, strength, top_j)
        assert said in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize(("k", "top_j"), [(1, 0), (2, 1), (3, 1), (4, 2), (6, 2), (8, 2)])
    def test_the_default_of_j_is_the_papers(self, k: int, top_j: int) -> None:
        assert default_top_j(k) == top_j
        assert parse("cache-prior", k=k) == CachePrior(0.1, top_j)

    @pytest.mark.parametrize(("slots", "strength"), [(60, 0.1), (30, 0.1), (20, 0.1), (10, 0.05), (4, 0.02), (0, 0.0)])
    def test_the_default_strength_falls_below_a_third_of_the_experts(self, slots: int, strength: float) -> None:
        assert default_strength(slots, 60) == pytest.approx(strength)

    def test_the_default_strength_is_a_number_that_people_would_write(self) -> None:
        assert default_strength(11, 60) == 0.055
        assert default_strength(1, 7) == 0.04286 and default_strength(1, 20_000) == 1.5e-05

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("k", [1, 2, 4, 8])
    def test_every_name_has_defaults_for_every_model_and_its_spec_names_it_again(self, name: str, k: int) -> None:
        strategy = parse(name, k=k)
        assert strategy.name == name
        assert parse(strategy.spec, k=k) == strategy
        assert ":" not in strategy.spec or set(
            strategy.spec.partition(":")[2].replace(",", "=").split("=")[::2]
        ) == set(strategy.parameters)

    @given(st.floats(0, 10), st.integers(0, 4))
    def test_a_spec_keeps_every_digit(self, strength: float, top_j: int) -> None:
        assert parse(CachePrior(strength, top_j).spec) == CachePrior(strength, top_j)

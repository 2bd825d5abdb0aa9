"""Eviction policies against list-based references, and victims."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.errors import UsageError
from mlx_moecache.eviction import EVICTION, Decay, EvictionPolicy, make_policy, victims

EXPERTS = 8
Call = tuple[int, list[tuple[int, int]], list[int]]  # tokens, uses, experts that leave afterwards


class Reference:
    """Everything that was ever told, sorted whenever somebody asks; subclasses say by what."""

    def __init__(self) -> None:
        self.stamp: dict[int, int] = {}  # residents -> when last selected
        self.seen: list[tuple[int, int, int]] = []  # (token, expert, count) of every selection
        self.since: dict[int, int] = {}  # residents -> length of `seen` when they came
        self.last: dict[int, int] = {}  # residents -> token of their last use
        self.token = self.clock = 0

    def advance(self, tokens: int) -> None:
        self.token += tokens

    def insert(self, expert: int) -> None:
        self.since[expert] = len(self.seen)
        self._stamp(expert)

    def remove(self, expert: int) -> None:
        del self.stamp[expert]

    def touch(self, expert: int, count: int) -> None:
        self.seen.append((self.token, expert, count))
        if expert in self.stamp:
            self._stamp(expert)

    def order(self) -> list[int]:
        return sorted(self.stamp, key=lambda e: (self.value(e), self.stamp[e]))

    def value(self, expert: int) -> Fraction:
        raise NotImplementedError

    def _stamp(self, expert: int) -> None:
        self.clock += 1
        self.stamp[expert], self.last[expert] = self.clock, self.token


class LRUReference(Reference):
    def value(self, expert: int) -> Fraction:
        return Fraction(0)


class LFUReference(Reference):
    def value(self, expert: int) -> Fraction:
        return Fraction(sum(n for _, e, n in self.seen[self.since[expert] :] if e == expert))


class DecayReference(Reference):
    def value(self, expert: int) -> Fraction:
        return sum((n * Fraction(49, 50) ** (self.token - t) for t, e, n in self.seen if e == expert), Fraction(0))


class LFRUReference(Reference):
    def value(self, expert: int) -> Fraction:
        count = sum(n for _, e, n in self.seen if e == expert)
        return Fraction(count, self.token - self.last[expert] + 1)


REFERENCES: dict[str, Callable[[], Reference]] = {
    "lru": LRUReference,
    "lfu": LFUReference,
    "decay": DecayReference,
    "lfru": LFRUReference,
}
experts = st.integers(0, EXPERTS - 1)


def calls(tokens: st.SearchStrategy[int]) -> st.SearchStrategy[list[Call]]:
    """Calls of so many tokens, which select each of their experts up to that often, and who leaves after them."""

    def call(n: int) -> st.SearchStrategy[Call]:
        uses = st.lists(st.tuples(experts, st.integers(1, n)), max_size=5, unique_by=lambda x: x[0])
        return st.tuples(st.just(n), uses, st.lists(experts, max_size=2, unique=True))

    return st.lists(tokens.flatmap(call), max_size=30)


one_token_calls = calls(st.just(1))


def replay(policy: EvictionPolicy, reference: Reference, happened: list[Call]) -> set[int]:
    """Feed both with the same events and compare them after each; return the experts that are there at the end.

    Every other expert that is selected becomes resident, so that policies also hear of experts that are not.
    """
    there: set[int] = set()
    for tokens, uses, leaving in happened:
        for expert in [e for e, _ in uses if e not in there][::2]:
            there.add(expert)
            policy.insert(expert)
            reference.insert(expert)
        policy.advance(tokens)
        reference.advance(tokens)
        for expert, count in uses:
            policy.touch(expert, count)
            reference.touch(expert, count)
        assert list(policy.order()) == reference.order()
        for expert in there.intersection(leaving):
            there.remove(expert)
            policy.remove(expert)
            reference.remove(expert)
        assert list(policy.order()) == reference.order()
    return there


@pytest.mark.parametrize("name", list(EVICTION))
class TestEveryPolicy:
    @given(happened=one_token_calls)
    def test_the_order_is_that_of_its_reference(self, name: str, happened: list[Call]) -> None:
        replay(make_policy(name), REFERENCES[name](), happened)

    @given(happened=one_token_calls, n=st.integers(-1, EXPERTS + 1), protected=st.frozensets(experts))
    def test_victims_come_in_order_and_are_never_protected(
        self, name: str, happened: list[Call], n: int, protected: frozenset[int]
    ) -> None:
        policy, reference = make_policy(name), REFERENCES[name]()
        there = replay(policy, reference, happened)
        found = victims(policy, n, protected)
        assert found == [e for e in reference.order() if e not in protected][: max(n, 0)]
        assert set(policy.order()) == there  # naming victims changes nothing


@pytest.mark.parametrize("name", ["lru", "lfu", "lfru"])
@given(happened=calls(st.sampled_from([1, 2, 7])))
def test_calls_of_several_tokens_are_counted_as_by_the_reference(name: str, happened: list[Call]) -> None:
    replay(make_policy(name), REFERENCES[name](), happened)


@pytest.mark.parametrize(
    ("name", "order"),
    [("lru", [1, 0]), ("lfu", [0, 1]), ("decay", [1, 0]), ("lfru", [1, 0])],
)
def test_an_expert_that_comes_back_has_a_history_only_where_the_policy_says_so(name: str, order: list[int]) -> None:
    policy = make_policy(name)
    for expert in (0, 1):
        policy.insert(expert)
        policy.advance(1)
        policy.touch(expert, 9)
    policy.remove(0)
    policy.insert(0)
    policy.advance(1)
    policy.touch(0)
    assert list(policy.order()) == order


class TestDecay:
    @pytest.mark.parametrize("decay", [1e-3, 0.5, 0.97, 0.995, 1.0])
    def test_ten_thousand_tokens_leave_the_order_that_shrinking_every_count_gives(self, decay: float) -> None:
        rng, policy = random.Random(0), Decay(decay)
        counts = dict.fromkeys(range(EXPERTS), 0.0)
        for e in counts:
            policy.insert(e)
        for i in range(10_000):
            used = rng.sample(range(EXPERTS), 2)
            policy.advance(1)
            for e in counts:
                counts[e] *= decay
            for e in used:
                policy.touch(e)
                counts[e] += 1
            if i % 97 == 0:
                values = [counts[e] for e in policy.order()]
                assert all(a <= b * (1 + 1e-9) + 1e-60 for a, b in pairwise(values))

    @pytest.mark.parametrize("tokens", [3, 500, 10**6])
    def test_selections_of_a_long_call_count_as_if_spread_evenly(self, tokens: int) -> None:
        spread, once = Decay(0.9), Decay(0.9)
        for policy in (spread, once):
            policy.insert(0)
            policy.advance(1)
            policy.touch(0)
            policy.insert(1)
        spread.advance(tokens)
        spread.touch(1, tokens)  # in every token: worth (1 - 0.9 ** tokens) / 0.1
        share = (1 - 0.9**tokens) / 0.1
        once.advance(tokens)
        for _ in range(tokens if tokens < 1000 else 1000):
            once.touch(1, max(1, tokens // 1000))
        assert spread._count[1] == pytest.approx(once._count[1])
        assert spread._count[1] / spread._growth == pytest.approx(share)

    def test_no_more_tokens_means_more_of_the_same_token(self) -> None:
        together, apart = Decay(0.9), Decay(0.9)
        together.advance(1)
        apart.advance(1)
        for policy, tokens in ((together, None), (apart, 0)):
            for expert in (3, 4):
                policy.touch(expert)
                if tokens is not None:
                    policy.advance(tokens)
        assert together._count == apart._count


class TestNames:
    @pytest.mark.parametrize("name", list(EVICTION))
    def test_every_name_makes_its_policy(self, name: str) -> None:
        assert type(make_policy(name)) is EVICTION[name]

    def test_the_factor_of_decay_can_be_given(self) -> None:
        for spec, factor in (("decay:0.5", 0.5), ("decay", 0.98), ("decay:1", 1.0)):
            policy = make_policy(spec)
            policy.advance(1)
            policy.touch(0)
            policy.advance(1)
            policy.touch(1)
            assert isinstance(policy, Decay)
            assert policy._count[0] / policy._count[1] == pytest.approx(factor)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("fifo", "unknown eviction policy 'fifo' (choose lru, lfu, decay, lfru)"),
            ("", "unknown eviction policy ''"),
            ("lru:2", "eviction policy lru takes no parameter, but 'lru:2' gives one; leave '2' out"),
            ("decay:0", "must be above 0 and at most 1, not '0' (usual: 0.97 to 0.995, default: 0.98)"),
            ("decay:1.5", "must be above 0 and at most 1, not '1.5'"),
            ("decay:nan", "must be above 0 and at most 1, not 'nan'"),
            ("decay:", "must be above 0 and at most 1, not ''"),
            ("decay:fast", "must be above 0 and at most 1, not 'fast'"),
        ],
    )
    def test_what_is_not_a_policy_is_refused_with_what_is(self, spec: str, message: str) -> None:
        with pytest.raises(UsageError) as error:
            make_policy(spec)
        assert message in str(error.value)


# ---- state ----


@pytest.mark.parametrize("spec", [*EVICTION, "decay:1", "decay:0.5"])
def test_a_restored_policy_goes_on_as_the_one_whose_state_it_has(spec: str) -> None:
    rng = random.Random(spec)
    policy, residents = make_policy(spec), list(range(5))
    for expert in residents:
        policy.insert(expert)
    copies: list[EvictionPolicy] = []
    for step in range(400):
        if step in (7, 150, 300):
            copies.append(make_policy(spec))
            copies[-1].restore(json.loads(json.dumps(policy.state)))
        tokens = rng.choice((1, 1, 1, 2000))
        uses = [(rng.randrange(EXPERTS), rng.randrange(1, 4)) for _ in range(rng.randrange(4))]
        for p in (policy, *copies):
            p.advance(tokens)
            for expert, count in uses:
                p.touch(expert, count)
            assert list(p.order()) == list(policy.order())
        (out,) = victims(policy, 1, ())
        assert all(victims(p, 1, ()) == [out] for p in copies)
        came = rng.choice([e for e in range(EXPERTS) if e not in residents])
        residents[residents.index(out)] = came
        for p in (policy, *copies):
            p.remove(out)
            p.insert(came)

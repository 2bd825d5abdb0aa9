"""Which experts are resident after which requests, against plain references, and the plans in between."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.errors import UsageError
from mlx_moecache.eviction import EVICTION
from mlx_moecache.residents import Load, Residents
from mlx_moecache.uses import hottest_last

EXPERTS, K = 10, 3
tokens = st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:K]), min_size=1, max_size=40)
capacities = st.integers(K, EXPERTS)
policies = st.sampled_from(list(EVICTION))


class Model:
    """Residents, and what the slots would hold if loads and moves were carried out."""

    def __init__(self, capacity: int, eviction: str = "lru") -> None:
        self.residents = Residents(EXPERTS, capacity, eviction)
        self.contents: dict[int, int] = {}  # slot -> expert

    def carry_out(self, loads: Sequence[Load]) -> None:
        for x in loads:
            assert self.contents.get(x.slot) == x.victim
            self.contents[x.slot] = x.expert
        self.residents.publish(loads)
        self.check()

    def use(self, needed: Sequence[int]) -> int:
        """Select `needed`, the last use last, and return the number of misses."""
        loads = self.residents.plan(needed)
        self.carry_out(loads)
        self.residents.touch([(e, 1) for e in needed])
        assert all(e in self.residents for e in needed)
        return len(loads)

    def resize(self, capacity: int) -> None:
        moves = self.residents.resize(capacity)
        self.contents = {new: self.contents[old] for old, new in moves.items()}
        self.check()

    def check(self) -> None:
        r = self.residents
        slots = {r.slot_of(e): e for e in r.experts}
        assert slots == self.contents  # every resident where its bytes are, nobody else anywhere
        assert all(0 <= s < r.capacity for s in slots)
        assert sorted(r.eviction_order()) == sorted(r.experts)
        assert len(r) == len(slots) <= r.capacity
        if r.capacity == EXPERTS:
            assert all(s == e for s, e in slots.items())


class TestOneTokenAtATime:
    @given(tokens, capacities)
    def test_lru_holds_the_most_recently_used_experts(self, trace: list[list[int]], capacity: int) -> None:
        model, recent = Model(capacity), []
        for needed in trace:
            model.use(needed)
            for e in needed:
                recent = [x for x in recent if x != e] + [e]
            assert model.residents.eviction_order() == recent[-capacity:]

    @given(tokens, capacities)
    def test_misses_and_contents_are_those_of_the_papers_accounting(
        self, trace: list[list[int]], capacity: int
    ) -> None:
        """The paper may evict a hit of the same token and put it back; judged before the token, the counts agree."""
        model, paper = Model(capacity), []
        for needed in trace:
            misses = sum(e not in paper for e in needed)
            for e in needed:
                if e in paper:
                    paper.remove(e)
                elif len(paper) == capacity:
                    paper.pop(0)
                paper.append(e)
            assert model.use(needed) == misses
            assert model.residents.eviction_order() == paper

    @given(tokens, capacities)
    def test_lfu_evicts_the_least_often_used_and_of_these_the_oldest(
        self, trace: list[list[int]], capacity: int
    ) -> None:
        model = Model(capacity, "lfu")
        used: dict[int, tuple[int, int]] = {}  # resident -> (selections, time of the last one)
        clock = 0
        for needed in trace:
            missing = [e for e in needed if e not in used]
            others = sorted((x for x in used if x not in needed), key=lambda x: used[x])
            for e in others[: max(0, len(used) + len(missing) - capacity)]:
                del used[e]
            for e in needed:
                clock += 1
                used[e] = (used.get(e, (0, 0))[0] + 1, clock)
            assert model.use(needed) == len(missing)
            assert model.residents.eviction_order() == sorted(used, key=lambda x: used[x])

    @given(tokens)
    def test_a_larger_lru_never_misses_more(self, trace: list[list[int]]) -> None:
        models = [Model(c) for c in range(K, EXPERTS + 1)]
        misses = [sum(m.use(needed) for needed in trace) for m in models]
        assert misses == sorted(misses, reverse=True)

    @given(tokens, capacities, policies)
    def test_a_plan_changes_nothing_and_evicts_nobody_it_needs(
        self, trace: list[list[int]], capacity: int, eviction: str
    ) -> None:
        model = Model(capacity, eviction)
        for needed in trace:
            before = (model.residents.eviction_order(), model.residents.version)
            loads = model.residents.plan(needed)
            assert (model.residents.eviction_order(), model.residents.version) == before
            assert {x.expert for x in loads} == {e for e in needed if e not in model.residents}
            assert not {x.victim for x in loads} & set(needed)
            assert len({x.slot for x in loads}) == len(loads)
            model.use(needed)

    def test_the_version_changes_exactly_with_the_set(self) -> None:
        model = Model(4)
        versions = [model.residents.version]
        for needed in ([1, 2, 3], [3, 1, 2], [1, 2, 5]):
            model.use(needed)
            versions.append(model.residents.version)
        assert versions[0] < versions[1] == versions[2] < versions[3]


# (capacity, more experts than that)
crowds = st.permutations(range(EXPERTS)).flatmap(
    lambda p: st.integers(K, EXPERTS - 1).flatmap(lambda c: st.integers(c + 1, EXPERTS).map(lambda n: (c, list(p[:n]))))
)


class TestWaves:
    @given(tokens, crowds, policies)
    def test_each_expert_is_served_once_and_loaded_at_most_once(
        self, history: list[list[int]], crowd: tuple[int, list[int]], eviction: str
    ) -> None:
        capacity, touched = crowd
        model = Model(capacity, eviction)
        for needed in history:
            model.use(needed)
        r = model.residents
        present = {e for e in touched if e in r}
        waves = r.plan_waves(touched)
        assert sorted(e for w in waves for e in w.experts) == sorted(touched)
        assert sorted(x.expert for w in waves for x in w.loads) == sorted(set(touched) - present)
        for wave in waves:
            assert len(wave.experts) <= capacity
            assert len({x.slot for x in wave.loads}) == len(wave.loads)
            model.carry_out(wave.loads)  # checks that victims are where they are said to be
            assert all(e in r for e in wave.experts)
        model.residents.touch([(e, 1) for e in touched])
        model.check()

    @given(tokens, crowds)
    def test_the_most_recently_used_end_up_resident_unless_nearly_all_slots_hold_them_already(
        self, history: list[list[int]], crowd: tuple[int, list[int]]
    ) -> None:
        capacity, touched = crowd
        model = Model(capacity)
        for needed in history:
            model.use(needed)
        r, keep = model.residents, touched[-capacity:]
        missing = [e for e in touched if e not in r]
        usable = capacity - sum(e in r for e in keep)  # slots of experts that need not stay
        given_up = max(0, min(len(missing), max(1, capacity // 4)) - usable)
        for wave in r.plan_waves(touched):
            model.carry_out(wave.loads)
        r.touch([(e, 1) for e in touched])
        gone = [e for e in keep if e not in r]
        assert len(gone) == given_up
        if not gone:
            assert r.eviction_order() == keep

    def test_a_full_layer_of_old_experts_makes_way_in_as_few_waves_as_possible(self) -> None:
        model = Model(4)
        model.use([0, 1, 2])
        model.use([3, 0, 1])
        waves = model.residents.plan_waves([4, 5, 6, 7, 8, 9])
        assert [w.experts for w in waves] == [[4, 5], [6, 7, 8, 9]]

    def test_residents_come_first_and_without_reads(self) -> None:
        model = Model(3)
        model.use([7, 8, 9])
        waves = model.residents.plan_waves([0, 9, 1, 2, 3])
        assert (waves[0].experts, waves[0].loads) == ([9], [])


class TestResize:
    @given(tokens, st.lists(capacities, min_size=1, max_size=6), policies)
    def test_those_that_would_be_evicted_last_are_kept_with_their_order(
        self, trace: list[list[int]], sizes: list[int], eviction: str
    ) -> None:
        model = Model(sizes[0], eviction)
        for i, needed in enumerate(trace):
            model.use(needed)
            size = sizes[i % len(sizes)]
            expected = model.residents.eviction_order()[-size:]
            model.resize(size)
            assert model.residents.capacity == size
            assert model.residents.eviction_order() == expected

    @given(tokens, st.lists(st.sampled_from([*range(EXPERTS)]), max_size=4), capacities)
    def test_an_expert_is_in_its_own_slot_wherever_all_fit_even_if_some_were_dropped_or_come_one_by_one(
        self, trace: list[list[int]], dropped: list[int], capacity: int
    ) -> None:
        model = Model(capacity)
        model.use(trace[0])
        model.resize(EXPERTS)
        for expert in dropped:
            if expert in model.residents:
                slot = model.residents.slot_of(expert)
                model.residents.drop(expert)
                del model.contents[slot]
        for needed in trace[1:]:
            model.use(needed)
        model.use(list(reversed(range(EXPERTS))))
        assert model.residents.is_complete
        assert [model.residents.slot_of(e) for e in range(EXPERTS)] == list(range(EXPERTS))

    def test_clear_forgets_everything(self) -> None:
        model = Model(4)
        model.use([1, 2, 3])
        version = model.residents.version
        model.residents.clear()
        model.contents = {}
        model.check()
        assert model.residents.version > version and len(model.residents) == 0
        assert model.use([1, 2, 3]) == 3

    def test_touching_an_expert_that_is_not_resident_does_nothing(self) -> None:
        model = Model(3)
        model.use([1, 2, 3])
        model.residents.touch([(9, 2), (1, 1)])
        assert model.residents.eviction_order() == [2, 3, 1]


@pytest.mark.parametrize("eviction", list(EVICTION))
def test_a_dropped_expert_frees_its_slot(eviction: str) -> None:
    model = Model(3, eviction)
    model.use([1, 2, 3])
    slot = model.residents.slot_of(2)
    model.residents.drop(2)
    del model.contents[slot]
    model.check()
    loads = model.residents.plan([5])
    assert loads == [Load(5, slot, None)]
    model.carry_out(loads)


class TestInitialResidents:
    @given(tokens, st.permutations(range(EXPERTS)), st.integers(0, EXPERTS), policies)
    def test_are_exactly_those_given_whatever_was_there_before(
        self, history: list[list[int]], experts: list[int], n: int, eviction: str
    ) -> None:
        model = Model(max(n, K), eviction)
        for needed in history:
            model.use(needed)
        r, before = model.residents, model.residents.version
        r.seed(experts[:n])
        assert r.eviction_order() == experts[:n] and r.version > before
        model.contents = {r.slot_of(e): e for e in r.experts}
        model.check()
        for needed in history:
            model.use(needed)

    def test_leave_no_history(self) -> None:
        seeded, fresh = Residents(EXPERTS, 4, "decay"), Residents(EXPERTS, 4, "decay")
        seeded.seed([1, 2])
        seeded.touch([(1, 1), (1, 1)])
        for r in (seeded, fresh):
            r.seed([1, 2, 3])
            r.touch([(3, 1), (2, 1)])
        assert seeded.eviction_order() == fresh.eviction_order() == [1, 3, 2]

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            ([1, 1], "must be distinct numbers from 0 to 9"),
            ([10], "must be distinct numbers from 0 to 9"),
            ([-1], "must be distinct numbers from 0 to 9"),
            ([1, 2, 3, 4], "4 initial residents are too many for 3 slots"),
        ],
    )
    def test_that_cannot_be_are_refused_and_change_nothing(self, experts: list[int], message: str) -> None:
        model = Model(3)
        model.use([7, 8, 9])
        with pytest.raises(UsageError, match=message):
            model.residents.seed(experts)
        model.check()


class TestHistory:
    def test_of_decayed_counts_survives_eviction_and_resize(self) -> None:
        r = Residents(EXPERTS, 3, "decay")
        for needed in ([0, 1, 2], [0, 1, 2], [0, 3, 4], [5, 3, 4]):
            r.publish(r.plan(needed))
            r.touch([(e, 1) for e in needed])
        r.resize(4)
        r.publish(r.plan([0]))
        r.touch([])
        assert r.eviction_order() == [5, 3, 4, 0]  # 0 was selected three times, and 5 once

    def test_of_experts_that_passed_through_in_a_wave_counts_too(self) -> None:
        r = Residents(EXPERTS, 3, "decay")
        r.touch([(0, 5), (1, 1), (2, 1), (3, 1)], tokens=5)
        for e in (0, 1, 2):
            r.publish(r.plan([e]))
        assert r.eviction_order() == [1, 2, 0]

    def test_ages_by_the_tokens_of_a_call(self) -> None:
        orders = []
        for tokens in (1, 40):
            r = Residents(EXPERTS, 4, "decay")
            for needed, t in (([0, 1], 1), ([0, 1], 1), ([2, 3], tokens)):
                r.publish(r.plan(needed))
                r.touch([(e, t) for e in needed], tokens=t)
            orders.append(r.eviction_order())
        assert orders == [[2, 3, 0, 1], [0, 1, 2, 3]]


def test_what_a_prompt_selected_most_often_leaves_last() -> None:
    assert hottest_last([(7, 1), (3, 4), (5, 1), (2, 2), (9, 2)]) == [(7, 1), (5, 1), (2, 2), (9, 2), (3, 4)]
